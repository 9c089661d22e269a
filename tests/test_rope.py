"""rope, its frequencies and its table, against float64, torch and themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import FLOATS, assert_rows_stand_alone, guarded, normal, strided, strided_output, to_torch

YARNS = {
    "plain": dict(head_dim=64, theta=10000.0),
    "gpt-oss": dict(head_dim=64, theta=150000.0, factor=32.0, truncate=False),
    "gpt-oss, rounded range": dict(head_dim=64, theta=150000.0, factor=32.0, truncate=True),
    "small": dict(head_dim=16, theta=1e4, factor=8.0, original_max_position_embeddings=64),
    "one pair": dict(head_dim=2, theta=1e4, factor=4.0),
    "range ends at 0": dict(head_dim=32, theta=1e4, factor=4.0, original_max_position_embeddings=8),
    "range of no width": dict(
        head_dim=32, theta=1e4, factor=4.0, original_max_position_embeddings=1, truncate=True, beta_slow=0.2
    ),
    "other betas": dict(head_dim=80, theta=5e5, factor=2.5, beta_fast=16.0, beta_slow=2.0),
    "same betas": dict(head_dim=64, theta=1e4, factor=2.0, beta_fast=8.0, beta_slow=8.0),
}
HEAD_DIMS = [2, 4, 6, 8, 14, 16, 18, 24, 30, 32, 34, 64, 80, 96, 256]


def torch_inv_freq(
    head_dim,
    theta,
    factor=1.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
):
    """The rule of YaRN's sections 3.2 and 3.4 on a whole tensor."""
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    kept = 1.0 / theta ** (2 * pair / head_dim)
    if factor == 1.0:
        return kept, 1.0
    ends = torch.tensor([beta_fast, beta_slow], dtype=torch.float64)
    low, high = head_dim / 2 * torch.log(original_max_position_embeddings / (2 * math.pi * ends)) / math.log(theta)
    if truncate:
        low, high = torch.floor(low), torch.ceil(high)
    low, high = low.clamp(min=0), high.clamp(max=head_dim - 1)
    high = high + 0.001 * (low == high)
    return torch.lerp(kept, kept / factor, ((pair - low) / (high - low)).clamp(0, 1)), 0.1 * math.log(factor) + 1


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS.keys())
def test_frequencies(yarn):
    got, scaling = ops.rope_inv_freq(**yarn)
    want, want_scaling = reference.rope_inv_freq(**yarn)
    by_torch, torch_scaling = torch_inv_freq(**yarn)
    for expected in (want, by_torch.numpy()):
        assert_close(got, expected, dtype="float64", scale=expected)
    assert scaling == pytest.approx(want_scaling, rel=1e-15) == torch_scaling


def test_stretching_keeps_fast_pairs_and_slows_slow_ones():
    plain, _ = ops.rope_inv_freq(64, 150000.0)
    stretched, scaling = ops.rope_inv_freq(64, 150000.0, factor=32.0)
    assert_exact(stretched[:8], plain[:8])
    assert_exact(stretched[-12:], plain[-12:] / 32)
    assert scaling == 0.1 * math.log(32) + 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(head_dim=7), "head_dim is 7; wanted an even number"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(head_dim=-2), "head_dim is -2"),
        (dict(head_dim=2**40), "head_dim is 1099511627776; wanted at most"),
        (dict(theta=1.0), "theta is 1; wanted"),
        (dict(theta=math.nan), "theta is nan"),
        (dict(factor=0.5), "factor is 0.5; wanted 1 or more"),
        (dict(factor=math.inf), "factor is inf"),
        (dict(original_max_position_embeddings=0), "original_max_position_embeddings is 0"),
        (dict(beta_slow=0.0), "beta_fast and beta_slow are 32 and 0"),
        (dict(beta_fast=0.5), "beta_fast and beta_slow are 0.5 and 1"),
    ],
)
def test_frequencies_of_nonsense(bad, message):
    with pytest.raises(ValueError, match=message):
        ops.rope_inv_freq(**({"head_dim": 64, "theta": 1e4} | bad))


def test_table_is_right_at_the_last_position_of_the_context():
    inv_freq, scaling = ops.rope_inv_freq(64, 150000.0, factor=32.0)
    positions = np.array([0, 1, 127, 4096, 131070, 131071])
    angles = torch.from_numpy(positions)[:, None].double() * torch.from_numpy(inv_freq)
    want = reference.rope_cos_sin(positions, inv_freq, scaling)
    for got, expected, function in zip(
        ops.rope_cos_sin(positions, inv_freq, scaling), want, (torch.cos, torch.sin), strict=True
    ):
        assert_close(got, expected, baseline=(function(angles) * scaling).float(), scale=1.0)
        coarse = (function(angles.float()) * scaling).numpy()  # what angles in float32 would give
        with pytest.raises(AssertionError):
            assert_close(coarse, expected, scale=1.0)


