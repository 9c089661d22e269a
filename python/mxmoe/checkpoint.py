"""A checkpoint on disk, in any of its layouts, as read-only arrays under one set of names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mxmoe.config import ConfigError, ModelConfig
from mxmoe.hub import resolve
from mxmoe.memory import empty
from mxmoe.quantize import quantize_mxfp4, squared_error
from mxmoe.shards import CheckpointError, Shards

__all__ = ["Checkpoint", "CheckpointError", "ConfigError", "LayerWeights", "resolve"]

Layout = Literal["huggingface", "huggingface-bf16", "original"]
Array = NDArray[Any]


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer; bf16 is `ml_dtypes.bfloat16`, H the hidden and I the intermediate size.

    Attributes
    ----------
    input_layernorm, post_attention_layernorm : (H,) bfloat16
    q_proj_weight, k_proj_weight, v_proj_weight : (heads * head_dim, H) bfloat16
    q_proj_bias, k_proj_bias, v_proj_bias : (heads * head_dim,) bfloat16
    o_proj_weight, o_proj_bias : (H, num_attention_heads * head_dim), (H,) bfloat16
    sinks : (num_attention_heads,) bfloat16
    router_weight, router_bias : (E, H), (E,) bfloat16
    gate_up_blocks, gate_up_scales, gate_up_bias : (E, 2I, H/32, 16) uint8, (E, 2I, H/32) uint8, (E, 2I)
    bfloat16
    down_blocks, down_scales, down_bias : (E, H, I/32, 16) uint8, (E, H, I/32) uint8, (E, H) bfloat16
    """

    input_layernorm: Array
    q_proj_weight: Array
    q_proj_bias: Array
    k_proj_weight: Array
    k_proj_bias: Array
    v_proj_weight: Array
    v_proj_bias: Array
    o_proj_weight: Array
    o_proj_bias: Array
    sinks: Array
    post_attention_layernorm: Array
    router_weight: Array
    router_bias: Array
    gate_up_blocks: Array
    gate_up_scales: Array
    gate_up_bias: Array
    down_blocks: Array
    down_scales: Array
    down_bias: Array


_HUGGING_FACE = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "input_layernorm": "model.layers.{}.input_layernorm.weight",
    "q_proj_weight": "model.layers.{}.self_attn.q_proj.weight",
    "q_proj_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_proj_weight": "model.layers.{}.self_attn.k_proj.weight",
    "k_proj_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_proj_weight": "model.layers.{}.self_attn.v_proj.weight",
    "v_proj_bias": "model.layers.{}.self_attn.v_proj.bias",
    "o_proj_weight": "model.layers.{}.self_attn.o_proj.weight",
    "o_proj_bias": "model.layers.{}.self_attn.o_proj.bias",
    "sinks": "model.layers.{}.self_attn.sinks",
    "post_attention_layernorm": "model.layers.{}.post_attention_layernorm.weight",
    "router_weight": "model.layers.{}.mlp.router.weight",
    "router_bias": "model.layers.{}.mlp.router.bias",
    "gate_up_blocks": "model.layers.{}.mlp.experts.gate_up_proj_blocks",
    "gate_up_scales": "model.layers.{}.mlp.experts.gate_up_proj_scales",
    "gate_up_bias": "model.layers.{}.mlp.experts.gate_up_proj_bias",
    "down_blocks": "model.layers.{}.mlp.experts.down_proj_blocks",
    "down_scales": "model.layers.{}.mlp.experts.down_proj_scales",
    "down_bias": "model.layers.{}.mlp.experts.down_proj_bias",
}
_HUGGING_FACE_BF16 = {
    name: tensor
    for name, tensor in _HUGGING_FACE.items()
    if not name.endswith("_blocks") and not name.endswith("_scales")
} | {
    "gate_up": "model.layers.{}.mlp.experts.gate_up_proj",
    "down": "model.layers.{}.mlp.experts.down_proj",
}
_ORIGINAL = {
    "embed_tokens": "embedding.weight",
    "norm": "norm.scale",
    "lm_head": "unembedding.weight",
    "input_layernorm": "block.{}.attn.norm.scale",
    "qkv_weight": "block.{}.attn.qkv.weight",
    "qkv_bias": "block.{}.attn.qkv.bias",
    "o_proj_weight": "block.{}.attn.out.weight",
    "o_proj_bias": "block.{}.attn.out.bias",
    "sinks": "block.{}.attn.sinks",
    "post_attention_layernorm": "block.{}.mlp.norm.scale",
    "router_weight": "block.{}.mlp.gate.weight",
    "router_bias": "block.{}.mlp.gate.bias",
    "gate_up_blocks": "block.{}.mlp.mlp1_weight.blocks",
    "gate_up_scales": "block.{}.mlp.mlp1_weight.scales",
    "gate_up_bias": "block.{}.mlp.mlp1_bias",
    "down_blocks": "block.{}.mlp.mlp2_weight.blocks",
    "down_scales": "block.{}.mlp.mlp2_weight.scales",
    "down_bias": "block.{}.mlp.mlp2_bias",
}
TENSOR_NAMES: dict[Layout, dict[str, str]] = {
    "huggingface": _HUGGING_FACE,
    "huggingface-bf16": _HUGGING_FACE_BF16,
    "original": _ORIGINAL,
}
"""Tensor name of every weight in each layout; ``{}`` stands for the layer."""

