"""expert_routing, alone and fused with the norm and the router, on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from mxmoe import cuda, ops
from mxmoe.reference import ops as reference
from op_helpers import FLOATS, normal, to_torch, wide

EPS = 1e-5


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"), [(1, 1, 1), (3, 8, 2), (9, 32, 4), (17, 128, 4), (2, 33, 33), (1, 1000, 7)]
)
def test_matches_the_reference(gpu, num_tokens, num_experts, k):
    logits = normal(np.random.default_rng(0), (num_tokens, num_experts), scale=3.0)
    ids, weights = ops.expert_routing(up(logits), k)
    want_ids, want = reference.expert_routing(logits, k)
    assert_exact(down(ids), want_ids)
    chosen = torch.from_numpy(np.take_along_axis(logits, want_ids, 1))
    assert_close(down(weights), want, baseline=torch.softmax(chosen, 1))


def test_ties_go_to_the_lower_expert_and_nan_comes_last(gpu):
    inf, nan = np.inf, np.nan
    logits = np.array(
        [[1, 2, 2, 1, 2], [0.0, -0.0, -1, -0.0, 0.0], [nan, 1, nan, -inf, 2], [nan] * 5, [-inf] * 5], np.float32
    )
    ids, _ = cuda.expert_routing(up(logits), 4)
    assert down(ids).tolist() == [[1, 2, 4, 0], [0, 1, 3, 4], [4, 1, 3, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert_exact(down(ids), ops.expert_routing(logits, 4)[0])


def test_rows_stand_alone(gpu):
    logits = normal(np.random.default_rng(0), (11, 40))
    assert_rows_stand_alone_on_gpu(lambda rows: down(ops.expert_routing(up(logits[rows]), 4)[1]), 11)


@pytest.mark.parametrize("k", [0, 9])
def test_k_out_of_range(gpu, k):
    with pytest.raises(ValueError, match=f"experts_per_token is {k}; wanted 1 to num_experts = 8"):
        ops.expert_routing(up(np.zeros((2, 8), np.float32)), k)


def fused_case(num_tokens, hidden_size, num_experts, x_dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x = normal(rng, (num_tokens, hidden_size), x_dtype)
    norm = normal(rng, (hidden_size,), "bfloat16") + 1
    weight = normal(rng, (num_experts, hidden_size), "bfloat16", hidden_size**-0.5)
    return x, norm.astype(weight.dtype), weight, normal(rng, (num_experts,), "bfloat16")


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "num_experts", "k"),
    [(1, 1, 1, 1), (1, 160, 8, 2), (2, 33, 9, 3), (3, 2880, 32, 4), (5, 130, 128, 4), (7, 8192, 4, 1)],
)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("h_dtype", FLOATS)
def test_fused_with_norm_and_router(gpu, num_tokens, hidden_size, num_experts, k, x_dtype, h_dtype):
    x, norm, weight, bias = fused_case(num_tokens, hidden_size, num_experts, x_dtype)
    out = (
        poisoned_up(x.shape, FLOATS[h_dtype]),
        poisoned_up((num_tokens, num_experts)),
        poisoned_up((num_tokens, k), np.int32),
        poisoned_up((num_tokens, k)),
    )
    arrays = [up(a) for a in (x, norm, weight, bias)]
    for _ in range(2):  # the counters must be as the second launch wants them
        cuda.rmsnorm_routing(arrays[0], arrays[1], EPS, arrays[2], arrays[3], k, out=out)
    h, logits, ids, weights = (down(a) for a in out)
    row = torch.nn.functional.rms_norm(to_torch(x).float(), (hidden_size,), to_torch(norm).float(), EPS)
    exact = reference.rmsnorm(x, norm, EPS)
    assert_close(h, exact, baseline=row.to(getattr(torch, h_dtype)), dtype=h_dtype)
    baseline = row @ to_torch(weight).float().T + to_torch(bias).float()
    scale = (
        np.linalg.norm(exact, axis=1, keepdims=True) * np.sqrt(np.mean(wide(weight) ** 2)) + np.abs(wide(bias)).max()
    )
    assert_close(logits, reference.linear(exact, weight, bias), baseline=baseline, scale=scale)
    # The choice is judged on the logits that were made: ties of their rounding are no error.
    want_ids, want = reference.expert_routing(logits, k)
    assert_exact(ids, want_ids)
    chosen = torch.from_numpy(np.take_along_axis(logits, want_ids, 1))
    assert_close(weights, want, baseline=torch.softmax(chosen, 1))


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "num_experts"), [(1, 1, 1), (3, 33, 9), (9, 2880, 32), (2, 3100, 12), (5, 130, 40)]
)
@pytest.mark.parametrize("h_dtype", FLOATS)
@pytest.mark.parametrize("gap", [0, 3])
def test_fused_bits_are_those_of_its_parts(gpu, num_tokens, hidden_size, num_experts, h_dtype, gap):
    x, norm, weight, bias = fused_case(num_tokens, hidden_size, num_experts)
    x, weight, norm, bias = up(x), up(weight, gap), up(norm), up(bias)
    got = cuda.rmsnorm_routing(x, norm, EPS, weight, bias, 1, h_dtype=h_dtype)
    h = cuda.rmsnorm(x, norm, EPS)
    logits = cuda.linear(h, weight, bias, activations="float32")
    want = (h, logits, *cuda.expert_routing(logits, 1))
    for a, b in zip(got, want, strict=True):
        assert_exact(down(a), down(b).astype(down(a).dtype))


def test_fused_rows_stand_alone(gpu):
    x, *rest = fused_case(9, 100, 20)
    norm, weight, bias = (up(a) for a in rest)
    compute = lambda rows: down(cuda.rmsnorm_routing(up(x[rows]), norm, EPS, weight, bias, 4)[1])  # noqa: E731
    assert_rows_stand_alone_on_gpu(compute, 9, (1, 2, 3))


def test_fused_names_what_is_wrong(gpu):
    x, norm, weight, bias = (up(a) for a in fused_case(2, 32, 4))
    with pytest.raises(ValueError, match=r"router_bias has shape \(4,\)"):
        cuda.rmsnorm_routing(x, norm, EPS, weight[:3], bias, 2)
    with pytest.raises(ValueError, match="experts_per_token is 5"):
        cuda.rmsnorm_routing(x, norm, EPS, weight, bias, 5)
    with pytest.raises(ValueError, match="x has hidden_size 8193; wanted 1 to 8192"):
        big = [up(a) for a in fused_case(1, 8193, 1)]
        cuda.rmsnorm_routing(big[0], big[1], EPS, big[2], big[3], 1)
