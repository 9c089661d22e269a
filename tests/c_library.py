"""The C interface seen through ctypes, called by the names that the calls of `op_calls` use."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import replace
from typing import Any

import numpy as np

import mxmoe
import op_calls
from mxmoe import _core
from op_helpers import BF16, normal

OK, TYPE_ERROR, VALUE_ERROR = 0, 1, 2
STATUS = {TypeError: TYPE_ERROR, ValueError: VALUE_ERROR}
MAX_DIMS = 4
DTYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.float64): 2,
    BF16: 3,
    np.dtype(np.int8): 4,
    np.dtype(np.uint8): 5,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
}
ACTIVATIONS = {"float32": 0, "bf16": 1, "int8": 2}
WEIGHTS = {"mxfp4": 0, "bf16": 1, "int8": 2}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int),
        ("ndim", c_int),
        ("shape", c_int64 * MAX_DIMS),
        ("stride", c_int64 * MAX_DIMS),
    )


def view(array: Any) -> Tensor:
    """Describe a NumPy array of at most four axes, whatever its strides."""
    assert all(stride % array.itemsize == 0 for stride in array.strides)
    strides = [stride // array.itemsize for stride in array.strides]
    sizes = (c_int64 * MAX_DIMS)(*array.shape), (c_int64 * MAX_DIMS)(*strides)
    return Tensor(array.ctypes.data, DTYPES[array.dtype], array.ndim, *sizes)


def struct_of(*fields: str) -> type[ctypes.Structure]:
    return type("Struct", (ctypes.Structure,), {"_fields_": [(field, POINTER(Tensor)) for field in fields]})


MOE_WEIGHTS = struct_of("gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias")
KV_CACHE = struct_of("k_cache", "v_cache", "k_scales", "v_scales")
BATCH = struct_of("block_table", "cu_seqlens", "seq_lens", "key_starts")
LINEAR_WEIGHTS = struct_of("weight", "scales", "bias")

# By function: its arguments in order. A name alone is an array; a number has its type and default.
Number = tuple[str, Any, Any]
SIGNATURES: dict[str, tuple[str | type[ctypes.Structure] | Number, ...]] = {
    "embedding": ("token_ids", "weight", "out"),
    "rmsnorm": ("x", "weight", ("eps", c_float, 1e-5), "out"),
    "rope_cos_sin": ("positions", "inv_freq", ("scaling", c_double, 1.0), "cos", "sin"),
    "rope": ("x", "cos", "sin", "out"),
    "linear": ("x", "weight", "scales", "bias", ("activations", c_int, 1), "residual", "out"),
    "linear_group": ("x", LINEAR_WEIGHTS, ("num_layers", c_int64, 1), ("activations", c_int, 1), "out"),
    "expert_routing": ("router_logits", "topk_ids", "topk_weights"),
    "expert_offsets": ("topk_ids", ("num_experts", c_int64, 0), "expert_offsets", "order"),
    "mxfp4_moe": (
        "x",
        "topk_ids",
        "topk_weights",
        MOE_WEIGHTS,
        ("activations", c_int, 1),
        ("swiglu_alpha", c_float, 1.702),
        ("swiglu_limit", c_float, 7.0),
        ("first_expert", c_int64, 0),
        "residual",
        "out",
    ),
    "kv_cache_write": ("k", "v", KV_CACHE, "slots"),
    "sink_attention": (
        "q",
        KV_CACHE,
        "sinks",
        BATCH,
        ("sm_scale", c_float, 0.0),
        ("sliding_window", c_int64, 0),
        ("activations", c_int, 1),
        "sink_share",
        "out",
    ),
    "mxfp4_dequantize": ("blocks", "scales", "out"),
    "mxfp4_quantize": ("x", "blocks", "scales"),
    "int8_quantize": ("x", "codes", "scales"),
    "pack_mxfp4": ("blocks", "scales", "packed", "packed_scales"),
    "unpack_mxfp4": ("packed", "packed_scales", "blocks", "scales"),
    "pack_linear": ("weight", "scales", "packed", "packed_scales"),
    "unpack_linear": ("packed", "packed_scales", "weight", "scales"),
}


def load() -> ctypes.CDLL:
    library = ctypes.CDLL(mxmoe.get_library())
    library.mxmoe_last_error.restype = library.mxmoe_version.restype = c_char_p
    return library


LIBRARY = load()


def last_error() -> str:
    return str(LIBRARY.mxmoe_last_error().decode())


def text_of(function: str, *arguments: Any) -> str | None:
    """Call a function whose last argument is where it puts a name."""
    name = c_char_p()
    assert getattr(LIBRARY, f"mxmoe_{function}")(*arguments, byref(name)) == OK, last_error()
    return None if name.value is None else name.value.decode()


def number_of(function: str, *arguments: Any) -> int:
    number = c_int(-1)
    assert getattr(LIBRARY, f"mxmoe_{function}")(*arguments, byref(number)) == OK, last_error()
    return number.value


def function_of(name: str) -> str:
    """The C function behind a call of `op_calls`: the longest name of one that begins it."""
    return max((f for f in SIGNATURES if name.startswith(f)), key=len)


def call(function: str, arguments: dict[str, Any]) -> int:
    """Call by argument names; arrays are NumPy arrays, a `Tensor` as it is to be passed, or missing (NULL)."""
    held: list[Any] = []  # what the pointers point to

    def pointer(name: str) -> Any:
        value = arguments.get(name)
        if value is None:
            return None
        if isinstance(value, list):
            value = np.array(value, np.int64)
        held.append(value)
        held.append(value if isinstance(value, Tensor) else view(value))
        return ctypes.pointer(held[-1])

    def convert(item: Any) -> Any:
        if isinstance(item, str):
            return pointer(item)
        if isinstance(item, type):
            held.append(item(**{field: pointer(field) for field, _ in item._fields_}))
            return byref(held[-1])
        name, ctype, default = item
        value = arguments.get(name, default)
        return ctype(ACTIVATIONS.get(value, value) if name == "activations" else value)

    return int(getattr(LIBRARY, f"mxmoe_{function}")(*map(convert, SIGNATURES[function])))


def _positional(function: Any, *names: str) -> Any:
    return lambda **kwargs: function(*(kwargs.get(name) for name in names))


def _linear_group() -> op_calls.Call:
    one = op_calls.make("linear_int8_int8")
    arrays = {name: one.arrays[name] for name in ("x", "weight", "scales", "bias", "out")}

    def function(x: Any, weight: Any, scales: Any, bias: Any, out: Any, activations: str) -> None:
        _core.linear_group(x, [[weight, scales, bias]], activations, out)

    return op_calls.Call(function, arrays, ("out",), {"activations": "int8"}, ("bias",))


def _packing(function: str, weight_dtype: str) -> op_calls.Call:
    rng = np.random.default_rng(3)
    panels = {
        "mxfp4": {
            "blocks": rng.integers(0, 256, (32, 3, 16), dtype=np.uint8),
            "scales": rng.integers(0, 255, (32, 3), dtype=np.uint8),
            "packed": rng.integers(0, 256, (2, 3, 256), dtype=np.uint8),
            "packed_scales": rng.integers(0, 255, (2, 3, 16), dtype=np.uint8),
        },
        "int8": {
            "weight": rng.integers(-127, 128, (32, 96), dtype=np.int8),
            "scales": normal(rng, (32, 3), "bfloat16"),
            "packed": rng.integers(0, 256, (2, 3, 512), dtype=np.uint8),
            "packed_scales": normal(rng, (2, 3, 16), "bfloat16"),
        },
        "bf16": {
            "weight": normal(rng, (32, 96), "bfloat16"),
            "packed": normal(rng, (2, 3, 512), "bfloat16"),
        },
    }
    arrays = panels[weight_dtype]
    signature = [str(name) for name in SIGNATURES[function]]
    outputs = tuple(name for name in signature[2:] if name in arrays)
    return op_calls.Call(_positional(getattr(_core, function), *signature), arrays, outputs)


_MORE = {
    "linear_group": _linear_group,
    "pack_mxfp4": lambda: _packing("pack_mxfp4", "mxfp4"),
    "unpack_mxfp4": lambda: _packing("unpack_mxfp4", "mxfp4"),
    "pack_linear int8": lambda: _packing("pack_linear", "int8"),
    "unpack_linear int8": lambda: _packing("unpack_linear", "int8"),
    "pack_linear bf16": lambda: _packing("pack_linear", "bf16"),
    "unpack_linear bf16": lambda: _packing("unpack_linear", "bf16"),
}
NAMES = [*op_calls.NAMES, *_MORE]


def make(name: str) -> op_calls.Call:
    """Make a call of `op_calls`, or one of those it lacks."""
    if name not in _MORE:
        return op_calls.make(name)
    made = _MORE[name]()
    return replace(made, arrays={key: np.array(array) for key, array in made.arrays.items()})
