"""kv_cache_write against its contract, the reference and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_case import KV_DTYPES
from compare import assert_exact, poisoned
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import BF16, FLOATS, normal, strided, to_torch, unchanged, wide


class Cache:
    """A paged cache between canaries, every slot poisoned."""

    def __init__(self, num_blocks, heads, block_size, head_dim, dtype):
        shape = (num_blocks, heads, block_size, head_dim)
        kinds = [(shape, np.dtype(np.int8) if dtype == "int8" else FLOATS[dtype])] * 2
        if dtype == "int8":
            kinds += [(shape[:3], np.dtype(np.float32))] * 2
        made = [poisoned(*kind) for kind in kinds]
        self.arrays = [view for view, _ in made]
        self.checks = [check for _, check in made]

    def write(self, k, v, slots, op=ops.kv_cache_write, arrays=None):
        k_cache, v_cache, *scales = arrays or self.arrays
        op(k, v, k_cache, v_cache, slots, **dict(zip(("k_scales", "v_scales"), scales, strict=False)))

    def rows(self, slots):
        """What lies in the slots: [k, v] or [k, v, k_scales, v_scales], tokens first."""
        size = self.arrays[0].shape[2]
        return [array[slots // size, :, slots % size] for array in self.arrays]


def keys_and_values(num_tokens, heads, head_dim, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return normal(rng, (num_tokens, heads, head_dim), dtype), normal(rng, (num_tokens, heads, head_dim), dtype)


def assert_stored(x, stored, scales):
    """Stored rows are x rounded to their dtype, as the contract says."""
    if scales is None:
        assert_exact(stored, to_torch(x).to(to_torch(stored).dtype))
        return
    amax = np.abs(wide(x)).max(axis=-1)
    assert_exact(scales, (amax / 127).astype(np.float32))
    exact = wide(x) / np.maximum(wide(scales), 1e-300)[..., None]
    assert np.abs(stored).max(initial=0) <= 127
    # A value halfway between two codes may go either way, as the quotient's own rounding decides.
    assert (np.abs(wide(stored) - exact) <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(1, 1, 1), (2, 16, 16), (8, 64, 5), (3, 80, 65)])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_rounds_into_the_named_slots_and_leaves_the_others(
    isa, dtype, x_dtype, heads, head_dim, block_size, num_tokens
):
    cache = Cache(26 // block_size + 1, heads, block_size, head_dim, dtype)
    k, v = keys_and_values(num_tokens, heads, head_dim, x_dtype)
    all_slots = np.random.default_rng(0).permutation(cache.arrays[0].shape[0] * block_size)
    slots, others = all_slots[:num_tokens], all_slots[num_tokens:]
    before = [rows.tobytes() for rows in cache.rows(others)]
    with unchanged(k, v, slots):
        cache.write(k, v, slots)
    assert [rows.tobytes() for rows in cache.rows(others)] == before
    k_rows, v_rows, *scales = cache.rows(slots)
    k_scales, v_scales = scales or (None, None)
    assert_stored(k, k_rows, k_scales)
    assert_stored(v, v_rows, v_scales)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_matches_the_reference_and_stays_within_a_full_cache(isa, dtype):
    cache = Cache(3, 2, 8, 16, dtype)
    k, v = keys_and_values(24, 2, 16)
    slots = np.random.default_rng(1).permutation(24)
    cache.write(k, v, slots)
    for check in cache.checks:
        check()
    want = [np.zeros_like(a) for a in cache.arrays]
    cache.write(k, v, slots, reference.kv_cache_write, want)
    for got, expected in zip(cache.arrays, want, strict=True):
        assert_exact(got, expected)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_slot_named_twice_keeps_the_later_token(dtype):
    cache, alone = (Cache(2, 2, 4, 16, dtype) for _ in range(2))
    k, v = keys_and_values(3, 2, 16)
    cache.write(k, v, [5, 1, 5])
    alone.write(k[1:], v[1:], [1, 5])
    for got, want in zip(cache.rows(np.array([1, 5])), alone.rows(np.array([1, 5])), strict=True):
        assert_exact(got, want)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tokens_give_the_same_bytes_on_any_threads_and_instructions(isa, dtype, threads):
    k, v = keys_and_values(100, 3, 40)
    slots = np.random.default_rng(0).integers(0, 60, 100)  # many of them twice
    last = [np.flatnonzero(slots == slot)[-1] for slot in np.unique(slots)]
    got, want = Cache(12, 3, 5, 40, dtype), Cache(12, 3, 5, 40, dtype)
    with ops.num_threads(threads):
        got.write(k, v, slots)
    with ops.num_threads(1), ops.isa("scalar"):
        for token in last:
            want.write(k[token : token + 1], v[token : token + 1], slots[token : token + 1])
    for a, b in zip(got.arrays, want.arrays, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("x_dtype", FLOATS)
def test_token_strides(isa, x_dtype):
    k, v = keys_and_values(5, 2, 16, x_dtype)
    apart, together = (Cache(2, 2, 4, 16, "bfloat16") for _ in range(2))
    apart.write(strided(k), strided(v, 7), range(5))
    together.write(k, v, range(5))
    # Keys and values as they come, in a row of queries, keys and values.
    rows = np.concatenate([k, v], axis=1)
    shared = Cache(2, 2, 4, 16, "bfloat16")
    shared.write(rows[:, :2], rows[:, 2:], range(5))
    for cache in (apart, shared):
        for got, want in zip(cache.rows(np.arange(5)), together.rows(np.arange(5)), strict=True):
            assert_exact(got, want)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(isa):
    k = np.array(
        [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 1.001 * 2**-8, np.nan, np.inf, 3.4e38, -0.0], np.float32
    )
    cache = Cache(1, 1, 1, 8, "bfloat16")
    cache.write(k.reshape(1, 1, 8), k.reshape(1, 1, 8), [0])
    assert_exact(
        cache.arrays[0].reshape(-1),
        np.array([1, 1 + 2**-6, -1, 1 + 2**-7, np.nan, np.inf, np.inf, -0.0], np.float64).astype(BF16),
    )


def test_int8_of_extremes(isa):
    rows = np.zeros((6, 1, 16), np.float32)
    rows[1] = 1e-44  # below what has a reciprocal: zero, with the scale it has
    rows[2, 0, 3] = np.nan
    rows[3, 0, 3] = -np.inf
    rows[4] = 3.4e38
    rows[5] = np.linspace(-1, 1, 16)
    cache = Cache(1, 1, 6, 16, "int8")
    cache.write(rows, rows, range(6))
    k, _, scales, _ = cache.arrays
    assert_exact(np.isnan(scales[0, 0]), np.array([False, False, True, True, False, False]))
    assert_exact(scales[0, 0, [0, 1]], np.zeros(2, np.float32))
    assert_exact(k[0, 0, :4], np.zeros((4, 16), np.int8))
    assert_exact(k[0, 0, 4], np.full(16, 127, np.int8))
    assert k[0, 0, 5].tolist()[::15] == [-127, 127]


def test_whole_numbers_are_exact_in_int8(isa):
    rng = np.random.default_rng(0)
    k = rng.integers(-127, 128, (5, 2, 64)).astype(np.float32)
    k[..., 7] = 127
    cache = Cache(1, 2, 5, 64, "int8")
    cache.write(k * 0.25, -k, range(5))
    assert_exact(wide(cache.arrays[0][0].swapaxes(0, 1)), k.astype(np.float64))
    assert_exact(wide(cache.arrays[1][0].swapaxes(0, 1)), 0.0 - k.astype(np.float64))
    assert_exact(cache.arrays[2], np.full((1, 2, 5), 0.25, np.float32))


def test_a_rounding_off_by_one_code_is_rejected():
    k, _ = keys_and_values(4, 2, 16)
    scale = (np.abs(k).max(axis=-1) / 127).astype(np.float32)
    codes = np.rint(k / scale[..., None]).astype(np.int8)
    assert_stored(k, codes, scale)
    for wrong in (
        codes - np.sign(codes),
        np.trunc(k / scale[..., None]).astype(np.int8),
        -codes,
        np.roll(codes, 1, 0),
    ):
        with pytest.raises(AssertionError):
            assert_stored(k, wrong, scale)


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ([0, 8], ValueError, r"slots\[1\] is 8; wanted 0 to 7"),
        ([-1, 0], ValueError, r"slots\[0\] is -1; wanted 0 to 7"),
        ([0, 2**62], ValueError, r"slots\[1\] is 4611686018427387904"),
        ([0], ValueError, r"slots has shape \(1,\)"),
        ([[0, 1]], ValueError, "slots has shape"),
        ([0.0, 1.0], TypeError, "slots has dtype float64; wanted integers"),
        (["a", "b"], TypeError, "slots has dtype <U1; wanted integers"),
        ([[0], [1, 2]], TypeError, "slots is no array of integers"),
        (None, TypeError, "slots has dtype object"),
        (2**70, TypeError, "slots has dtype object"),
    ],
)
def test_slots_of_nonsense_write_nothing(slots, error, message):
    cache = Cache(2, 2, 4, 16, "int8")
    with unchanged(*cache.arrays), pytest.raises(error, match=message):
        cache.write(*keys_and_values(2, 2, 16), slots)


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "message"),
    [
        ((2, 3, 16), (2, 3, 16), r"k has shape \(2, 3, 16\)"),
        ((2, 2, 15), (2, 2, 16), r"k has shape \(2, 2, 15\)"),
        ((2, 2, 16), (3, 2, 16), r"v has shape \(3, 2, 16\)"),
    ],
)
def test_shapes_that_do_not_fit(k_shape, v_shape, message):
    cache = Cache(2, 2, 4, 16, "float32")
    with unchanged(*cache.arrays), pytest.raises(ValueError, match=message):
        cache.write(np.zeros(k_shape, np.float32), np.zeros(v_shape, np.float32), [0, 1])


def test_scales_go_with_int8_and_only_with_int8():
    k, v = keys_and_values(1, 2, 16)
    int8, float32 = Cache(1, 2, 4, 16, "int8"), Cache(1, 2, 4, 16, "float32")
    with pytest.raises(ValueError, match="k_scales is missing"):
        ops.kv_cache_write(k, v, *int8.arrays[:2], [0])
    with pytest.raises(ValueError, match="v_scales is missing"):
        ops.kv_cache_write(k, v, *int8.arrays[:2], [0], k_scales=int8.arrays[2])
    with pytest.raises(ValueError, match="k_scales came with a float32 cache"):
        ops.kv_cache_write(k, v, *float32.arrays, [0], k_scales=int8.arrays[2], v_scales=int8.arrays[3])


def test_torch_tensors_are_written_in_place():
    k, v = keys_and_values(3, 2, 16, "bfloat16")
    caches = [torch.zeros(2, 2, 4, 16, dtype=torch.bfloat16) for _ in range(2)]
    ops.kv_cache_write(to_torch(k), to_torch(v), *caches, torch.tensor([7, 0, 3], dtype=torch.int32))
    assert_exact(caches[0][1, :, 3], k[0])
    assert_exact(caches[1][0, :, 3], v[2])