def test_table_takes_lists_and_nothing():
    inv_freq, _ = ops.rope_inv_freq(8, 1e4)
    cos, sin = ops.rope_cos_sin([0, 3], inv_freq)
    assert_exact(cos[0], np.ones(4, np.float32))
    assert_exact(sin[0], np.zeros(4, np.float32))
    assert_exact(ops.rope_cos_sin(np.array([3], np.uint8), inv_freq)[1], sin[1:])
    assert ops.rope_cos_sin([], inv_freq)[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([0, -1], ValueError, r"positions\[1\] is -1; wanted 0 or more"),
        ([0.5], TypeError, "positions has dtype float64; wanted integers"),
        ([[0, 1]], ValueError, "positions has shape"),
        (3, ValueError, "positions has no axes"),
        (None, TypeError, "positions has dtype object"),
    ],
)
def test_table_of_nonsense(positions, error, message):
    inv_freq, _ = ops.rope_inv_freq(8, 1e4)
    with pytest.raises(error, match=message):
        ops.rope_cos_sin(positions, inv_freq)


def case(num_tokens, num_heads, head_dim, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    inv_freq, scaling = ops.rope_inv_freq(head_dim, 1e4, factor=4.0, original_max_position_embeddings=64)
    cos, sin = ops.rope_cos_sin(rng.integers(0, 1000, num_tokens), inv_freq, scaling)
    return normal(rng, (num_tokens, num_heads, head_dim), dtype), cos, sin


def torch_rope(x, cos, sin, dtype="float32"):
    x = to_torch(x).float()
    cos, sin = (torch.cat([to_torch(t)] * 2, dim=-1)[:, None] for t in (cos, sin))
    rotated = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return (x * cos + rotated * sin).to(getattr(torch, dtype))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(x, y) for x in FLOATS for y in FLOATS])
def test_matches_float64_and_torch(isa, head_dim, x_dtype, y_dtype):
    x, cos, sin = case(5, 3, head_dim, x_dtype)
    got = guarded(ops.rope, x, cos, sin, shape=x.shape, dtype=FLOATS[y_dtype], misalign=1)
    want = reference.rope(x, cos, sin)
    assert_close(got, want, baseline=torch_rope(x, cos, sin, y_dtype), dtype=y_dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 65])
@pytest.mark.parametrize("num_heads", [0, 1, 8, 64])
def test_any_number_of_tokens_and_heads(isa, num_tokens, num_heads):
    x, cos, sin = case(num_tokens, num_heads, 32)
    got = guarded(ops.rope, x, cos, sin, shape=x.shape)
    assert_close(got, reference.rope(x, cos, sin), baseline=torch_rope(x, cos, sin))


@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place_and_token_strides(isa, dtype):
    x, cos, sin = case(6, 5, 24, dtype)
    want = ops.rope(x, cos, sin)
    assert want.dtype == x.dtype
    apart = strided(x)
    out, check = strided_output(x.shape, x.dtype)
    assert_exact(ops.rope(apart, cos, sin, out=out), want)
    check()
    assert ops.rope(apart, cos, sin, out=apart) is apart
    assert_exact(apart, want)
    # The queries in a row of queries, keys and values: heads 1 to 3 of five.
    x = x.copy()
    ops.rope(x[:, 1:4], cos, sin, out=x[:, 1:4])
    assert_exact(x[:, 1:4], want[:, 1:4])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_stand_alone(isa, dtype):
    x, cos, sin = case(33, 3, 80, dtype)
    assert_rows_stand_alone(lambda rows: ops.rope(x[rows], cos[rows], sin[rows]), 33)


def interleaved(x, cos, sin):
    y = reference.rope(np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), cos, sin)
    return np.stack(np.split(y, 2, axis=-1), axis=-1).reshape(x.shape)


WRONG = {
    "neighbours paired instead of halves": interleaved,
    "turned the other way": lambda x, cos, sin: reference.rope(x, cos, -sin),
    "position off by one": lambda x, cos, sin: reference.rope(x, np.roll(cos, 1, 0), np.roll(sin, 1, 0)),
    "not turned": lambda x, cos, sin: x.astype(np.float64),
    "cos and sin exchanged": lambda x, cos, sin: reference.rope(x, sin, cos),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_rotations_are_rejected(wrong):
    x, cos, sin = case(5, 3, 64)
    with pytest.raises(AssertionError):
        assert_close(
            wrong(x, cos, sin).astype(np.float32), reference.rope(x, cos, sin), baseline=torch_rope(x, cos, sin)
        )


@pytest.mark.parametrize("head_dim", [0, 1, 7])
def test_odd_heads_are_an_error(head_dim):
    x, table = np.zeros((2, 1, head_dim), np.float32), np.zeros((2, head_dim // 2), np.float32)
    with pytest.raises(ValueError, match=f"x has head_dim {head_dim}; wanted an even number, 2 or more"):
        ops.rope(x, table, table)


def test_heads_must_lie_together():
    x, cos, sin = case(2, 4, 8)
    with pytest.raises(ValueError, match="x has a head stride of 16 elements; wanted 8"):
        ops.rope(x[:, ::2], cos, sin)
    with pytest.raises(ValueError, match="out has a head stride of 16 elements; wanted 8"):
        ops.rope(x[:, :2].copy(), cos, sin, out=np.zeros_like(x)[:, ::2])
