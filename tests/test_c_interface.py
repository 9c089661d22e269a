"""The C interface gives the bits of Python's ops and its errors, sentence by sentence."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
import threading
import tomllib
from ctypes import byref, c_double, c_int
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import c_library
import mxmoe
from c_library import LIBRARY, OK, STATUS, TYPE_ERROR, VALUE_ERROR, last_error, number_of, text_of, view
from compare import assert_exact
from mxmoe import _core, ops

ROOT = Path(__file__).parents[1]
every_op = pytest.mark.parametrize("name", c_library.NAMES)
every_argument = pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in c_library.NAMES for argument in c_library.make(name).arrays]
)


@pytest.fixture(autouse=True)
def _default_isa():
    yield
    assert LIBRARY.mxmoe_set_isa(b"") == OK
    assert LIBRARY.mxmoe_set_num_threads(0) == OK


def run(name, call, **changes):
    return c_library.call(c_library.function_of(name), call.arrays | call.options | changes)


def both_reject(name, call, argument, value):
    """Python and C must refuse the value in the same words, and write nothing."""
    before = [call.arrays[o].tobytes() for o in call.outputs]
    with pytest.raises((TypeError, ValueError)) as raised:
        call(**{argument: value})
    status = run(name, call, **{argument: value})
    assert (status, last_error()) == (STATUS[raised.type], str(raised.value))
    assert [call.arrays[o].tobytes() for o in call.outputs] == before


# ---- Results


@every_op
def test_same_bits_as_python(name, isa):
    assert LIBRARY.mxmoe_set_isa(isa.encode()) == OK
    want, call = c_library.make(name).result(), c_library.make(name)
    for output in call.outputs:
        call.arrays[output].view(np.uint8)[...] = 0xA5
    if name.startswith("kv_cache_write"):  # which leaves the other slots as they are
        for output in call.outputs:
            call.arrays[output][...] = 0
    assert run(name, call) == OK, last_error()
    for output, expected in zip(call.outputs, want, strict=True):
        assert_exact(call.arrays[output], expected)


def test_rows_apart():
    memory = np.full((4, 10), np.nan, np.float32)
    x = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    weight, out = np.ones(6, np.float32), memory[:, :6]
    assert c_library.call("rmsnorm", {"x": x, "weight": weight, "out": out}) == OK, last_error()
    assert_exact(np.array(out), ops.rmsnorm(x, weight))
    assert np.isnan(memory[:, 6:]).all()


def test_in_place():
    x = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    want = ops.rmsnorm(x, np.ones(6, np.float32))
    assert c_library.call("rmsnorm", {"x": x, "weight": np.ones(6, np.float32), "out": x}) == OK, last_error()
    assert_exact(x, want)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("factor", [1.0, 32.0])
def test_rope_inv_freq(factor, truncate):
    inv_freq, scaling = np.full(32, np.nan), c_double()
    arguments = (c_double(150000.0), c_double(factor), ctypes.c_int64(4096), c_double(32.0), c_double(1.0))
    status = LIBRARY.mxmoe_rope_inv_freq(
        ctypes.c_int64(64), *arguments, c_int(truncate), byref(view(inv_freq)), byref(scaling)
    )
    assert status == OK, last_error()
    want, want_scaling = ops.rope_inv_freq(64, 150000.0, factor=factor, truncate=truncate)
    assert_exact(inv_freq, want)
    assert scaling.value == want_scaling


@pytest.mark.parametrize("head_dim", [7, 0, -2, 1 << 20])
def test_rope_inv_freq_of_no_such_head(head_dim):
    arguments = (c_double(150000.0), c_double(1.0), ctypes.c_int64(4096), c_double(32.0), c_double(1.0), c_int(0))
    status = LIBRARY.mxmoe_rope_inv_freq(
        ctypes.c_int64(head_dim), *arguments, byref(view(np.zeros(4))), byref(c_double())
    )
    with pytest.raises(ValueError) as raised:
        ops.rope_inv_freq(head_dim, 150000.0)
    assert (status, last_error()) == (VALUE_ERROR, str(raised.value))


def test_an_empty_array_may_have_no_memory():
    empty = view(np.zeros((0, 6), np.float32))
    empty.data = None
    assert c_library.call("rmsnorm", {"x": empty, "weight": np.ones(6, np.float32), "out": empty}) == OK, last_error()


# ---- Errors


@every_argument
def test_wrong_dtype(name, argument):
    call = c_library.make(name)
    source = call.arrays[argument]
    for dtype in {np.int64, np.float64} - {source.dtype.type}:
        both_reject(name, call, argument, np.ones(source.shape, dtype))


@every_argument
def test_wrong_shape(name, argument):
    call = c_library.make(name)
    source = call.arrays[argument]
    free = {("sink_attention", "block_table"): 1, ("embedding", "weight"): 0, ("expert_routing", "router_logits"): 1}
    for axis in set(range(source.ndim)) - {free.get((c_library.function_of(name), argument))}:
        both_reject(name, call, argument, np.concatenate([source, source], axis=axis))
    if source.ndim < 4:
        both_reject(name, call, argument, source[..., None])


@every_argument
def test_wrong_strides(name, argument):
    call = c_library.make(name)
    source = call.arrays[argument]
    apart = np.zeros((*source.shape[:-1], 2 * source.shape[-1]), source.dtype)[..., ::2]
    apart[...] = source
    both_reject(name, call, argument, apart)
    both_reject(name, call, argument, np.ascontiguousarray(source[::-1])[::-1])


@every_op
def test_one_address_written_twice(name):
    call = c_library.make(name)
    for argument in call.outputs:
        source = call.arrays[argument]
        if source.ndim > 1:
            both_reject(
                name, call, argument, np.lib.stride_tricks.as_strided(source, strides=(0, *source.strides[1:]))
            )


@every_argument
def test_misaligned(name, argument):
    call = c_library.make(name)
    source = call.arrays[argument]
    if source.dtype.itemsize > 1:
        raw = np.zeros(source.nbytes + 1, np.uint8)[1:].view(source.dtype).reshape(source.shape)
        both_reject(name, call, argument, raw)


@every_argument
def test_null(name, argument):
    call = c_library.make(name)
    no_data = view(call.arrays[argument])
    no_data.data = None
    assert run(name, call, **{argument: no_data}) == VALUE_ERROR
    assert re.fullmatch(rf"{argument} has shape \(.*\) but data is NULL", last_error())
    if argument in call.optional:
        assert run(name, call, **{argument: None}) == OK, last_error()
        return
    status, said = run(name, call, **{argument: None}), last_error()
    assert status != OK
    assert said == f"{argument} is NULL; wanted an array" or re.match(r".* (is|are) missing", said), said


@every_op
def test_outputs_share_no_memory_with_anything(name):
    for out in c_library.make(name).outputs:
        for other in c_library.make(name).arrays:
            call = c_library.make(name)
            a, b = call.arrays[out], call.arrays[other]
            if other == out or other in call.in_place:
                continue
            # Both in one piece of memory, each as aligned as its items want.
            memory = np.zeros(a.nbytes + b.nbytes + 64, np.uint8)
            call.arrays[other] = memory[: b.nbytes].view(b.dtype).reshape(b.shape)
            call.arrays[other][...] = b
            offset = (b.nbytes - 1) // 8 * 8
            both_reject(name, call, out, memory[offset : offset + a.nbytes].view(a.dtype).reshape(a.shape))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("rmsnorm", "eps", -1.0),
        ("rmsnorm", "eps", math.nan),
        ("expert_offsets", "num_experts", 0),
        ("expert_offsets", "num_experts", 3),
        ("mxfp4_moe_bf16", "swiglu_limit", 0.0),
        ("mxfp4_moe_bf16", "swiglu_alpha", math.inf),
        ("mxfp4_moe_bf16", "first_expert", -1),
        ("sink_attention bf16", "sliding_window", -1),
        ("sink_attention bf16", "sm_scale", math.nan),
        ("embedding", "token_ids", [1, 8, 0]),
        ("kv_cache_write", "slots", [5, -1, 2]),
    ],
)
def test_wrong_value(name, option, value):
    both_reject(name, c_library.make(name), option, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": 0}, "x has dtype 0; wanted float32, float64, bfloat16, int8, uint8, int32 or int64"),
        ({"dtype": 99}, "x has dtype 99; wanted"),
        ({"ndim": 0}, "x has no axes; wanted an array of at least one"),
        ({"ndim": -1}, "x has no axes; wanted"),
        ({"ndim": 5}, "x has 5 axes; wanted at most 4"),
        ({"shape": (4, -1)}, "x has a size of -1 on axis 1; wanted 0 or more"),
        ({"shape": (0, -(2**63))}, "x has a size of -9223372036854775808 on axis 1; wanted 0 or more"),
        ({"shape": (2**62, 2**62)}, "x would take more memory than can be addressed"),
        ({"shape": (0, 2**62)}, "x would take more memory than can be addressed"),
        ({"stride": (2**62, 1)}, "x would take more memory than can be addressed"),
        ({"stride": (-(2**63), 1)}, "x would take more memory than can be addressed"),
        ({"stride": (-6, 1)}, "x has a stride of -24 bytes on axis 0; wanted a non-negative multiple of 4"),
    ],
)
def test_wrong_description(change, says):
    call = c_library.make("rmsnorm")
    tensor = view(call.arrays["x"])
    for field, value in change.items():
        setattr(tensor, field, (ctypes.c_int64 * 4)(*value) if isinstance(value, tuple) else value)
    assert run("rmsnorm", call, x=tensor) != OK
    assert last_error().startswith(says)


@pytest.mark.parametrize("name", ["linear_bf16_bf16", "linear_group", "mxfp4_moe_bf16", "sink_attention bf16"])
def test_unknown_activations(name):
    assert run(name, c_library.make(name), activations=7) == VALUE_ERROR
    assert last_error() == "activations is 7; wanted 0 (float32), 1 (bf16) or 2 (int8)"


def test_missing_structs():
    call = c_library.make("mxfp4_moe_bf16")
    x, ids, shares = (byref(view(call.arrays[n])) for n in ("x", "topk_ids", "topk_weights"))
    limits = c_int(0), ctypes.c_float(1.7), ctypes.c_float(7), ctypes.c_int64(0)
    out = byref(view(call.arrays["out"]))
    assert LIBRARY.mxmoe_mxfp4_moe(x, ids, shares, None, *limits, None, out) == TYPE_ERROR
    assert last_error() == "weights is NULL; wanted a pointer"
    assert LIBRARY.mxmoe_kv_cache_write(x, x, None, ids) == TYPE_ERROR
    assert last_error() == "cache is NULL; wanted a pointer"
    assert LIBRARY.mxmoe_linear_group(x, None, ctypes.c_int64(2), c_int(0), out) == TYPE_ERROR
    assert last_error() == "layers is NULL; wanted a pointer"
    assert LIBRARY.mxmoe_linear_group(x, None, ctypes.c_int64(0), c_int(0), out) == VALUE_ERROR
    assert last_error() == "layers is empty; wanted at least one"
    assert LIBRARY.mxmoe_linear_group(x, None, ctypes.c_int64(-1), c_int(0), out) == VALUE_ERROR
    assert last_error() == "num_layers is -1; wanted 1 or more"
    assert LIBRARY.mxmoe_get_isa(None) == TYPE_ERROR
    assert last_error() == "name is NULL; wanted a pointer"


def test_errors_belong_to_their_thread():
    assert LIBRARY.mxmoe_set_num_threads(-1) == VALUE_ERROR
    here = last_error()
    assert here == "num_threads is -1; wanted 0 (the default) to 1024"
    said = []

    def elsewhere():
        said.append(last_error())
        LIBRARY.mxmoe_set_num_threads(-2)
        said.append(last_error())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == ["", "num_threads is -2; wanted 0 (the default) to 1024"]
    assert last_error() == here
    assert LIBRARY.mxmoe_set_num_threads(2) == OK
    assert last_error() == here  # of the last call that failed


def test_a_long_error_is_cut():
    assert LIBRARY.mxmoe_set_isa(b"x" * 5000) == VALUE_ERROR
    assert last_error().startswith("isa is 'xxx")
    assert len(last_error()) == 1023


# ---- Versions, threads, instruction sets


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert LIBRARY.mxmoe_version().decode() == project["version"]


def test_abi_version():
    header = (Path(mxmoe.get_include()) / "mxmoe.h").read_text()
    abi = int(re.search(r"#define MXMOE_ABI_VERSION (\d+)", header)[1])
    assert LIBRARY.mxmoe_check_abi(abi) == OK
    for other in (0, abi - 1, abi + 1):
        assert LIBRARY.mxmoe_check_abi(other) == VALUE_ERROR
        version = LIBRARY.mxmoe_version().decode()
        assert last_error() == f"abi_version is {other}; wanted {abi}, that of mxmoe {version}"


def test_num_threads():
    assert number_of("get_num_threads") == _core.hardware_threads()
    assert LIBRARY.mxmoe_set_num_threads(3) == OK
    assert number_of("get_num_threads") == 3
    assert _core.current_num_threads() == _core.hardware_threads()  # Python's are another's


def test_isa_names():
    levels = ["scalar", "avx2", "avxvnni", "avx512base", "avx512vnni", "avx512"]
    assert [name for name in levels if number_of("has_isa", name.encode())] == _core.available_isas()
    assert LIBRARY.mxmoe_has_isa(b"sse9", byref(c_int())) == VALUE_ERROR
    with pytest.raises(ValueError) as raised:
        _core.set_isa("sse9")
    assert last_error() == str(raised.value)
    assert text_of("get_isa") == os.environ.get("MXMOE_ISA", _core.available_isas()[-1])


@pytest.mark.parametrize("table", ["rmsnorm", "mxfp4_moe_int8", "mxfp4_moe_combine", "sink_attention_bf16"])
def test_the_forced_kernel_runs(isa, table):
    name = {"mxfp4_moe_combine": "mxfp4_moe_f32", "sink_attention_bf16": "sink_attention bf16"}.get(table, table)
    assert LIBRARY.mxmoe_set_isa(isa.encode()) == OK
    assert text_of("get_isa") == isa
    assert run(name, c_library.make(name)) == OK, last_error()
    index, _, rows = _core.kernels()[table]
    assert text_of("last_kernel", table.encode()) == rows[index][0]


def test_no_such_table():
    assert LIBRARY.mxmoe_last_kernel(b"softmax", byref(ctypes.c_char_p())) == VALUE_ERROR
    assert last_error().startswith("table is 'softmax'; wanted one of ")
    assert set(last_error().split("wanted one of ")[1].split(", ")) == {
        table for table in _core.kernels() if not table.startswith("ceilings_")
    }


def test_prefers_packed(isa):
    assert LIBRARY.mxmoe_set_isa(isa.encode()) == OK
    for activations, a in c_library.ACTIVATIONS.items():
        for weights, w in c_library.WEIGHTS.items():
            assert number_of("prefers_packed", a, w) == _core.prefers_packed(activations, weights)
    assert LIBRARY.mxmoe_prefers_packed(1, 3, byref(c_int())) == VALUE_ERROR
    assert last_error() == "weights is 3; wanted 0 (mxfp4), 1 (bf16) or 2 (int8)"


def test_packed_weights_beside_their_scales(isa):
    assert LIBRARY.mxmoe_set_isa(isa.encode()) == OK
    rng = np.random.default_rng(4)
    weight = rng.integers(-127, 128, (32, 96), dtype=np.int8)
    scales = rng.uniform(0.5, 2, (32, 3)).astype(ml_dtypes.bfloat16)
    buffer = np.zeros((2, 3, 544), np.uint8)
    packed, packed_scales = buffer[..., :512], buffer[..., 512:].view(ml_dtypes.bfloat16)
    panels = {"weight": weight, "scales": scales, "packed": packed, "packed_scales": packed_scales}
    assert c_library.call("pack_linear", panels) == OK, last_error()
    x, out = rng.standard_normal((3, 96), np.float32), np.full((3, 32), np.nan, np.float32)
    arguments = {"x": x, "weight": packed, "scales": packed_scales, "activations": "int8", "out": out}
    assert c_library.call("linear", arguments) == OK, last_error()
    assert_exact(out, ops.linear(x, weight, scales=scales, activations="int8"))


def test_closing_the_library_leaves_its_threads_standing():
    code = """
