"""The oracle's attention against formulas written a second time, and on caches of every kind."""

from __future__ import annotations

import numpy as np
import pytest

from mxmoe.reference import ops
from reference_cases import BF16, Batch, same

SHAPES = [
    ([1], [1]),
    ([9], [9]),
    ([20], [3]),
    ([8, 16, 17], [1, 16, 5]),
    ([3, 30, 1], [0, 7, 1]),
]


@pytest.mark.parametrize(("lens", "new"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 4, 8, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_attention(lens, new, window, heads, kv_heads):
    batch = Batch(lens, new, heads=heads, kv_heads=kv_heads)
    want, want_share = batch.want(window)
    share = np.full((sum(new), heads), np.nan)
    same(batch.run(window, sink_share=share), want)
    same(share, want_share)


def test_attention_with_a_bfloat16_and_an_int8_cache():
    for dtype in (BF16, np.int8):
        batch = Batch([20, 9], [4, 9], dtype=dtype)
        plain = Batch([20, 9], [4, 9])
        got = batch.run(5)
        # The same values, read back from the cache, through dense attention.
        for b, n in enumerate(batch.lens.tolist()):
            page, place = np.divmod(np.arange(n), 8)
            at = batch.table[b, page], slice(None), place
            for rows, cache, scales in (
                (batch.k, batch.k_cache, "k_scales"),
                (batch.v, batch.v_cache, "v_scales"),
            ):
                stored = cache[at].astype(np.float64)
                stored *= batch.scales[scales][at].astype(np.float64)[..., None] if batch.scales else 1
                np.testing.assert_allclose(stored, rows[b], rtol=2**-8, atol=np.abs(rows[b]).max() / 250)
                rows[b] = stored
        same(got, batch.want(5)[0])
        assert np.abs(got - plain.run(5)).max() > 1e-4, "the cache was not rounded"


def test_int8_cache_scales_and_zero_rows():
    k_cache, v_cache = np.zeros((2, 1, 4, 16), np.int8), np.zeros((2, 1, 4, 16), np.int8)
    scales = np.full((2, 1, 4), np.nan, np.float32), np.full((2, 1, 4), np.nan, np.float32)
    k = np.zeros((2, 1, 16), np.float32)
    k[1, 0, :3] = [-12.7, 6.38, 0.04]
    ops.kv_cache_write(k, k * 2, k_cache, v_cache, [1, 6], k_scales=scales[0], v_scales=scales[1])
    assert k_cache[1, 0, 2, :3].tolist() == [-127, 64, 0]
    assert scales[0][1, 0, 2] == np.float32(np.float64(np.float32(12.7)) / 127)
    assert scales[0][0, 0, 1] == 0
    assert (k_cache[0] == 0).all()
    assert np.isnan(scales[1]).sum() == 6


def test_attention_at_extremes():
    batch = Batch([5], [5])
    for sinks in (np.full(4, 1e4), np.full(4, -1e4)):
        same(batch.run(sinks=sinks), batch.want(sinks=sinks)[0])
    assert np.abs(batch.run(sinks=np.full(4, 1e4))).max() == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"sinks": np.full(4, -np.inf)},
        {"sinks": np.zeros(4)},
        {"window": 5},
        {"window": 3},
        {"window": None},
        {"sm_scale": 1.0},
        {"seq_lens": np.array([19], np.int32)},
    ],
    ids=["sink dropped", "sink zero", "window + 1", "window - 1", "no window", "unscaled", "one key behind"],
)
def test_attention_mistakes_are_seen(wrong):
    batch = Batch([20], [6])
    same(batch.run(4), batch.want(4)[0])
    with pytest.raises(AssertionError):
        same(batch.run(**({"window": 4} | wrong)), batch.want(4)[0])
