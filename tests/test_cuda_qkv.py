"""rmsnorm_qkv_rope on a GPU: the bits of the ops it stands for, and those near float64."""

from __future__ import annotations

import numpy as np
import pytest

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from mxmoe import cuda, ops
from mxmoe.reference import ops as reference
from op_helpers import BF16, FLOATS, normal

EPS = 1e-5
MAX_POSITIONS = 40


def make(num_tokens, hidden_size, heads=(2, 1), head_dim=16, bias_dtype="bfloat16", seed=0):
    """x, norm weight, three layers, rotary tables, positions and slots."""
    rng = np.random.default_rng(seed)
    layers = []
    for count in (heads[0], heads[1], heads[1]):
        weight = normal(rng, (count * head_dim, hidden_size), "bfloat16", hidden_size**-0.5)
        layers.append((weight, None if bias_dtype is None else normal(rng, (len(weight),), bias_dtype)))
    inv_freq, scaling = ops.rope_inv_freq(head_dim, 150000.0, factor=32.0)
    tables = ops.rope_cos_sin(np.arange(MAX_POSITIONS), inv_freq, scaling)
    norm = (normal(rng, (hidden_size,), "bfloat16") + 1).astype(BF16)
    x = normal(rng, (num_tokens, hidden_size))
    return x, norm, layers, tables, rng.integers(0, MAX_POSITIONS, num_tokens), rng.permutation(48)[:num_tokens]