import _ctypes, ctypes, sys, time
library = ctypes.CDLL(sys.argv[1])
kernel = ctypes.c_char_p(b"none yet")
assert library.mxmoe_last_kernel(b"rmsnorm", ctypes.byref(kernel)) == 0 and kernel.value is None
class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("ndim", ctypes.c_int),
                ("shape", ctypes.c_int64 * 4), ("stride", ctypes.c_int64 * 4)]
values = (ctypes.c_float * (4096 * 64))(*[2.0] * (4096 * 64))
weight = (ctypes.c_float * 64)(*[1.0] * 64)
x = Tensor(ctypes.addressof(values), 1, 2, (4096, 64, 0, 0), (64, 1, 0, 0))
w = Tensor(ctypes.addressof(weight), 1, 1, (64, 0, 0, 0), (1, 0, 0, 0))
library.mxmoe_set_num_threads(3)
x_at = ctypes.byref(x)
assert library.mxmoe_rmsnorm(x_at, ctypes.byref(w), ctypes.c_float(0.0), x_at) == 0 and set(values) == {1.0}
assert library.mxmoe_last_kernel(b"rmsnorm", ctypes.byref(kernel)) == 0 and kernel.value.startswith(b"rmsnorm_")
_ctypes.dlclose(library._handle)
time.sleep(0.2)
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, mxmoe.get_library()], capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "alive\n", done.stderr
