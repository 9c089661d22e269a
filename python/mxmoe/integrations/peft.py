"""LoRA on packed experts: what PEFT has to know to put an adapter in front of a layer's experts.

    from peft import LoraConfig, PeftModel, get_peft_model
    from mxmoe.integrations.peft import with_experts

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
    model = get_peft_model(model, with_experts(config))  # train, then
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base, "adapter", config=with_experts(LoraConfig.from_pretrained("adapter")))

Attention's projections are layers that PEFT knows by itself, and the router is reached by its own
``target_parameters=["mlp.router.weight"]``. The target ``experts`` is new: ``x + scale * B A x`` goes into all of a
layer's experts in the place of ``x``, while the router sees ``x`` as before. That is what can be trained before
weights that nobody unpacks: gradients pass through the experts, whose bytes stay what they are. `mxmoe.load` takes
the saved folder as it is, without PEFT or PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from mxmoe.integrations._transformers.modules import Linear, Mxfp4Experts

__all__ = ["DenseLora", "ExpertsLora", "with_experts"]

# The others that PEFT has begin by changing the weight beside which they stand.
_INITS = (True, False, "gaussian", "orthogonal")


class ExpertsLora(LoraLinear):  # type: ignore[misc]
    """A low-rank adapter on what goes into a layer's experts; PEFT makes it, see `with_experts`.

    Attributes
    ----------
    base_layer : Mxfp4Experts or GptOssExperts
    lora_A, lora_B : ModuleDict
        By the adapter's name, Linear layers from ``hidden_size`` to the rank and back.
    """

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.hidden_size, module.hidden_size

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone: variants such as DoRA look at a weight that is not there."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError: what stands before the experts is part of no weight of theirs alone."""
        raise ValueError("an adapter on the experts' input cannot be merged into MXFP4 weights; keep it beside them")

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """(num_tokens, hidden_size), twice (num_tokens, experts_per_token) -> (num_tokens, hidden_size)."""
        x = hidden_states
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.lora_A:
                narrow = self.lora_A[name](self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype)))
                hidden_states = hidden_states + self.lora_B[name](narrow) * self.scaling[name]
        y: torch.Tensor = self.base_layer(hidden_states.to(x.dtype), router_indices, routing_weights)
        return y


class DenseLora(LoraLinear):  # type: ignore[misc]
    """A low-rank adapter beside a dense layer that may be held by panels; PEFT makes it, see `with_experts`.

    It is merged into the stored form, which the next forward packs again.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the weight, in bfloat16; arguments as PEFT's."""
        self.get_base_layer().unpack()
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Take merged adapters off the weight again, in bfloat16."""
        self.get_base_layer().unpack()
        super().unmerge()


def with_experts(config: LoraConfig) -> LoraConfig:
    """Let a configuration's ``target_modules`` name ``"experts"``, packed or of transformers' own kind.

    Adapters beside dense layers can then be merged, too (PEFT alone does not know the packed form), but for layers
    that have been rounded to int8: those refuse, whoever has made the adapter.

    PEFT does not store this: say it again where a saved configuration is read.

    Parameters
    ----------
    config : LoraConfig
        Changed in place.

    Returns
    -------
    LoraConfig
        The same.

    Raises
    ------
    TypeError
        `config` is none of LoRA.
    ValueError
        Its ``init_lora_weights`` would change the base weights.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config is of type {type(config).__name__}; wanted a peft.LoraConfig")
    if config.init_lora_weights not in _INITS:
        wanted = ", ".join(map(repr, _INITS))
        raise ValueError(f"init_lora_weights is {config.init_lora_weights!r}; wanted one of {wanted}")
    config._register_custom_module({Mxfp4Experts: ExpertsLora, GptOssExperts: ExpertsLora, Linear: DenseLora})
    return config