def caches(layers, head_dim, dtype):
    shape = (12, layers[1][0].shape[0] // head_dim, 4, head_dim)
    return [poisoned_up(shape, FLOATS[dtype]) for _ in range(2)]


def on_gpu(layers):
    return [(up(weight), None if bias is None else up(bias)) for weight, bias in layers]


def fused(case, held, head_dim=16, gaps=(0, 0)):
    x, norm, layers, tables, positions, slots = case
    arrays = [(up(w, gaps[1]), None if b is None else up(b)) for w, b in layers]
    out = poisoned_up((len(x), layers[0][0].shape[0] // head_dim, head_dim), FLOATS[held[0].dtype])
    cuda.rmsnorm_qkv_rope(up(x, gaps[0]), up(norm), EPS, *arrays, *map(up, tables), positions, slots, *held, out=out)
    return [down(a) for a in (out, *held)]


def one_by_one(case, held, head_dim=16):
    x, norm, layers, tables, positions, slots = case
    h = cuda.rmsnorm(up(x), up(norm), EPS)
    qkv = cuda.linear_group(h, [(w, None, b) for w, b in on_gpu(layers)]).reshape(len(x), -1, head_dim)
    heads, kv_heads = (layers[i][0].shape[0] // head_dim for i in (0, 1))
    turned = qkv[:, : heads + kv_heads]
    cuda.rope(turned, *(up(table[positions]) for table in tables), out=turned)
    cuda.kv_cache_write(qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :], *held, slots)
    return [down(qkv[:, :heads]).astype(FLOATS[held[0].dtype]), *map(down, held)]


SIZES = [
    (1, 8, (2, 1), 16),
    (3, 96, (6, 2), 32),
    (8, 400, (2, 2), 64),
    (8, 4104, (1, 1), 16),  # too wide for eight staged rows
    (1, 6200, (1, 1), 16),  # past 16 slices
    (9, 96, (2, 1), 16),
    (17, 392, (1, 1), 128),
    (33, 40, (2, 1), 16),
]


@pytest.mark.parametrize(("num_tokens", "hidden_size", "heads", "head_dim"), SIZES)
@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_bits_are_those_of_its_parts(gpu, num_tokens, hidden_size, heads, head_dim, cache_dtype):
    case = make(num_tokens, hidden_size, heads, head_dim)
    held = caches(case[2], head_dim, cache_dtype)
    got = fused(case, held, head_dim)
    assert gpu.last_kernels()["rmsnorm_qkv_rope"] == "rmsnorm_qkv_rope_sm80_kernel"
    for a, b in zip(got, one_by_one(case, caches(case[2], head_dim, cache_dtype), head_dim), strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("num_tokens", [2, 10])
@pytest.mark.parametrize("bias_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("gaps", [(0, 0), (3, 8)])
def test_biases_and_rows_that_are_apart(gpu, num_tokens, bias_dtype, gaps):
    case = make(num_tokens, 72, bias_dtype=bias_dtype)
    got = fused(case, caches(case[2], 16, "bfloat16"), gaps=gaps)
    for a, b in zip(got, one_by_one(case, caches(case[2], 16, "bfloat16")), strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_matches_float64(gpu, cache_dtype):
    x, norm, layers, tables, positions, slots = case = make(5, 2880, (4, 2), 64)
    q, k_cache, v_cache = fused(case, caches(layers, 64, cache_dtype), 64)
    h = reference.rmsnorm(x, norm, EPS).astype(BF16).astype(np.float64)
    qkv = np.concatenate([reference.linear(h, *layer) for layer in layers], axis=1).reshape(5, -1, 64)
    want = reference.rope(qkv[:, :6], tables[0][positions], tables[1][positions])
    block, place = np.divmod(slots, 4)
    # h may fall to the other side of a bfloat16 tie.
    scale = {"dtype": "bfloat16", "out_dtype": cache_dtype, "scale": np.abs(qkv).max()}
    assert_close(q, want[:, :4], **scale)
    assert_close(k_cache[block, :, place], want[:, 4:], **scale)
    assert_close(v_cache[block, :, place], qkv[:, 6:], **scale)
    with pytest.raises(AssertionError):
        assert_close(q, qkv[:, :4], **scale)


@pytest.mark.parametrize("num_tokens", [5, 12])
def test_positions_and_slots_out_of_range(gpu, num_tokens):
    case = make(num_tokens, 64)
    positions, slots = case[4].copy(), case[5].copy()
    positions[:2], slots[2:4] = (-1, MAX_POSITIONS), (-1, 48)
    held = caches(case[2], 16, "bfloat16")
    q, *written = fused((*case[:4], positions, slots), held)
    assert np.isnan(q[:2].astype(np.float32)).all() and np.isfinite(q[2:].astype(np.float32)).all()
    block, place = np.divmod(slots, 4)
    for cache in written:
        filled = np.argwhere(np.isfinite(cache.astype(np.float32)).all(axis=(1, 3)))
        assert sorted(map(tuple, filled.tolist())) == sorted(zip(block[4:].tolist(), place[4:].tolist(), strict=True))


def test_rows_stand_alone(gpu):
    case = make(20, 136)
    arrays, norm, tables = on_gpu(case[2]), up(case[1]), [up(t) for t in case[3]]

    def compute(rows):
        held = caches(case[2], 16, "bfloat16")
        x, at = up(case[0][rows]), case[4][rows]
        return down(cuda.rmsnorm_qkv_rope(x, norm, EPS, *arrays, *tables, at, np.arange(len(rows)), *held))

    assert_rows_stand_alone_on_gpu(compute, 20, (1, 8, 9, 17))


def test_what_is_wrong_is_named(gpu):
    x, norm, layers, tables, positions, slots = make(3, 64)
    held, arrays = caches(layers, 16, "bfloat16"), on_gpu(layers)
    x, norm, tables = up(x), up(norm), [up(t) for t in tables]

    def call(x=x, norm=norm, arrays=arrays, positions=positions, held=held, **kwargs):
        return cuda.rmsnorm_qkv_rope(x, norm, EPS, *arrays, *tables, positions, slots, *held, **kwargs)

    with pytest.raises(ValueError, match=r"k_weight has shape \(15, 64\)"):
        call(arrays=[arrays[0], (arrays[1][0][:15], None), arrays[2]])
    with pytest.raises(ValueError, match="v_bias has shape"):
        call(arrays=[*arrays[:2], (arrays[2][0], arrays[0][1])])
    with pytest.raises(ValueError, match=r"positions has shape \(2,\)"):
        call(positions=positions[:2])
    with pytest.raises(ValueError, match="k_cache shares memory with v_cache"):
        call(held=[held[0], held[0]])
    with pytest.raises(ValueError, match="x has hidden_size 60; wanted a multiple of 8"):
        call(x=x[:, :60])
    with pytest.raises(TypeError, match="norm_weight has dtype float32"):
        call(norm=up(np.ones(64, np.float32)))
    with pytest.raises(ValueError, match="q_weight has rows that are not aligned to 16 bytes"):
        call(arrays=[(up(layers[0][0], 1), None), *arrays[1:]])
    with pytest.raises(TypeError, match="q has dtype float32"):
        call(out=poisoned_up((3, 2, 16)))
