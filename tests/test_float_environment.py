"""What a caller has done to its floating-point settings changes no bit, and is left as it was."""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
import torch

import c_library
import float_environment_calls as calls
import op_calls
from c_library import LIBRARY, OK, last_error
from compare import assert_exact
from mxmoe import _core, ops

# FE_UPWARD of <fenv.h>, by machine; the values are the ABI's.
UPWARD = {"x86_64": 0x800, "AMD64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}.get(platform.machine())
flushes = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="torch cannot flush subnormals here")
rounds = pytest.mark.skipif(UPWARD is None or os.name == "nt", reason="fesetround is not known here")


@contextmanager
def rounding_up() -> Iterator[None]:
    """Round upwards, as C programs ask for it."""
    assert UPWARD is not None
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    assert library.fesetround(UPWARD) == 0
    try:
        yield
        assert library.fegetround() == UPWARD, "the caller's rounding was not given back"
    finally:
        library.fesetround(0)


@pytest.fixture(scope="module")
def want() -> dict[str, str]:
    return calls.all_hashes()


def _has_subnormals(call: op_calls.Call) -> bool:
    floats = [array for array in call.result() if array.dtype in calls.FLOATS]
    return any(((a != 0) & (np.abs(a) < ml_dtypes.finfo(a.dtype).smallest_normal)).any() for a in floats)


# Codes, cosines and shares of experts are never subnormal, and AVX-512's bf16 dot products flush whatever is set.
NEVER = {"expert_offsets", "expert_routing", "mxfp4_quantize", "rope_cos_sin"}
ALWAYS_FLUSHED = {"sink_attention bf16", "sink_attention int8"}


def test_the_calls_make_subnormals(isa):
    """Else flushing would have nothing to change."""
    for name in c_library.NAMES:
        if name not in NEVER | ALWAYS_FLUSHED and not name.startswith(("pack_", "unpack_")):
            assert any(_has_subnormals(calls.make(name, case)) for case in calls.CASES), name


@flushes
@pytest.mark.parametrize("how", ["caller", "other thread", "replayed"])
def test_flushed_subnormals_change_nothing(how, want):
    done = subprocess.run(
        [sys.executable, calls.__file__, how],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["flushed"] == [True, True], "the flush was not on before, or not after"
    names = {key: value for key, value in want.items() if how != "replayed" or key in got["hashes"]}
    assert got["hashes"] == names and len(names) >= len(op_calls.NAMES)


@rounds
@pytest.mark.parametrize("name", c_library.NAMES)
def test_rounding_changes_nothing_in_c(name):
    results = []
    for upward in (False, True):
        call = c_library.make(name)
        # Numbers that are exact in float32, which ctypes would round as told.
        arguments = call.arrays | {"eps": 2.0**-17, "swiglu_alpha": 1.75} | call.options
        function = c_library.function_of(name)
        with rounding_up() if upward else calls.nothing():
            assert c_library.call(function, arguments) == OK, last_error()
        results.append([call.arrays[output] for output in call.outputs])
    for got, expected in zip(*results, strict=True):
        assert_exact(got, expected)


@rounds
def test_rounding_changes_no_table_in_c():
    tables = []
    for upward in (False, True):
        inv_freq, scaling = np.full(32, np.nan), ctypes.c_double()
        numbers = [ctypes.c_double(value) for value in (150000.0, 32.0, 32.0, 1.0)]
        arguments = (numbers[0], numbers[1], ctypes.c_int64(4096), *numbers[2:], ctypes.c_int(1))
        where = ctypes.byref(c_library.view(inv_freq)), ctypes.byref(scaling)
        with rounding_up() if upward else calls.nothing():
            assert LIBRARY.mxmoe_rope_inv_freq(ctypes.c_int64(64), *arguments, *where) == OK, last_error()
        tables.append(np.append(inv_freq, scaling.value))
    assert_exact(tables[1], tables[0])


@rounds
@pytest.mark.parametrize("name", op_calls.NAMES)
def test_rounding_changes_nothing_in_python(name, isa):
    """Python's numbers, 1e-5 for one, are made float32 as ever, too."""
    want = op_calls.make(name).result()
    call = op_calls.make(name)
    with rounding_up():
        call()
    for output, expected in zip(call.outputs, want, strict=True):
        assert_exact(call.arrays[output], expected)


@rounds
def test_rounding_changes_no_table_in_python():
    want = ops.rope_inv_freq(64, 150000.0, factor=32.0)
    with rounding_up():
        got = ops.rope_inv_freq(64, 150000.0, factor=32.0)
    assert_exact(got[0], want[0])
    assert got[1] == want[1]


@flushes
def test_a_failed_call_gives_the_settings_back():
    tiny = np.float32(2.0**-130)
    assert torch.set_flush_denormal(True)
    try:
        with pytest.raises(ValueError, match="eps"):
            ops.rmsnorm(np.ones((2, 4), np.float32), np.ones(4, np.float32), eps=-1.0)
        assert tiny * np.float32(0.5) == 0
    finally:
        torch.set_flush_denormal(False)
    assert tiny * np.float32(0.5) == np.float32(2.0**-131)


@flushes
def test_weights_are_scanned_alike():
    x = np.array([0x0001, 0x7F80], np.uint16).view(ml_dtypes.bfloat16)  # a subnormal, infinity
    torch.set_flush_denormal(True)
    try:
        assert _core.first_not_finite(x) == 1
    finally:
        torch.set_flush_denormal(False)
