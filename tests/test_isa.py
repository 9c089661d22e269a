"""The instruction set that is asked for is the one that runs, and what cannot run is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import moe_case
import op_calls
from compare import assert_exact
from mxmoe import _core, doctor, ops, packing
from op_helpers import normal

LEVELS = ["scalar", "avx2", "avxvnni", "avx512base", "avx512vnni", "avx512"]
AVAILABLE = _core.available_isas()
HAS_DOT = all(feature in _core.cpu_features() for feature in ("AVX-512 VNNI", "AVX-512 BF16"))
HAS_FAST_BF16 = "BF16 products faster" in _core.cpu_features()
# Matrix products by vdpbf16ps, and the peak they are measured against, are for where it is the faster way. Else those
# of weights in few bits are products of integers.
AS_INTEGERS = {"linear_bf16_int8", "mxfp4_moe_bf16", "ceilings_bf16"}
BY_FAST_BF16 = {"linear_bf16_bf16"} | AS_INTEGERS

# The levels of VNNI have products of integers of their own, and the kernels of those without it else.
BY_VNNI = {"linear_int8_int8", "mxfp4_moe_int8", "ceilings_int8"} | AS_INTEGERS
WITHOUT_VNNI = {"avxvnni": "avx2", "avx512vnni": "avx512base"}

# Table -> the call of op_calls that uses it, and the ending of its kernels' names where it is not the level's own.
TABLES = {
    "rmsnorm": ("rmsnorm", "rmsnorm", {}),
    "rope": ("rope", "rope", {}),
    "linear_f32_bf16": ("linear_f32_bf16", "linear_f32_bf16", {}),
    "linear_bf16_bf16": ("linear_bf16_bf16", "linear_bf16_bf16", {"avx512": "avx512bf16"}),
    "linear_f32_int8": ("linear_f32_int8", "linear_f32_int8", {}),
    "linear_bf16_int8": ("linear_bf16_int8", "linear_bf16_int8", {"avx512": "avx512bf16"}),
    "linear_int8_int8": ("linear_int8_int8", "linear_int8_int8", {"avx512": "avx512vnni"}),
    "expert_routing": ("expert_routing", "expert_routing", {}),
    "mxfp4_moe_f32": ("mxfp4_moe_f32", "mxfp4_moe_f32_mxfp4", {}),
    "mxfp4_moe_bf16": ("mxfp4_moe_bf16", "mxfp4_moe_bf16_mxfp4", {"avx512": "avx512bf16"}),
    "mxfp4_moe_int8": ("mxfp4_moe_int8", "mxfp4_moe_int8_mxfp4", {"avx512": "avx512vnni"}),
    "mxfp4_moe_combine": ("mxfp4_moe_f32", "combine", {}),
    "kv_cache_write": ("kv_cache_write", "kv_cache_write", {}),
    "sink_attention_f32": ("sink_attention f32", "sink_attention_f32", {}),
    "sink_attention_bf16": ("sink_attention bf16", "sink_attention_bf16", {"avx512": "avx512bf16"}),
    "ceilings_read": ("ceilings_read", "read", {}),
    "ceilings_int8": ("ceilings_int8", "peak_int8", {"avx512": "avx512vnni"}),
    "ceilings_bf16": (
        "ceilings_bf16",
        "peak_bf16",
        {level: f"as_int16_{level}" for level in ("avx2", "avxvnni", "avx512base", "avx512vnni")}
        | {"scalar": "as_float32_scalar", "avx512": "avx512bf16"},
    ),
    "ceilings_float32": ("ceilings_float32", "peak_float32", {}),
}


def expected_kernel(table, level):
    _, prefix, endings = TABLES[table]
    has_vnni = "avx512vnni" in AVAILABLE
    if level == "avx512" and table in BY_VNNI - AS_INTEGERS:
        level = level if has_vnni else "avx512base"
    elif level == "avx512" and not (HAS_DOT and (HAS_FAST_BF16 or table not in BY_FAST_BF16)):
        level = "avx512vnni" if has_vnni and table in AS_INTEGERS else "avx512base"
    level = level if table in BY_VNNI else WITHOUT_VNNI.get(level, level)
    return f"{prefix}_{endings.get(level, level).replace('avx512base', 'avx512')}"


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_table_is_known():
    assert set(_core.kernels()) == set(TABLES)
    assert [level for level in LEVELS if level in AVAILABLE] == AVAILABLE
    assert AVAILABLE[0] == "scalar"


@pytest.mark.parametrize("table", TABLES)
def test_the_forced_kernel_is_the_one_that_ran(isa, table):
    others = [level for level in AVAILABLE if level != isa]
    if others:  # something else ran last
        with ops.isa(others[0]):
            op_calls.make(TABLES[table][0])()
    op_calls.make(TABLES[table][0])()
    index, last, rows = _core.kernels()[table]
    assert last == expected_kernel(table, isa)
    assert rows[index] == (last, "")
    assert all(missing for _, missing in rows[:index])  # none better would have run


def _linear_by_int8(num_tokens: int, packed: bool, activations: str) -> Any:
    rng = np.random.default_rng(1)
    x = normal(rng, (num_tokens, 96), "bfloat16")
    weight = rng.integers(-127, 128, (80, 96), dtype=np.int8)
    scales = np.abs(normal(rng, (80, 3), "bfloat16"))
    if packed:
        weight, scales = packing.pack_linear(weight, scales)
    return ops.linear(x, weight, scales=scales, activations=activations)


def _moe(num_tokens: int, packed: bool, activations: str) -> Any:
    case = moe_case.make(num_tokens, 96, 64, 2, 1)  # about half of the tokens for each expert
    if packed:
        for name in ("gate_up", "down"):
            blocks, scales = packing.pack_mxfp4(case.weights[f"{name}_blocks"], case.weights[f"{name}_scales"])
            case = case.with_weights(**{f"{name}_blocks": blocks, f"{name}_scales": scales})
    return case.run(activations)


@pytest.mark.skipif("avxvnni" not in AVAILABLE, reason="this CPU has no AVX-VNNI")
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 150])  # one; few; and many, whose weights are decoded once for all
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize("op", [_linear_by_int8, _moe])
def test_dot_products_give_the_bits_of_avx2(op, activations, packed, num_tokens):
    results = []
    for level in ("avx2", "avxvnni"):
        with ops.isa(level):
            results.append(op(num_tokens, packed, activations))
    assert_exact(*results)


def test_scalar_allows_nothing_else():
    with ops.isa("scalar"):
        for index, _, rows in _core.kernels().values():
            assert index == len(rows) - 1
            assert [missing == "" for _, missing in rows] == [False] * index + [True]


def test_the_best_level_is_the_default():
    done = run_python("from mxmoe import _core; print(_core.active_isa())", MXMOE_ISA="")
    assert done.stdout.split() == [AVAILABLE[-1]], done.stderr


def test_levels_nest_and_return():
    before = _core.active_isa()
    with ops.isa("scalar"):
        with ops.isa(AVAILABLE[-1]):
            assert _core.active_isa() == AVAILABLE[-1]
        assert _core.active_isa() == "scalar"
        with pytest.raises(ZeroDivisionError), ops.isa(AVAILABLE[-1]):
            raise ZeroDivisionError
        assert _core.active_isa() == "scalar"
    assert _core.active_isa() == before


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512 ", "neon\n"])
def test_unknown_levels(name):
    before = _core.active_isa()
    with (
        pytest.raises(ValueError, match=f"isa is '{name}'; wanted one of {', '.join(LEVELS)}"),
        ops.isa(name),
    ):
        raise AssertionError("ran under an unknown instruction set")
    assert _core.active_isa() == before


def test_no_level():
    with pytest.raises(ValueError, match="isa is empty; wanted the name of an instruction set"), ops.isa(""):
        raise AssertionError("ran under no instruction set")
    with pytest.raises((TypeError, ValueError)), ops.isa(None):
        raise AssertionError("ran under no instruction set")


@pytest.mark.parametrize("level", [level for level in LEVELS if level not in AVAILABLE] or [None])
def test_levels_that_this_machine_lacks(level):
    if level is None:
        pytest.skip("this machine has every instruction set")
    with pytest.raises(ValueError, match=f"isa asks for '{level}', but this CPU lacks AVX"), ops.isa(level):
        raise AssertionError("ran under an instruction set that is not there")
    done = run_python("from mxmoe import _core; _core.active_isa()", MXMOE_ISA=level)
    assert done.returncode != 0 and f"MXMOE_ISA asks for '{level}', but this CPU lacks" in done.stderr


RUN_ONE = """
import numpy as np
from mxmoe import _core, ops
ops.rmsnorm(np.ones((2, 8), np.float32), np.ones(8, np.float32))
print(_core.active_isa(), _core.kernels()["rmsnorm"][1])
"""


@pytest.mark.parametrize("level", AVAILABLE)
def test_environment_variable(level):
    done = run_python(RUN_ONE, MXMOE_ISA=level)
    assert done.stdout.split() == [level, expected_kernel("rmsnorm", level)], done.stderr


def test_environment_variable_of_nonsense():
    done = run_python(RUN_ONE, MXMOE_ISA="fastest")
    assert done.returncode != 0 and done.stdout == ""
    assert f"ValueError: MXMOE_ISA is 'fastest'; wanted one of {', '.join(LEVELS)}" in done.stderr


def test_doctor_names_the_kernels_that_run(isa):
    report = {choice.op: choice.kernel for choice in doctor().kernels}
    assert report == {table: expected_kernel(table, isa) for table in TABLES}
    assert doctor().isa == isa