# Weights of a gigabyte that are used a few rows or one expert at a time: their check must not leave them
# resident.
_READ_IN_PART = ("embed_tokens", "gate_up", "down")


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that some layout stores, by the names of `TENSOR_NAMES`."""
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "embed_tokens": (config.vocab_size, hidden),
        "norm": (hidden,),
        "lm_head": (config.vocab_size, hidden),
        "input_layernorm": (hidden,),
        "q_proj_weight": (q, hidden),
        "q_proj_bias": (q,),
        "k_proj_weight": (kv, hidden),
        "k_proj_bias": (kv,),
        "v_proj_weight": (kv, hidden),
        "v_proj_bias": (kv,),
        "qkv_weight": (q + 2 * kv, hidden),
        "qkv_bias": (q + 2 * kv,),
        "o_proj_weight": (hidden, q),
        "o_proj_bias": (hidden,),
        "sinks": (config.num_attention_heads,),
        "post_attention_layernorm": (hidden,),
        "router_weight": (experts, hidden),
        "router_bias": (experts,),
        "gate_up_blocks": (experts, 2 * inner, hidden // 32, 16),
        "gate_up_scales": (experts, 2 * inner, hidden // 32),
        "gate_up_bias": (experts, 2 * inner),
        "gate_up": (experts, hidden, 2 * inner),
        "down_blocks": (experts, hidden, inner // 32, 16),
        "down_scales": (experts, hidden, inner // 32),
        "down_bias": (experts, hidden),
        "down": (experts, inner, hidden),
    }


def is_packed(name: str) -> bool:
    """Tell whether weight `name` is stored as uint8 (MXFP4 blocks and scales) rather than bfloat16."""
    return name.endswith(("_blocks", "_scales"))


class Checkpoint:
    """An open checkpoint: configuration and weights, the latter read-only views of the memory-mapped files.

    Nothing is read until it is asked for. MXFP4 stays MXFP4. Experts stored as bf16 (a dequantised or
    fine-tuned checkpoint) are encoded as MXFP4 by `layer`, one expert at a time, because a bf16 copy of them
    would take four times the memory that the model promises; a warning tells how much that rounding changed,
    if anything.

    Attributes
    ----------
    path : Path
        The folder that holds the weights.
    config : ModelConfig
    layout : {"huggingface", "huggingface-bf16", "original"}
    tokenizer_path : Path or None
        ``tokenizer.json`` of the folder (or, for ``original/``, of the folder above).
    """

    def __init__(self, path: Path, config: ModelConfig, shards: Shards) -> None:
        self.path, self.config = path, config
        self._shards = shards
        self.layout: Layout = _detect_layout(shards)
        self._names = TENSOR_NAMES[self.layout]
        self._check_tensors()
        places = [path, path.parent] if path.name == "original" else [path]
        candidates = (place / "tokenizer.json" for place in places)
        self.tokenizer_path = next((file for file in candidates if file.is_file()), None)
        self._errors: dict[int, tuple[float, float]] = {}
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder.

        Parameters
        ----------
        path : str or Path
            The folder of a checkpoint; one that has only the subfolder ``original`` is read from there.

        Returns
        -------
        Checkpoint

        Raises
        ------
        CheckpointError
            When files are missing or damaged, or a tensor does not fit the configuration.
        ConfigError
            When ``config.json`` is missing or wrong.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is not a folder, expected one with config.json and its weights")
        if (folder / "original" / "config.json").is_file() and not _has_weights(folder):
            folder = folder / "original"
        return cls(folder, ModelConfig.from_folder(folder), Shards(folder))

    def _check_tensors(self) -> None:
        """Compare every tensor's name, dtype and shape with the configuration."""
        shapes, expected = weight_shapes(self.config), []
        for name, template in self._names.items():
            dtype = "U8" if is_packed(name) else "BF16"
            layers = range(self.config.num_hidden_layers) if "{}" in template else [0]
            for i in layers:
                expected.append(template.format(i))
                self._shards.check(expected[-1], dtype, shapes[name])
        self._shards.refuse_others(expected)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are handed out, that is with the experts in MXFP4."""
        shapes = weight_shapes(self.config)

        def size(name: str) -> int:
            return math.prod(shapes[name]) * (1 if is_packed(name) else 2)

        layer = sum(size(field.name) for field in fields(LayerWeights))
        return self.config.num_hidden_layers * layer + sum(map(size, ("embed_tokens", "norm", "lm_head")))

    def _array(self, name: str, layer: int = 0) -> Array:
        """Return one stored weight after looking for values that no model has."""
        tensor = self._names[name].format(layer)
        if tensor not in self._checked and not name.endswith("_blocks"):
            self._shards.refuse_bad_values(tensor, keep=name not in _READ_IN_PART)
            self._checked.add(tensor)
        return self._shards.array(tensor)

    @property
    def embed_tokens(self) -> Array:
        """The embedding, (vocab_size, hidden_size) bfloat16."""
        return self._array("embed_tokens")

    @property
    def norm(self) -> Array:
        """The weight of the last normalisation, (hidden_size,) bfloat16."""
        return self._array("norm")

    @property
    def lm_head(self) -> Array:
        """The output projection, (vocab_size, hidden_size) bfloat16."""
        return self._array("lm_head")

    def layer(self, i: int) -> LayerWeights:
        """Return the weights of layer `i`, checked.

        Parameters
        ----------
        i : int
            From 0 to ``config.num_hidden_layers - 1``.

        Returns
        -------
        LayerWeights
            Views of the files. In the layout ``"huggingface-bf16"`` the experts are encoded anew at every
            call and belong to the caller.

        Raises
        ------
        IndexError
            When there is no such layer.
        CheckpointError
            When a weight is NaN or infinite, or a scale byte is 255.
        """
        if not 0 <= i < self.config.num_hidden_layers:
            raise IndexError(f"layer is {i}, expected 0 to {self.config.num_hidden_layers - 1}")
        per_layer = [name for name, template in self._names.items() if "{}" in template]
        weights = {name: self._array(name, i) for name in per_layer}
        if self.layout == "original":
            weights |= self._split_qkv(weights.pop("qkv_weight"), weights.pop("qkv_bias"))
        elif self.layout == "huggingface-bf16":
            weights |= self._encode_experts(i, gate_up=weights.pop("gate_up"), down=weights.pop("down"))
        return LayerWeights(**weights)

    def _split_qkv(self, weight: Array, bias: Array) -> dict[str, Array]:
        q = self.config.num_attention_heads * self.config.head_dim
        kv = self.config.num_key_value_heads * self.config.head_dim
        parts = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
        weights = {f"{part}_proj_weight": weight[rows] for part, rows in parts.items()}
        return weights | {f"{part}_proj_bias": bias[rows] for part, rows in parts.items()}

    def _encode_experts(self, i: int, **stored: Array) -> dict[str, Array]:
        """Encode bf16 experts (E, K, N), stored with the input dimension first, as MXFP4."""
        shapes = weight_shapes(self.config)
        result: dict[str, Array] = {}
        error = power = 0.0
        for name, experts in stored.items():
            blocks, scales = empty(shapes[f"{name}_blocks"]), empty(shapes[f"{name}_scales"])
            for e, expert in enumerate(experts):
                w = np.ascontiguousarray(expert.T)
                blocks[e], scales[e] = quantize_mxfp4(w)
                changed, total = squared_error(w, blocks[e], scales[e])
                error, power = error + changed, power + total
                self._shards.release(self._names[name].format(i))
            result |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        if i not in self._errors:
            self._errors[i] = (error, power)
            if len(self._errors) == self.config.num_hidden_layers:
                self._warn_of_rounding()
        return result

    def _warn_of_rounding(self) -> None:
        error, power = map(sum, zip(*self._errors.values(), strict=True))
        if error > 0:
            relative = math.sqrt(error / power)
            warnings.warn(
                f"{self.path}: the experts are stored as bf16 and were rounded to MXFP4, with a relative RMS "
                f"error of {relative:.2%}",
                stacklevel=4,
            )

    def release(self, layer: int | None = None, names: Iterable[str] | None = None) -> None:
        """Give back the resident pages of weights that are no longer read through this checkpoint.

        The views stay valid: a later use reads from the file again.

        Parameters
        ----------
        layer : int, optional
            The layer; None for the weights outside the layers.
        names : iterable of str, optional
            Which ones, by the names of `LayerWeights` (or ``"embed_tokens"``, ``"norm"``, ``"lm_head"``);
            all of them by default.

        Raises
        ------
        KeyError
            When a name is not known.
        """
        stored = {name for name, template in self._names.items() if ("{}" in template) == (layer is not None)}
        wanted = stored if names is None else {self._stored_name(name) for name in names}
        for name in wanted:
            if name not in stored:
                raise KeyError(f"no weight {name!r}, expected some of {sorted(stored)}")
            self._shards.release(self._names[name].format(layer))

    def _stored_name(self, name: str) -> str:
        """Return the stored weight from which `name` is taken."""
        if self.layout == "original" and name[:7] in ("q_proj_", "k_proj_", "v_proj_"):
            return f"qkv_{name[7:]}"
        if self.layout == "huggingface-bf16" and is_packed(name):
            return name.rsplit("_", 1)[0]
        return name


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))


def _detect_layout(shards: Shards) -> Layout:
    if "embedding.weight" in shards:
        return "original"
    experts = _HUGGING_FACE_BF16["gate_up"].format(0)
    return "huggingface-bf16" if experts in shards else "huggingface"
