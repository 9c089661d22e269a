"""linear on a GPU against float64, torch and itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from mxmoe import cuda, ops
from mxmoe.reference import ops as reference
from op_helpers import BF16, FLOATS, normal, round_activations, to_torch, wide

GEMV, GEMM = "linear_bf16_bf16_gemv_sm80_kernel", "linear_bf16_bf16_sm80_kernel"


def case(num_tokens, n, k, x_dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return normal(rng, (num_tokens, k), x_dtype), normal(rng, (n, k), "bfloat16", k**-0.5)


def check(got, x, weight, activations, bias=None, residual=None):
    x = round_activations(x, activations)
    want = reference.linear(x, weight, bias, residual=residual)
    baseline = torch.from_numpy(x).float() @ to_torch(weight).float().T
    if bias is not None:
        baseline += to_torch(bias).float()
    if residual is not None:
        baseline += torch.from_numpy(residual)
    # The size of a sum of products of random signs: a row of few outputs may be small by chance.
    scale = np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(np.mean(wide(weight) ** 2))
    assert_close(got, want, baseline=baseline, dtype="float32", scale=np.maximum(scale, np.abs(want).mean()))


# Around the tiles' edges: 16 rows by 8, 16, 32 tokens; 128 by 128; steps of 32 and slices of 384 along K.
@pytest.mark.parametrize(
    ("num_tokens", "n", "k"),
    [
        (1, 1, 1), (1, 16, 32), (2, 17, 33), (7, 15, 384), (8, 33, 385), (9, 16, 40), (16, 5, 767), (17, 31, 96),
        (33, 16, 800), (1, 16, 384 * 17 + 5), (64, 20, 64), (65, 130, 33), (70, 129, 415), (129, 3, 769), (66, 16, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("activations", ["bf16", "float32"])
def test_matches_float64_and_torch(gpu, num_tokens, n, k, x_dtype, activations):
    x, weight = case(num_tokens, n, k, x_dtype)
    out = poisoned_up((num_tokens, n))
    assert ops.linear(up(x), up(weight), activations=activations, out=out) is out
    check(down(out), x, weight, activations)
    kernel = "linear_f32_bf16_sm80_kernel" if activations == "float32" else GEMV if num_tokens <= 64 else GEMM
    assert gpu.last_kernels()["linear"] == kernel


@pytest.mark.parametrize("num_tokens", [3, 67])
@pytest.mark.parametrize("bias_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activations", ["bf16", "float32"])
def test_bias_and_residual(gpu, num_tokens, bias_dtype, with_residual, activations):
    x, weight = case(num_tokens, 19, 70)
    rng = np.random.default_rng(1)
    bias = normal(rng, (19,), bias_dtype) if bias_dtype else None
    residual = normal(rng, (num_tokens, 19)) if with_residual else None
    arguments = {"activations": activations, "residual": None if residual is None else up(residual, 3)}
    got = down(ops.linear(up(x), up(weight), None if bias is None else up(bias), **arguments))
    check(got, x, weight, activations, bias, residual)
    if residual is not None:  # in place
        arguments["out"] = arguments["residual"]
        assert_exact(down(ops.linear(up(x), up(weight), None if bias is None else up(bias), **arguments)), got)


@pytest.mark.parametrize("num_tokens", [2, 66])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(("x_gap", "w_gap"), [(1, 1), (8, 8), (3, 0), (0, 5)])
@pytest.mark.parametrize("k", [40, 45])
def test_rows_may_be_apart(gpu, num_tokens, x_dtype, x_gap, w_gap, k):
    x, weight = case(num_tokens, 18, k, x_dtype)
    want = down(ops.linear(up(x), up(weight)))
    out = up(np.full(want.shape, np.nan, np.float32), 3)
    ops.linear(up(x, x_gap), up(weight, w_gap), out=out)
    assert_exact(down(out), want)


@pytest.mark.parametrize("k", [100, 800])
@pytest.mark.parametrize("activations", ["bf16", "float32"])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_bits_do_not_depend_on_the_batch(gpu, k, activations, x_dtype):
    # 70 tokens take the kernel for many; parts of them those for few.
    x, weight = case(70, 20, k, x_dtype)
    w = up(weight)
    assert_rows_stand_alone_on_gpu(
        lambda rows: down(ops.linear(up(x[rows]), w, activations=activations)), 70, (1, 7, 8, 9, 17, 33, 65)
    )


@pytest.mark.parametrize("num_tokens", [3, 66])
def test_a_broken_row_stays_alone(gpu, num_tokens):
    x, weight = case(num_tokens, 17, 64)
    w = up(weight)
    want = down(ops.linear(up(x), w))
    x[1, 5] = np.nan
    got = down(ops.linear(up(x), w))
    assert np.isnan(got[1]).all()
    assert_exact(np.delete(got, 1, 0), np.delete(want, 1, 0))


def test_activations_round_to_nearest_even(gpu):
    weight = np.ones((1, 1), BF16)
    x = np.array([[1 + 2**-8], [1 + 3 * 2**-8], [-1 - 2**-8], [1 + 2**-8 + 2**-20]], np.float32)
    want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_exact(down(ops.linear(up(x), up(weight))), want)
    assert_exact(down(ops.linear(up(x), up(weight), activations="float32")), x)


@pytest.mark.parametrize("wrong", ["a slice of K left out", "weight rows shifted", "bias missing"])
def test_wrong_results_are_rejected(wrong):
    x, weight = case(3, 17, 800)
    bias = normal(np.random.default_rng(1), (17,))
    w = weight.copy()
    if wrong == "a slice of K left out":
        w[:, 768:] = 0
    if wrong == "weight rows shifted":
        w = np.roll(w, 1, 0)
    bad = reference.linear(round_activations(x, "bf16"), w, None if wrong == "bias missing" else bias)
    with pytest.raises(AssertionError):
        check(bad.astype(np.float32), x, weight, "bf16", bias)


@pytest.mark.parametrize("num_tokens", [1, 3, 13, 40, 66])
@pytest.mark.parametrize("activations", ["bf16", "float32"])
@pytest.mark.parametrize("sizes", [(20, 4, 33), (16,), (1, 0, 40, 16, 15, 17, 2, 3, 5)])
def test_a_group_is_its_layers(gpu, num_tokens, activations, sizes):
    rng = np.random.default_rng(0)
    x = normal(rng, (num_tokens, 72))
    layers = [(normal(rng, (n, 72), "bfloat16"), None, normal(rng, (n,)) if n > 4 else None) for n in sizes]
    held = [tuple(None if a is None else up(a) for a in layer) for layer in layers]
    out = up(np.full((num_tokens, sum(sizes)), np.nan, np.float32), 3)
    assert ops.linear_group(up(x), held, activations=activations, out=out) is out
    want = [down(ops.linear(up(x), w, b, activations=activations)) for w, _, b in held]
    assert_exact(down(out), np.concatenate(want, axis=1))


def test_a_group_names_the_layer_that_is_wrong(gpu):
    weights = [up(np.ones((n, 8), BF16)) for n in (20, 4)]
    with pytest.raises(ValueError, match=r"bias\[1\] has shape"):
        cuda.linear_group(
            up(np.ones((3, 8), np.float32)),
            [(weights[0], None, None), (weights[1], None, up(np.ones(5, np.float32)))],
        )


def test_nothing_to_do(gpu):
    x, weight = case(0, 5, 8)
    assert down(ops.linear(up(x), up(weight))).shape == (0, 5)


def test_bad_arguments(gpu):
    x, weight = (up(a) for a in case(2, 4, 32))
    with pytest.raises(ValueError, match="activations is 'int8'; wanted 'float32' or 'bf16' on a GPU"):
        cuda.linear(x, weight, activations="int8")
    with pytest.raises(TypeError, match="weight has dtype int8; wanted bfloat16"):
        scales = up(np.ones((4, 1), BF16))
        cuda.linear(x, up(np.ones((4, 32), np.int8)), scales=scales)
    with pytest.raises(ValueError, match="weight is packed for a CPU"):
        cuda.linear(x, up(np.ones((1, 1, 512), BF16)), out=up(np.zeros((2, 16), np.float32)))
    with pytest.raises(ValueError, match="out shares memory with x"):
        cuda.linear(x, up(np.ones((32, 32), BF16)), out=x)
