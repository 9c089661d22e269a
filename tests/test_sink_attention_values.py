"""sink_attention with scales and codes of any size, and with what is no number."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

from attention_case import KV_MODES, check_attention, make
from compare import assert_exact
from mxmoe.reference import ops as reference


def break_at(stored, at, broken):
    """Put a NaN or an infinity at a position: in the values, or in the scale of an int8 cache."""
    array = stored.values if stored.scales is None else stored.scales
    array[at] = broken


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16/bf16", "int8/bf16"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("heads", [(4, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("at", [0, 20, 64, 99])
def test_a_broken_key_is_felt_where_it_is_seen_and_nowhere_else(isa, broken, heads, window, at, kv_dtype):
    case = make([(100, 100)], heads, kv_dtype=kv_dtype, window=window)
    want = case.run()
    position = np.arange(100)
    seen = (position >= at) & (position - at < (window or 200))
    for (stored,) in (case.keys, case.values):
        kept = deepcopy(stored)
        break_at(stored, at, broken)
        got = case.run()
        assert_exact(got[~seen], want[~seen])
        if np.isnan(broken):
            assert np.isnan(got[seen]).all()
        stored.values, stored.scales = kept.values, kept.scales


@pytest.mark.parametrize("kv_dtype", KV_MODES)
@pytest.mark.parametrize("sm_scale", [-0.3, 0.0, 1e-30, -1e-38, 3.0])
def test_any_sm_scale(isa, sm_scale, kv_dtype):
    case = replace(make([(5, 90)], (8, 2), 64, kv_dtype, window=70), sm_scale=sm_scale)
    check_attention(case.run(), case)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("kv_dtype", ["int8", "int8/bf16"])
def test_codes_at_their_ends(isa, kv_dtype, code, head_dim):
    case = replace(make([(3, 200)], (8, 1), head_dim, kv_dtype), sm_scale=1e-4)
    case.q[...] = np.where(np.arange(8) % 2, 1, -1)[:, None]
    for (stored,) in (case.keys, case.values):
        stored.values[...] = code
    check_attention(case.run(), case)


@pytest.mark.parametrize("kv_dtype", ["int8", "int8/bf16"])
@pytest.mark.parametrize("window", [None, 33])
def test_scales_far_apart(isa, window, kv_dtype):
    case = make([(70, 300)], (4, 1), 64, kv_dtype, window=window)
    rng = np.random.default_rng(1)
    scales = case.values[0].scales
    scales *= np.float32(10) ** rng.integers(-12, 12, len(scales))[:, None]
    scales[::5] = 0
    scales[::15] = -0.0
    check_attention(case.run(), case)
    scales[...] = 0
    assert not case.run().any()


@pytest.mark.parametrize("kv_dtype", ["int8", "int8/bf16"])
def test_a_negative_scale_is_taken_or_makes_nan(isa, kv_dtype):
    case = make([(70, 100)], (4, 1), 64, kv_dtype)
    case.values[0].scales[50] *= -1
    got = case.run()
    nan = np.isnan(got)
    assert (nan[20:] == nan[20:].any()).all() and not nan[:20].any()
    check_attention(np.where(nan, case.run(reference.sink_attention), got).astype(np.float32), case)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16/bf16"])
def test_a_broken_query_stays_alone(isa, kv_dtype):
    case = make([(40, 40)], kv_dtype=kv_dtype)
    want = case.run()
    case.q[20, 1, 3] = np.nan
    got = case.run()
    assert np.isnan(got[20, 1]).all()
    got[20, 1] = want[20, 1]
    assert_exact(got, want)
