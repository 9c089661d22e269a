"""Layers that hold a checkpoint's weights in the form in which the kernels read them fastest."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from mxmoe.cuda import scales_are_foldable
from mxmoe.integrations.torch import linear, mxfp4_moe, rmsnorm
from mxmoe.ops import Activations, int8_quantize
from mxmoe.packing import can_pack, pack_linear, pack_mxfp4, prefers_packed, unpack_linear, unpack_mxfp4

__all__ = ["MATRICES", "Int8Linear", "Linear", "Mxfp4Experts", "Panels", "RMSNorm"]

MATRICES = ("gate_up_proj", "down_proj")


class Panels(torch.nn.Module):
    """A layer whose frozen weights may be held by panels (see `mxmoe.packing`).

    Attributes
    ----------
    packed : bool
        Whether they are, and have the shapes of panels. `state_dict` and `load_state_dict` speak of the stored form
        in any case. Both forms are made in new memory, so that whoever was given one of them keeps it as it was.
    """

    packed = False

    @property
    def wants_packed(self) -> bool:
        """Whether the kernels in force read panels faster."""
        raise NotImplementedError

    def _pack(self) -> None:
        raise NotImplementedError

    def _unpack(self) -> None:
        raise NotImplementedError

    def _stored(self) -> dict[str, torch.Tensor]:
        """Copy what is packed to the stored form."""
        raise NotImplementedError

    def pack(self) -> None:
        """Hold the weights by panels from now on; one matrix is there twice for a moment."""
        if not self.packed:
            self._pack()
            self.packed = True

    def unpack(self) -> None:
        """Hold the weights as stored from now on; one matrix is there twice for a moment."""
        if self.packed:
            self._unpack()
            self.packed = False

    def pack_if_wanted(self) -> None:
        """Pack, unless a graph is being traced."""
        if not self.packed and not torch.compiler.is_compiling() and self.wants_packed:
            self.pack()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination.update({prefix + name: value for name, value in self._stored().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()  # the next forward packs again
        super()._load_from_state_dict(*args, **kwargs)


def _bfloat16(tensor: torch.Tensor) -> Any:
    return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


class Linear(Panels, torch.nn.Linear):
    """A dense layer on `mxmoe.ops.linear`; its weight is bfloat16 and frozen.

    Attributes
    ----------
    weight : (out_features, in_features) bfloat16
        As stored, or by panels.
    bias : (out_features,) or None
    """

    @property
    def wants_packed(self) -> bool:
        """Whether the kernels in force read panels faster, and the shape has whole ones."""
        return can_pack(self.out_features, self.in_features) and prefers_packed("bf16", "bf16")

    def _pack(self) -> None:
        self.weight.data = _tensor(pack_linear(_bfloat16(self.weight))[0])

    def _unpack(self) -> None:
        self.weight.data = self._stored()["weight"]

    def _stored(self) -> dict[str, torch.Tensor]:
        return {"weight": _tensor(unpack_linear(_bfloat16(self.weight))[0])}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), dtype of `x`."""
        self.pack_if_wanted()
        y = linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class RoundedWeight:
    """Stands where a layer's weight was, for those who ask what it was: its values are no longer there.

    What merges an adapter asks for them, whoever has made the adapter. Adding it to the integers would lose it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape, self.device, self.dtype = weight.shape, weight.device, torch.int8

    @property
    def data(self) -> torch.Tensor:
        """Raise ValueError."""
        raise ValueError(
            "this layer's weight has been rounded to int8, and an adapter cannot be merged into that: keep it "
            "beside the layer, or load the model with dense='mxmoe' and the adapter's configuration through "
            "mxmoe.integrations.peft.with_experts to merge"
        )


class Int8Linear(torch.nn.Linear):
    """A dense layer on `mxmoe.ops.linear` whose weight has been rounded to int8, and is frozen.

    Parameters
    ----------
    in_features, out_features : int
        `in_features` is a multiple of 32.
    bias : bool
    activations : {"float32", "bf16", "int8"}
        See `mxmoe.ops.linear`.

    Attributes
    ----------
    weight : (out_features, in_features)
        What is loaded into it, until `round` is called; then a `RoundedWeight`.
    weight_codes : (out_features, in_features) int8, or by panels (see `mxmoe.packing`)
    weight_scales : (out_features, in_features / 32) bfloat16, or by panels
        Both from `round` on.
    bias : (out_features,) or None
    """

    weight_codes: torch.nn.Parameter
    weight_scales: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, activations: Activations) -> None:
        if in_features % 32:
            raise ValueError(f"in_features is {in_features}; wanted a multiple of 32, the block of an int8 scale")
        super().__init__(in_features, out_features, bias)
        self.activations = activations

    def round(self) -> None:
        """Replace the weight by integers and their scales, in the form that the kernels in force read fastest."""
        held = self.weight.detach()
        codes, scales = int8_quantize(_bfloat16(held) if held.dtype == torch.bfloat16 else held.float().numpy())
        if can_pack(self.out_features, self.in_features) and prefers_packed(self.activations, "int8"):
            codes, scales = pack_linear(codes, scales)
        del self.weight
        self.weight = RoundedWeight(held)  # type: ignore[assignment]
        self.weight_codes = torch.nn.Parameter(torch.from_numpy(codes), requires_grad=False)
        self.register_buffer("weight_scales", _tensor(scales))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), dtype of `x`."""
        rows, scales = x.reshape(-1, self.in_features), self.weight_scales
        y = linear(rows, self.weight_codes, self.bias, scales=scales, activations=self.activations)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class RMSNorm(GptOssRMSNorm):
    """transformers' norm as one op: the same arithmetic, in float32 and rounded once."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., hidden_size), dtype of `hidden_states`."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rmsnorm(rows, self.weight, self.variance_epsilon).reshape(hidden_states.shape)


class Mxfp4Experts(Panels):
    """The experts of one layer, in MXFP4 as the checkpoint has them.

    Parameters
    ----------
    config : GptOssConfig
    activations : {"float32", "bf16", "int8"}
        See `mxmoe.ops.mxfp4_moe`.

    Attributes
    ----------
    gate_up_proj_blocks : (num_experts, 2 * intermediate_size, hidden_size // 32, 16) uint8
    gate_up_proj_scales : (num_experts, 2 * intermediate_size, hidden_size // 32) uint8
    gate_up_proj_bias : (num_experts, 2 * intermediate_size) float32 or bfloat16
    down_proj_blocks : (num_experts, hidden_size, intermediate_size // 32, 16) uint8
    down_proj_scales : (num_experts, hidden_size, intermediate_size // 32) uint8
    down_proj_bias : (num_experts, hidden_size) float32 or bfloat16
        Blocks and scales are frozen; the biases can be trained.
    foldable_scales : bool
        What `mxmoe.cuda.scales_are_foldable` says of the scales, for a layer that is moved to a GPU; found out when
        they are loaded, not when they are changed in place.
    """

    gate_up_proj_blocks: torch.nn.Parameter
    gate_up_proj_scales: torch.nn.Parameter
    gate_up_proj_bias: torch.nn.Parameter
    down_proj_blocks: torch.nn.Parameter
    down_proj_scales: torch.nn.Parameter
    down_proj_bias: torch.nn.Parameter
    foldable_scales = False

    def __init__(self, config: Any, activations: Activations) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.alpha, self.limit = getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)
        self.activations = activations
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 32:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a multiple of 32, the block size of MXFP4")
        for name in (f"{matrix}_{part}" for matrix in MATRICES for part in ("blocks", "scales", "bias")):
            trained = name.endswith("bias")
            data = torch.empty(self.stored_shape(name), dtype=None if trained else torch.uint8)
            self.register_parameter(name, torch.nn.Parameter(data, requires_grad=trained))

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter as the checkpoint has it."""
        up = name.startswith("gate_up_proj")
        rows, k = (2 * self.intermediate_size, self.hidden_size) if up else (self.hidden_size, self.intermediate_size)
        ends = {"blocks": (rows, k // 32, 16), "scales": (rows, k // 32), "bias": (rows,)}
        return (self.num_experts, *ends[name.rpartition("_")[2]])

    @property
    def wants_packed(self) -> bool:
        """Whether the kernels in force read panels faster."""
        return prefers_packed(self.activations)

    def look_at_scales(self) -> None:
        """Find out whether the scales that are held now may be folded."""
        scales = [getattr(self, f"{name}_scales").detach() for name in MATRICES]
        self.foldable_scales = not any(x.is_meta for x in scales) and scales_are_foldable(*scales)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.look_at_scales()

    def _hold(self, name: str, blocks: Any, scales: Any) -> None:
        getattr(self, f"{name}_blocks").data = torch.from_numpy(blocks)
        getattr(self, f"{name}_scales").data = torch.from_numpy(scales)

    def _held(self, name: str) -> tuple[Any, Any]:
        return getattr(self, f"{name}_blocks").detach().numpy(), getattr(self, f"{name}_scales").detach().numpy()

    def _pack(self) -> None:
        for name in MATRICES:
            self._hold(name, *pack_mxfp4(*self._held(name)))

    def _unpack(self) -> None:
        for name in MATRICES:
            self._hold(name, *unpack_mxfp4(*self._held(name)))

    def _stored(self) -> dict[str, torch.Tensor]:
        found = {}
        for name in MATRICES:
            parts = zip(("blocks", "scales"), unpack_mxfp4(*self._held(name)), strict=True)
            found.update({f"{name}_{part}": torch.from_numpy(array) for part, array in parts})
        return found

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """(num_tokens, hidden_size), twice (num_tokens, experts_per_token) -> (num_tokens, hidden_size)."""
        self.pack_if_wanted()
        y = mxfp4_moe(
            hidden_states,
            router_indices,
            routing_weights,
            self.gate_up_proj_blocks,
            self.gate_up_proj_scales,
            self.gate_up_proj_bias,
            self.down_proj_blocks,
            self.down_proj_scales,
            self.down_proj_bias,
            activations=self.activations,
            swiglu_alpha=self.alpha,
            swiglu_limit=self.limit,
            foldable_scales=self.foldable_scales,
        )
        return y.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Return the sizes."""
        sizes = f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"
        return f"{sizes}, intermediate_size={self.intermediate_size}, activations={self.activations}"
