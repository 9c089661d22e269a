"""rope, kv_cache_write and both in one on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from mxmoe import cuda, ops
from mxmoe.reference import ops as reference
from op_helpers import BF16, FLOATS, normal


def tables(max_positions, head_dim):
    inv_freq, scaling = ops.rope_inv_freq(head_dim, 150000.0, factor=32.0)
    return ops.rope_cos_sin(np.arange(max_positions), inv_freq, scaling)


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 6), (2, 9, 64), (5, 4, 96), (1, 64, 64)])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("y_dtype", FLOATS)
def test_rope_matches_float64(gpu, shape, x_dtype, y_dtype):
    x = normal(np.random.default_rng(0), shape, x_dtype)
    cos, sin = tables(100, shape[2])
    at = np.random.default_rng(1).integers(0, 100, shape[0])
    out = poisoned_up(shape, FLOATS[y_dtype])
    ops.rope(up(x), up(cos[at]), up(sin[at]), out=out)
    baseline = ops.rope(x, cos[at], sin[at], out=np.empty(shape, FLOATS[y_dtype]))
    assert_close(down(out), reference.rope(x, cos[at], sin[at]), baseline=baseline, dtype=y_dtype)


def test_rope_in_place(gpu):
    x = normal(np.random.default_rng(0), (3, 5, 16))
    cos, sin = tables(3, 16)
    want = down(ops.rope(up(x), up(cos), up(sin)))
    own = up(x)
    ops.rope(own, up(cos), up(sin), out=own)
    assert_exact(down(own), want)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize(("heads", "block_size", "head_dim"), [(1, 1, 1), (2, 3, 5), (8, 16, 64), (3, 7, 130)])
def test_kv_cache_write(gpu, x_dtype, cache_dtype, heads, block_size, head_dim):
    rng = np.random.default_rng(0)
    k, v = (normal(rng, (4, heads, head_dim), x_dtype) for _ in range(2))
    slots = rng.permutation(6 * block_size)[:4]
    k_cache, v_cache = (np.full((6, heads, block_size, head_dim), np.nan, FLOATS[cache_dtype]) for _ in range(2))
    got = up(k_cache), up(v_cache)
    ops.kv_cache_write(up(k), up(v), *got, slots)
    reference.kv_cache_write(k, v, k_cache, v_cache, slots)
    assert_exact(down(got[0]), k_cache)
    assert_exact(down(got[1]), v_cache)


def test_slots_out_of_range_write_nothing(gpu):
    caches = [up(np.full((2, 1, 4, 8), np.nan, np.float32)) for _ in range(2)]
    rows = up(np.zeros((3, 1, 8), np.float32))
    cuda.kv_cache_write(rows, rows, *caches, [-1, 8, 2**40])
    assert all(np.isnan(down(cache)).all() for cache in caches)


def fused_case(heads=(6, 2), head_dim=32, tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    features = (heads[0] + 2 * heads[1]) * head_dim
    return normal(rng, (tokens, features)), normal(rng, (features,), "bfloat16"), rng


def by_parts(qkv, bias, cos, sin, positions, heads, head_dim):
    x = qkv.astype(np.float64) + (0 if bias is None else bias.astype(np.float64))
    q, k, v = np.split(x.reshape(len(x), -1, head_dim), [heads[0], heads[0] + heads[1]], axis=1)
    rotate = lambda a: reference.rope(a, cos[positions], sin[positions])  # noqa: E731
    return rotate(q), rotate(k), v


@pytest.mark.parametrize("q_dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 32), ((1, 1), 2), ((5, 5), 6), ((64, 8), 64)])
def test_rope_kv_write_is_its_parts(gpu, q_dtype, cache_dtype, bias_dtype, heads, head_dim):
    qkv, bias, rng = fused_case(heads, head_dim)
    bias = None if bias_dtype is None else bias.astype(FLOATS[bias_dtype])
    cos, sin = tables(50, head_dim)
    positions, slots = rng.integers(0, 50, 5), rng.permutation(12)[:5]
    caches = [np.full((3, heads[1], 4, head_dim), np.nan, FLOATS[cache_dtype]) for _ in range(2)]
    held = [up(cache) for cache in caches]
    out = poisoned_up((5, heads[0], head_dim), FLOATS[q_dtype])
    cuda.rope_kv_write(
        up(qkv), None if bias is None else up(bias), up(cos), up(sin), positions, slots, *held, out=out
    )
    q, k, v = by_parts(qkv, bias, cos, sin, positions, heads, head_dim)
    scale = np.abs(qkv).max()
    assert_close(down(out), q, dtype=q_dtype, scale=scale)
    block, place = np.divmod(slots, 4)
    for cache, rows in zip(held, (k, v), strict=True):
        got = down(cache)
        assert_close(got[block, :, place], rows, dtype=cache_dtype, scale=scale)
        got[block, :, place] = np.nan
        assert np.isnan(got.astype(np.float32)).all()


@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_rope_kv_write_has_the_bits_of_its_parts(gpu, cache_dtype):
    qkv, bias, rng = fused_case(tokens=7)
    cos, sin = tables(50, 32)
    positions, slots = rng.integers(0, 50, 7), rng.permutation(12)[:7]
    held, others = ([poisoned_up((3, 2, 4, 32), FLOATS[cache_dtype]) for _ in range(2)] for _ in range(2))
    q = cuda.rope_kv_write(up(qkv), up(bias), up(cos), up(sin), positions, slots, *held, q_dtype="float32")
    x = up(qkv + bias.astype(np.float32)).reshape(7, -1, 32)
    cuda.rope(x[:, :8], up(cos[positions]), up(sin[positions]), out=x[:, :8])
    cuda.kv_cache_write(x[:, 6:8], x[:, 8:], *others, slots)
    assert_exact(down(q), down(x[:, :6]))
    for cache, other in zip(held, others, strict=True):
        assert_exact(down(cache), down(other))


@pytest.mark.parametrize("num_sequences", [1, 5, 300])
@pytest.mark.parametrize("num_tables", [1, 2, 4])
def test_kv_cache_advance(gpu, num_sequences, num_tables):
    rng = np.random.default_rng(num_sequences)
    seq_lens = rng.integers(0, 40, num_sequences).astype(np.int32)
    tables = [rng.integers(-1, 9, (num_sequences, 5)).astype(np.int32) for _ in range(num_tables)]
    held, positions = up(seq_lens), poisoned_up((num_sequences,), np.int64)
    slots = [poisoned_up((num_sequences,), np.int64) for _ in tables]
    pairs = list(zip(map(up, tables), slots, strict=True))
    for step in range(2):
        cuda.kv_cache_advance(held, positions, pairs, block_size=8)
        at = seq_lens.astype(np.int64) + step
        assert_exact(down(positions), at)
        assert_exact(down(held), (at + 1).astype(np.int32))
        for table, got in zip(tables, slots, strict=True):
            # Past the table, and where it has no block, nothing is to be written.
            padded = np.concatenate([table, np.full((num_sequences, 2), -1, np.int32)], axis=1)
            block = np.take_along_axis(padded, at[:, None] // 8, axis=1)[:, 0].astype(np.int64)
            assert_exact(down(got), np.where(block >= 0, 8 * block + at % 8, -1))


def test_kv_cache_advance_names_what_is_wrong(gpu):
    lens, at, slots = up(np.zeros(3, np.int32)), up(np.zeros(3, np.int64)), up(np.zeros(3, np.int64))
    table = up(np.zeros((3, 2), np.int32))
    with pytest.raises(ValueError, match="there are 0 block tables; wanted 1 to 4"):
        cuda.kv_cache_advance(lens, at, [], block_size=8)
    with pytest.raises(ValueError, match="there are 5 block tables"):
        cuda.kv_cache_advance(lens, at, [(table, slots)] * 5, block_size=8)
    with pytest.raises(ValueError, match="block_size is 0"):
        cuda.kv_cache_advance(lens, at, [(table, slots)], block_size=0)
    with pytest.raises(ValueError, match=r"positions has shape \(2,\)"):
        cuda.kv_cache_advance(lens, at[:2], [(table, slots)], block_size=8)
    with pytest.raises(TypeError, match="slots has dtype int32"):
        cuda.kv_cache_advance(lens, at, [(table, lens)], block_size=8)
    with pytest.raises(ValueError, match="slots shares memory with positions"):
        cuda.kv_cache_advance(lens, at, [(table, at)], block_size=8)


def test_rope_kv_write_with_positions_and_slots_out_of_range(gpu):
    qkv, bias, _ = fused_case()
    cos, sin = tables(10, 32)
    caches = [up(np.full((3, 2, 4, 32), np.nan, BF16)) for _ in range(2)]
    q = down(cuda.rope_kv_write(up(qkv), up(bias), up(cos), up(sin), [-1, 10, 3, 4, 5], [0, 1, -1, 12, 7], *caches))
    assert np.isnan(q[:2].astype(np.float32)).all() and np.isfinite(q[2:].astype(np.float32)).all()
    for cache in caches:
        written = np.isfinite(down(cache).astype(np.float32)).all(axis=(1, 3))
        assert np.argwhere(written).tolist() == [[1, 3]]


def test_rope_kv_write_rows_stand_alone(gpu):
    qkv, bias, rng = fused_case(tokens=9)
    cos, sin = (up(t) for t in tables(50, 32))
    positions, own = rng.integers(0, 50, 9), up(bias)

    def compute(rows):
        caches = [up(np.zeros((3, 2, 4, 32), BF16)) for _ in range(2)]
        q = cuda.rope_kv_write(up(qkv[rows]), own, cos, sin, positions[rows], np.arange(len(rows)), *caches)
        return down(q)

    assert_rows_stand_alone_on_gpu(compute, 9, (1, 4))


def test_rope_kv_write_names_what_is_wrong(gpu):
    qkv, bias, _ = fused_case()
    cos, sin = (up(t) for t in tables(10, 32))
    caches = [up(np.zeros((3, 2, 4, 32), BF16)) for _ in range(2)]
    with pytest.raises(ValueError, match="bias has shape"):
        cuda.rope_kv_write(up(qkv), up(bias[:-1]), cos, sin, [0] * 5, [0] * 5, *caches)
    with pytest.raises(ValueError, match=r"slots has shape \(4,\)"):
        cuda.rope_kv_write(up(qkv), None, cos, sin, [0] * 5, [0] * 4, *caches)
    with pytest.raises(ValueError, match="k_cache shares memory with v_cache"):
        cuda.rope_kv_write(up(qkv), None, cos, sin, [0] * 5, [0] * 5, caches[0], caches[0])
    with pytest.raises(ValueError, match="qkv has shape"):
        cuda.rope_kv_write(up(qkv[:, :-1].copy()), None, cos, sin, [0] * 5, [0] * 5, *caches)
