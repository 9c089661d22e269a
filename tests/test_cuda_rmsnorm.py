"""rmsnorm on a GPU against float64, torch and itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from mxmoe import cuda, ops
from mxmoe.reference import ops as reference
from op_helpers import FLOATS, normal, to_torch

EPS = 1e-5


def case(num_tokens, hidden_size, x_dtype="float32", w_dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return normal(rng, (num_tokens, hidden_size), x_dtype), normal(rng, (hidden_size,), w_dtype) + 1


def torch_rmsnorm(x, weight, dtype="float32"):
    x, weight = to_torch(x).float(), to_torch(weight).float()
    return torch.nn.functional.rms_norm(x, (x.shape[1],), weight, EPS).to(getattr(torch, dtype))


@pytest.mark.parametrize("hidden_size", [1, 3, 4, 31, 32, 33, 1021, 1024, 2880])
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "y_dtype"), [(x, w, y) for x in FLOATS for w in FLOATS for y in FLOATS]
)
def test_matches_float64_and_torch(gpu, hidden_size, x_dtype, w_dtype, y_dtype):
    x, weight = case(3, hidden_size, x_dtype, w_dtype)
    out = poisoned_up(x.shape, FLOATS[y_dtype])
    assert ops.rmsnorm(up(x), up(weight), EPS, out=out) is out
    want = reference.rmsnorm(x, weight, EPS)
    assert_close(down(out), want, baseline=torch_rmsnorm(x, weight, y_dtype), dtype=y_dtype)


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_rows_may_be_apart_and_written_in_place(gpu, gap):
    x, weight = case(5, 37)
    w = up(weight)
    want = down(ops.rmsnorm(up(x), w, EPS))
    apart = up(x, gap)
    assert_exact(down(ops.rmsnorm(apart, w, EPS)), want)
    out = up(np.full_like(x, np.nan), gap)
    ops.rmsnorm(apart, w, EPS, out=out)
    assert_exact(down(out), want)
    ops.rmsnorm(apart, w, EPS, out=apart)
    assert_exact(down(apart), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_stand_alone(gpu, dtype):
    x, weight = case(9, 101, dtype)
    w = up(weight)
    assert_rows_stand_alone_on_gpu(lambda rows: down(ops.rmsnorm(up(x[rows]), w, EPS)), 9)


def test_no_rows(gpu):
    assert down(ops.rmsnorm(up(np.zeros((0, 8), np.float32)), up(np.ones(8, np.float32)))).shape == (0, 8)


def test_bad_arguments_are_named_before_anything_runs(gpu):
    x, weight = (up(a) for a in case(2, 8))
    with pytest.raises(ValueError, match="eps is -1"):
        cuda.rmsnorm(x, weight, -1.0)
    with pytest.raises(ValueError, match=r"weight has shape \(8,\); wanted \(hidden_size,\) = \(4,\)"):
        cuda.rmsnorm(x.reshape(4, 4), weight)
    with pytest.raises(ValueError, match="weight is on DLPack device type 1; wanted an array on a CUDA device"):
        cuda.rmsnorm(x, np.ones(8, np.float32), out=x)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        cuda.rmsnorm(weight.reshape(1, 8), weight, out=weight.reshape(1, 8))
    out = up(np.zeros((2, 8), np.float32))
    out.read_only = True
    with pytest.raises(ValueError, match="out is read-only"):
        cuda.rmsnorm(x, weight, out=out)
