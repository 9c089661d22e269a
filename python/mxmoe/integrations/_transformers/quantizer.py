"""The quantizer through which ``from_pretrained(path, quantization_config=MxmoeConfig())`` loads MXFP4 experts."""

from __future__ import annotations

import copy
import ctypes
import mmap
from typing import Any, Literal

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxmoe.integrations._transformers.modules import MATRICES, Int8Linear, Linear, Mxfp4Experts, Panels, RMSNorm
from mxmoe.integrations._transformers.threads import rest_while_decoding
from mxmoe.ops import Activations

__all__ = ["MxmoeConfig", "MxmoeQuantizer", "register_quantization"]

_LOGGER = logging.get_logger(__name__)
METHOD = "mxmoe"
_ACTIVATIONS = ("float32", "bf16", "int8")
_DENSE = ("mxmoe", "int8", "torch")
# Linux, <asm-generic/mman-common.h>: give the pages back, but keep what they hold.
_MADV_PAGEOUT = 21


class MxmoeConfig(QuantizationConfigMixin):
    """Load a gpt-oss checkpoint with its experts as they are stored, in MXFP4, and run them by mxmoe's kernels.

    Parameters
    ----------
    activations : {"float32", "bf16", "int8"}, optional
        What activations are rounded to before they meet an expert's weight (see `mxmoe.ops.mxfp4_moe`). By default
        as the rest of the model: "float32" for ``dtype=torch.float32``, else "bf16".
    dense : {"mxmoe", "int8", "torch"}, optional
        Who multiplies by the attention's projections and by lm_head, and computes the norms. "mxmoe", the default
        for ``dtype=torch.bfloat16``, is much the faster on one token, sums in float32, and freezes the weights it
        multiplies by (biases, norms, and adapters beside them, can be trained). "int8" also rounds those weights to
        int8 while loading, as ``mxmoe.load(dense="int8")`` does: a third fewer bytes a token for 20b. Such a model
        cannot be saved, adapters beside it can. "torch", the default for all else, leaves transformers' layers as
        they are.
    **stored
        What the checkpoint's own ``quantization_config`` says beside its method; kept for saving.

    Raises
    ------
    ValueError
        `activations` or `dense` is something else.

    Notes
    -----
    Written to a ``config.json`` it is an ``mxfp4`` configuration again, as the checkpoint had it.

    During a forward of at most 16 tokens torch's own operators run in the calling thread alone
    (``torch.set_num_threads(1)``, set back at its end): torch's waiting threads would hold the kernels' CPUs.
    """

    def __init__(
        self,
        activations: Activations | None = None,
        dense: Literal["mxmoe", "int8", "torch"] | None = None,
        **stored: Any,
    ) -> None:
        for name, value, choices in (("activations", activations, _ACTIVATIONS), ("dense", dense, _DENSE)):
            if value is not None and value not in choices:
                wanted = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {value!r}; wanted None or one of {wanted}")
        self.quant_method: Any = METHOD
        self.activations, self.dense = activations, dense
        self.stored = {name: value for name, value in stored.items() if name != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """Return what a ``config.json`` holds."""
        return {**copy.deepcopy(self.stored), "quant_method": "mxfp4"}

    def over(self, stored: Any) -> MxmoeConfig:
        """Return a copy that remembers the checkpoint's configuration.

        Parameters
        ----------
        stored : dict or QuantizationConfigMixin

        Raises
        ------
        ValueError
            It is not one of MXFP4.
        """
        held = stored if isinstance(stored, dict) else stored.to_dict()
        method = held.get("quant_method")
        method = getattr(method, "value", method)
        if method not in ("mxfp4", METHOD):
            raise ValueError(f"MxmoeConfig came with a checkpoint whose quant_method is {method!r}; wanted 'mxfp4'")
        return MxmoeConfig(self.activations, self.dense, **held)


def _on_cpu(device_map: Any) -> bool:
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.accelerator.is_available()
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(place is None or str(place) == "cpu" for place in places)


def _page_out(tensor: torch.Tensor) -> None:
    """Ask the system to take back the memory of a mapped file; what it holds stays readable."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and nbytes > 0:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), ctypes.c_int(_MADV_PAGEOUT))


class MxmoeQuantizer(HfQuantizer):
    """Puts `Mxfp4Experts` in the place of a model's experts, and loads blocks and scales into them as they are."""

    requires_calibration = False
    quantization_config: MxmoeConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ValueError for a checkpoint or device map that this cannot load."""
        if not self.pre_quantized:
            raise ValueError(
                "MxmoeConfig was given for a checkpoint without MXFP4 experts (its config has no quantization_config "
                "with quant_method 'mxfp4'); load it without, with experts_implementation='mxmoe'"
            )
        if not _on_cpu(device_map):
            raise ValueError(f"device_map is {device_map!r}; wanted the CPU, which is where mxmoe's kernels run")

    def _process_model_before_weight_loading(self, model: Any, use_kernels: bool = False, **kwargs: Any) -> None:
        if use_kernels:
            raise ValueError("use_kernels=True would replace the layers that MxmoeConfig puts in; wanted False")
        config = model.config.get_text_config()
        dtype = torch.get_default_dtype()
        follow: Activations = "float32" if dtype == torch.float32 else "bf16"
        activations = self.quantization_config.activations or follow
        found = [name for name, module in model.named_modules() if type(module).__name__ == "GptOssExperts"]
        if not found:
            raise ValueError(f"MxmoeConfig knows gpt-oss models; came {type(model).__name__}")
        with torch.device("meta"):
            for name in found:
                model.set_submodule(name, Mxfp4Experts(config, activations))
            if self._runs_dense(dtype):
                for name, old in self._dense(model):
                    sizes = old.in_features, old.out_features, old.bias is not None
                    rounds = self.quantization_config.dense == "int8"
                    model.set_submodule(name, Int8Linear(*sizes, activations) if rounds else Linear(*sizes))
                for name, module in list(model.named_modules()):
                    if type(module) is GptOssRMSNorm:
                        model.set_submodule(name, RMSNorm(module.weight.shape[0], eps=module.variance_epsilon))

    def _runs_dense(self, dtype: torch.dtype) -> bool:
        """Whether the kernels run the dense layers and the norms."""
        dense = self.quantization_config.dense
        if dense == "mxmoe" and dtype != torch.bfloat16:
            raise ValueError(f"dense is 'mxmoe' with dtype {dtype}; wanted torch.bfloat16, or dense='torch'")
        return dense == "int8" or (dense != "torch" and dtype == torch.bfloat16)

    def _dense(self, model: Any) -> list[tuple[str, torch.nn.Linear]]:
        """Find the dense layers that the kernels are to run."""
        head = None if model.config.get_text_config().tie_word_embeddings else model.get_output_embeddings()
        named = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
        return [(name, module) for name, module in named if module is head or ".self_attn." in name]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, Mxfp4Experts):
                self._check(name, module)
                module.look_at_scales()
            if isinstance(module, Linear):
                module.weight.requires_grad_(False)
            if isinstance(module, Int8Linear):
                loaded = module.weight.data
                module.round()
                _page_out(loaded)
            if isinstance(module, Panels) and module.wants_packed:
                stored = [p.data for p in module.parameters() if not p.requires_grad]
                module.pack()
                for tensor in stored:
                    _page_out(tensor)
        rest_while_decoding(model)
        return model

    def _check(self, name: str, experts: Mxfp4Experts) -> None:
        """Raise ValueError unless all of a layer's weights have been loaded, fit the config and are numbers."""
        for key, value in experts.named_parameters():
            wanted = experts.stored_shape(key)
            if not getattr(value, "_is_hf_initialized", False):
                raise ValueError(f"the checkpoint has no {name}.{key} of shape {wanted}")
            if tuple(value.shape) != wanted:
                raise ValueError(f"the checkpoint has {name}.{key} of shape {tuple(value.shape)}; wanted {wanted}")
        for matrix in MATRICES:
            scales = getattr(experts, f"{matrix}_scales")
            if bool((scales == 255).any()):
                raise ValueError(f"{name}.{matrix}_scales holds the byte 255, which is NaN; wanted 0 to 254")

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the weights as the checkpoint has them, without a second copy; the next forward packs again."""
        for module in model.modules():
            if isinstance(module, Panels):
                module.unpack()
        state = model.state_dict()
        for key, value in state.items() if model.config.dtype == torch.bfloat16 else ():
            # Some versions widen the norms of a bfloat16 model.
            if value.dtype == torch.float32 and torch.equal(narrow := value.to(torch.bfloat16), value):
                state[key] = narrow
        return state, {}

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` can write the checkpoint's form."""
        if self.quantization_config.dense != "int8":
            return True
        _LOGGER.warning(
            "MxmoeConfig(dense='int8') has rounded the dense weights while loading: the checkpoint's are no longer "
            "there to be saved. Load it with dense='mxmoe' to save it."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the frozen experts, to adapters for one."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The experts are one operator to `torch.compile`."""
        return True


def register_quantization() -> None:
    """Make transformers know `MxmoeConfig`; more calls change nothing."""
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(METHOD)(MxmoeConfig)
    auto.register_quantizer(METHOD)(MxmoeQuantizer)
    # transformers refuses a configuration of another class than the checkpoint's own, and asks no quantizer. This is
    # the one place where it has to be told otherwise; every other configuration takes its way as before.
    merge = auto.AutoHfQuantizer.merge_quantization_configs

    def merge_quantization_configs(
        cls: Any, /, quantization_config: Any, quantization_config_from_args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(quantization_config_from_args, MxmoeConfig):
            return quantization_config_from_args.over(quantization_config)
        return merge(quantization_config, quantization_config_from_args, **kwargs)

    merged = classmethod(merge_quantization_configs)
    auto.AutoHfQuantizer.merge_quantization_configs = merged  # type: ignore[method-assign, assignment]
