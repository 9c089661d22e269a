"""One small valid call of every op, as data, for tests that treat all ops alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import attention_case
import moe_case
from mxmoe import _core, ops
from op_helpers import BF16, normal


@dataclass(frozen=True)
class Call:
    """A function with its arguments by name.

    `arrays` are taken as arrays only, `outputs` of them written; `optional` may be None; `options` are the rest.
    """

    function: Callable[..., Any]
    arrays: dict[str, Any]
    outputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()  # inputs that may be the output itself

    def __call__(self, **changes: Any) -> Any:
        return self.function(**(self.arrays | self.options | changes))

    def result(self) -> list[Any]:
        """What the outputs hold after the call."""
        self()
        return [self.arrays[name].copy() for name in self.outputs]


def _positional(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Let a function of `_core`, whose arguments carry other names there, be called by the names its errors use."""
    return lambda **kwargs: function(*(kwargs[name] for name in names))


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _floats(*shape: int, dtype: str = "float32") -> Any:
    return normal(_rng(), shape, dtype)


def _embedding() -> Call:
    arrays = {"weight": _floats(8, 6), "out": _floats(3, 6)}
    return Call(ops.embedding, arrays, ("out",), {"token_ids": [1, 7, 0]})


def _rmsnorm() -> Call:
    return Call(
        ops.rmsnorm, {"x": _floats(4, 6), "weight": _floats(6), "out": _floats(4, 6)}, ("out",), in_place=("x",)
    )


def _rope() -> Call:
    arrays = {"x": _floats(4, 3, 8), "cos": _floats(4, 4), "sin": _floats(4, 4), "out": _floats(4, 3, 8)}
    return Call(ops.rope, arrays, ("out",), in_place=("x",))


def _rope_cos_sin() -> Call:
    names = ("positions", "inv_freq", "scaling", "cos", "sin")
    arrays = {
        "positions": np.arange(5),
        "inv_freq": _floats(4).astype(np.float64),
        "cos": _floats(5, 4),
        "sin": _floats(5, 4),
    }
    return Call(_positional(_core.rope_cos_sin, *names), arrays, ("cos", "sin"), {"scaling": 1.0})


def _linear(weight_dtype: str, activations: str) -> Call:
    arrays = {"x": _floats(4, 64), "weight": _floats(5, 64, dtype="bfloat16")}
    if weight_dtype == "int8":
        arrays["weight"] = _rng().integers(-127, 128, (5, 64), dtype=np.int8)
        arrays["scales"] = np.abs(_floats(5, 2, dtype="bfloat16"))
    arrays |= {"bias": _floats(5), "residual": _floats(4, 5), "out": _floats(4, 5)}
    options = {"activations": activations}
    return Call(ops.linear, arrays, ("out",), options, ("bias", "residual"), ("residual",))


def _expert_routing() -> Call:
    names = ("router_logits", "topk_ids", "topk_weights")
    arrays = {
        "router_logits": _floats(4, 6),
        "topk_ids": np.zeros((4, 2), np.int32),
        "topk_weights": _floats(4, 2),
    }
    return Call(_positional(_core.expert_routing, *names), arrays, names[1:])


def _expert_offsets() -> Call:
    names = ("topk_ids", "num_experts", "expert_offsets", "order")
    arrays = {
        "topk_ids": _rng().integers(0, 5, (4, 2), dtype=np.int32),
        "expert_offsets": np.zeros(6, np.int32),
        "order": np.zeros(8, np.int32),
    }
    return Call(_positional(_core.expert_offsets, *names), arrays, names[2:], {"num_experts": 5})


def _mxfp4_moe(activations: str) -> Call:
    case = moe_case.make(4, 64, 96, 3, 2, residual=True)
    arrays = {"x": case.x, "topk_ids": case.topk_ids, "topk_weights": case.topk_weights, **case.weights}
    arrays |= {"residual": case.residual, "out": _floats(4, 64)}
    return Call(ops.mxfp4_moe, arrays, ("out",), {"activations": activations}, ("residual",), ("residual",))


