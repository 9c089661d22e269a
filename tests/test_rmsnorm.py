"""rmsnorm against float64, torch and itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import (
    BF16,
    FLOATS,
    VECTOR_SIZES,
    assert_rows_stand_alone,
    guarded,
    normal,
    strided,
    strided_output,
    to_torch,
)

EPS = 1e-5
DTYPES = [(x, w, y) for x in FLOATS for w in FLOATS for y in FLOATS]


def case(num_tokens, hidden_size, x_dtype="float32", w_dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return normal(rng, (num_tokens, hidden_size), x_dtype), normal(rng, (hidden_size,), w_dtype) + 1


def torch_rmsnorm(x, weight, eps, dtype="float32"):
    x, weight = to_torch(x).float(), to_torch(weight).float()
    return torch.nn.functional.rms_norm(x, (x.shape[1],), weight, eps).to(getattr(torch, dtype))


@pytest.mark.parametrize("hidden_size", VECTOR_SIZES)
@pytest.mark.parametrize(("x_dtype", "w_dtype", "y_dtype"), DTYPES)
def test_matches_float64_and_torch(isa, hidden_size, x_dtype, w_dtype, y_dtype):
    x, weight = case(5, hidden_size, x_dtype, w_dtype)
    got = guarded(ops.rmsnorm, x, weight, EPS, shape=x.shape, dtype=FLOATS[y_dtype], misalign=1)
    want = reference.rmsnorm(x, weight, EPS)
    assert_close(got, want, baseline=torch_rmsnorm(x, weight, EPS, y_dtype), dtype=y_dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 129])
def test_any_number_of_tokens(isa, num_tokens):
    x, weight = case(num_tokens, 40)
    got = guarded(ops.rmsnorm, x, weight, EPS, shape=x.shape)
    assert_close(got, reference.rmsnorm(x, weight, EPS), baseline=torch_rmsnorm(x, weight, EPS))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 1.0])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 1e6, 1e18])
def test_eps_and_magnitudes(isa, eps, size):
    x, weight = case(4, 100)
    x *= np.float32(size)
    got = ops.rmsnorm(x, weight, eps)
    assert_close(got, reference.rmsnorm(x, weight, eps), baseline=torch_rmsnorm(x, weight, eps))


def test_zeros_stay_zero_but_divide_nothing_by_nothing_without_eps(isa):
    x, weight = np.zeros((2, 20), np.float32), np.ones(20, np.float32)
    assert_exact(ops.rmsnorm(x, weight, EPS), x)
    assert np.isnan(ops.rmsnorm(x, weight, 0.0)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place_and_row_strides(isa, dtype):
    x, weight = case(6, 37, dtype)
    want = ops.rmsnorm(x, weight, EPS)
    assert want.dtype == x.dtype
    apart = strided(x)
    assert_exact(ops.rmsnorm(apart, weight, EPS), want)
    out, check = strided_output(x.shape, x.dtype, extra=5)
    assert_exact(ops.rmsnorm(apart, weight, EPS, out=out), want)
    check()
    assert ops.rmsnorm(apart, weight, EPS, out=apart) is apart
    assert_exact(apart, want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_stand_alone(isa, dtype):
    x, weight = case(33, 100, dtype)
    assert_rows_stand_alone(lambda rows: ops.rmsnorm(x[rows], weight, EPS), 33)


def test_a_broken_row_stays_alone(isa):
    x, weight = case(5, 50)
    want = ops.rmsnorm(x, weight)
    x[2, 7] = np.nan
    got = ops.rmsnorm(x, weight)
    assert np.isnan(got[2]).all()
    assert_exact(np.delete(got, 2, 0), np.delete(want, 2, 0))


def test_rounds_once_to_nearest_even(isa):
    # x / rms is 1 throughout, so y is the weight, halfway between two bfloat16 values.
    x, weight = np.ones((1, 4), np.float32), np.array([1, 1, -1, 1], np.float32)
    weight += np.array([1, 3, -1, 1.0001], np.float32) * np.float32(2**-8)
    got = guarded(ops.rmsnorm, x, weight, 0.0, shape=(1, 4), dtype=BF16)
    assert_exact(got, np.array([[1, 1 + 2**-6, -1, 1 + 2**-7]], BF16))


WRONG = {
    "weight forgotten": lambda x, w: reference.rmsnorm(x, np.ones_like(w), EPS),
    "eps outside the root": lambda x, w: x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + 0.01) * w,
    "mean subtracted": lambda x, w: reference.rmsnorm(x - x.mean(-1, keepdims=True), w, EPS),
    "sum for mean": lambda x, w: x / np.sqrt(np.sum(x * x, -1, keepdims=True) + EPS) * w,
    "last element left out of the mean": lambda x, w: (
        x / np.sqrt(np.sum(x[:, :-1] ** 2, -1, keepdims=True) / x.shape[1] + EPS) * w
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_formulas_are_rejected(wrong):
    x, weight = case(5, 96)
    bad = np.asarray(wrong(x.astype(np.float64), weight.astype(np.float64))).astype(np.float32)
    with pytest.raises(AssertionError):
        assert_close(bad, reference.rmsnorm(x, weight, EPS), baseline=torch_rmsnorm(x, weight, EPS))


@pytest.mark.parametrize(
    ("eps", "message"),
    [(-1e-9, "eps is -1e-09"), (np.nan, "eps is nan"), (np.inf, "eps is inf"), (1e300, "eps is inf")],
)
def test_eps_out_of_range(eps, message):
    x, weight = case(2, 8)
    with pytest.raises(ValueError, match=message):
        ops.rmsnorm(x, weight, eps)


def test_empty_rows_are_an_error():
    with pytest.raises(ValueError, match="x has hidden_size 0; wanted at least 1"):
        ops.rmsnorm(np.zeros((2, 0), np.float32), np.zeros(0, np.float32))