def _kv_cache_write(dtype: Any) -> Call:
    arrays = {"k": _floats(3, 2, 16), "v": _floats(3, 2, 16)}
    caches = {name: np.zeros((2, 2, 4, 16), dtype) for name in ("k_cache", "v_cache")}
    if dtype is np.int8:
        caches |= {name: np.zeros((2, 2, 4), np.float32) for name in ("k_scales", "v_scales")}
    return Call(ops.kv_cache_write, arrays | caches, tuple(caches), {"slots": [5, 1, 2]})


def _sink_attention(kv_mode: str) -> Call:
    case = attention_case.make([(3, 20), (2, 5)], kv_dtype=kv_mode)
    arrays = {"q": case.q} | {k: v for k, v in case.kwargs.items() if isinstance(v, np.ndarray)}
    arrays |= {"sink_share": _floats(5, 4), "out": _floats(5, 4, 16)}
    options = {"sm_scale": 0.25, "sliding_window": 9, "activations": case.activations}
    return Call(ops.sink_attention, arrays, ("out", "sink_share"), options, ("sink_share",))


def _quantize(function: Callable[..., Any], outputs: dict[str, Any]) -> Call:
    return Call(_positional(function, "x", *outputs), {"x": _floats(4, 64)} | outputs, tuple(outputs))


def _mxfp4_dequantize() -> Call:
    names = ("blocks", "scales", "out")
    arrays = {
        "blocks": _rng().integers(0, 256, (4, 2, 16), dtype=np.uint8),
        "scales": _rng().integers(120, 130, (4, 2), dtype=np.uint8),
        "out": _floats(4, 64),
    }
    return Call(_positional(_core.mxfp4_dequantize, *names), arrays, ("out",))


# Measurements take no arrays; the tests of dispatch alone call them.
_MEASUREMENTS: dict[str, Callable[[], Call]] = {
    "ceilings_read": lambda: Call(lambda: _core.ReadBuffer(1 << 20).read_seconds(), {}, ()),
    "ceilings_int8": lambda: Call(lambda: _core.run_peak("int8", 1), {}, ()),
    "ceilings_bf16": lambda: Call(lambda: _core.run_peak("bf16", 1), {}, ()),
    "ceilings_float32": lambda: Call(lambda: _core.run_peak("float32", 1), {}, ()),
}
_CALLS: dict[str, Callable[[], Call]] = {
    "embedding": _embedding,
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "rope_cos_sin": _rope_cos_sin,
    "linear_f32_bf16": lambda: _linear("bfloat16", "float32"),
    "linear_bf16_bf16": lambda: _linear("bfloat16", "bf16"),
    "linear_f32_int8": lambda: _linear("int8", "float32"),
    "linear_bf16_int8": lambda: _linear("int8", "bf16"),
    "linear_int8_int8": lambda: _linear("int8", "int8"),
    "expert_routing": _expert_routing,
    "expert_offsets": _expert_offsets,
    "mxfp4_moe_f32": lambda: _mxfp4_moe("float32"),
    "mxfp4_moe_bf16": lambda: _mxfp4_moe("bf16"),
    "mxfp4_moe_int8": lambda: _mxfp4_moe("int8"),
    "kv_cache_write": lambda: _kv_cache_write(np.float32),
    "kv_cache_write int8": lambda: _kv_cache_write(np.int8),
    "sink_attention f32": lambda: _sink_attention("bfloat16"),
    "sink_attention bf16": lambda: _sink_attention("bfloat16/bf16"),
    "sink_attention int8": lambda: _sink_attention("int8/bf16"),
    "mxfp4_dequantize": _mxfp4_dequantize,
    "mxfp4_quantize": lambda: _quantize(
        _core.mxfp4_quantize, {"blocks": np.zeros((4, 2, 16), np.uint8), "scales": np.zeros((4, 2), np.uint8)}
    ),
    "int8_quantize": lambda: _quantize(
        _core.int8_quantize, {"codes": np.zeros((4, 64), np.int8), "scales": np.zeros((4, 2), BF16)}
    ),
}
NAMES = list(_CALLS)


def make(name: str) -> Call:
    """Make the call of that name; its arrays are its own."""
    call = (_CALLS | _MEASUREMENTS)[name]()
    return replace(call, arrays={key: np.array(array) for key, array in call.arrays.items()})
