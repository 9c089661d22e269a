"""expert_routing and expert_offsets against float64, torch and themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from mxmoe import _core, ops
from mxmoe.reference import ops as reference
from op_helpers import assert_rows_stand_alone, normal, strided, to_torch

EXPERTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 128, 1000]
NAN, INF = np.nan, np.inf


def logits(num_tokens, num_experts, seed=0):
    return normal(np.random.default_rng(seed), (num_tokens, num_experts), scale=3.0)


def torch_weights(router_logits, ids):
    chosen = to_torch(router_logits).gather(1, to_torch(ids).long())
    return torch.softmax(chosen, dim=1)


def check(router_logits, k):
    ids, weights = ops.expert_routing(router_logits, k)
    want_ids, want_weights = reference.expert_routing(router_logits, k)
    assert_exact(ids, want_ids)
    assert_close(weights, want_weights, baseline=torch_weights(router_logits, want_ids), scale=1.0)
    return ids, weights


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_matches_float64_and_torch(isa, num_experts, k):
    k = min(k, num_experts)
    router_logits = logits(17, num_experts)
    ids, _ = check(router_logits, k)
    assert_exact(ids, to_torch(router_logits).topk(k, dim=1).indices.int())


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 129])
def test_any_number_of_tokens(isa, num_tokens):
    check(logits(num_tokens, 32), 4)


def test_all_experts_chosen_is_a_full_sort(isa):
    ids, weights = check(logits(5, 33), 33)
    assert_exact(np.sort(ids, axis=1), np.tile(np.arange(33, dtype=np.int32), (5, 1)))
    assert (np.diff(weights, axis=1) <= 0).all()


def test_experts_no_machine_word_bounds(isa):
    check(logits(2, 65536), 4)
    with pytest.raises(ValueError, match="router_logits has 65537 experts; wanted at most 65536"):
        ops.expert_routing(logits(1, 65537), 4)


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 2, 1, 2, 1, 2], [1, 3, 5, 2]),
        ([0.0, -0.0, 0.0, -0.0, -1, 1], [5, 0, 1, 2]),
        ([-INF, -INF, 3, -INF, -INF, -INF], [2, 0, 1, 3]),
        ([-INF] * 6, [0, 1, 2, 3]),
        ([1, INF, 2, INF, 0, 0], [1, 3, 2, 0]),
        ([NAN, 1, NAN, 2, NAN, 0], [3, 1, 5, 0]),
        ([NAN, -INF, NAN, -INF, NAN, NAN], [1, 3, 0, 2]),
        ([NAN] * 6, [0, 1, 2, 3]),
        ([3e38, -3e38, 3e38, -3e38, 1e-45, 0], [0, 2, 4, 5]),
    ],
)
@pytest.mark.parametrize("shift", [0, 3, 13, 27])
def test_ties_infinities_and_nan(isa, row, want, shift):
    # Shifted behind worse experts, so that the row lies in other lanes and across vectors.
    full = np.full((1, shift + 6), NAN, np.float32)
    full[0, shift:] = row
    usable = sum(not np.isnan(x) for x in row)
    ids, weights = ops.expert_routing(full, 4)
    expected = [shift + e for e in want[:usable]] + list(range(shift + 6))
    skip = [e for e in range(shift + 6) if e not in expected[:usable]]
    assert_exact(ids[0], np.array((expected[:usable] + skip)[:4], np.int32))
    with np.errstate(invalid="ignore"):
        _, want_weights = reference.expert_routing(full[:, ids[0]], 4)
    assert_exact(np.isnan(weights), np.isnan(want_weights))


def test_ties_across_many_lanes(isa):
    router_logits = np.random.default_rng(0).integers(0, 3, (50, 128)).astype(np.float32)
    check(router_logits, 8)


def test_softmax_of_far_apart_logits(isa):
    ids, weights = ops.expert_routing(np.array([[-1e30, 0, 1e30], [200, 100, 0]], np.float32), 3)
    assert_exact(ids, np.array([[2, 1, 0], [0, 1, 2]], np.int32))
    assert_exact(weights[0], np.array([1, 0, 0], np.float32))
    assert weights[1, 0] == 1.0 and 0 < weights[1, 1] < 1e-43 and weights[1, 2] == 0.0


def test_row_strides(isa):
    router_logits = logits(6, 37)
    for got, want in zip(
        ops.expert_routing(strided(router_logits), 4), ops.expert_routing(router_logits, 4), strict=True
    ):
        assert_exact(got, want)


def test_rows_stand_alone(isa):
    router_logits = logits(50, 37)
    for part in (0, 1):
        assert_rows_stand_alone(lambda rows, part=part: ops.expert_routing(router_logits[rows], 4)[part], 50)


WRONG = {
    "softmax over all experts": lambda x, ids: np.take_along_axis(torch.softmax(to_torch(x), 1).numpy(), ids, 1),
    "weights in order of expert": lambda x, ids: torch_weights(x, np.sort(ids, axis=1)).numpy(),
    "sigmoid": lambda x, ids: torch.sigmoid(to_torch(np.take_along_axis(x, ids, 1))).numpy(),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_weights_are_rejected(wrong):
    router_logits = logits(17, 32)
    ids, weights = reference.expert_routing(router_logits, 4)
    with pytest.raises(AssertionError):
        assert_close(wrong(router_logits, ids), weights, baseline=torch_weights(router_logits, ids), scale=1.0)


def test_a_tie_the_wrong_way_round_is_rejected():
    ids, _ = reference.expert_routing(np.zeros((1, 8), np.float32), 4)
    with pytest.raises(AssertionError):
        assert_exact(ids[:, ::-1], ids)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_experts_per_token_out_of_range(k):
    with pytest.raises(ValueError, match=f"experts_per_token is {k}; wanted 1 to num_experts = 5"):
        ops.expert_routing(logits(2, 5), k)
    if k >= 0:
        ids, weights = np.zeros((2, k), np.int32), np.zeros((2, k), np.float32)
        with pytest.raises(ValueError, match=f"experts_per_token is {k}; wanted 1 to num_experts = 5"):
            _core.expert_routing(logits(2, 5), ids, weights)


@pytest.mark.parametrize("num_experts", [1, 5, 32, 128])
@pytest.mark.parametrize(("num_tokens", "k"), [(0, 4), (1, 1), (7, 2), (33, 4), (3, 0)])
def test_offsets(num_experts, num_tokens, k):
    ids = np.random.default_rng(0).integers(0, num_experts, (num_tokens, k)).astype(np.int32)
    offsets, order = ops.expert_offsets(ids, num_experts)
    want_offsets, want_order = reference.expert_offsets(ids, num_experts)
    assert_exact(offsets, want_offsets)
    assert_exact(order, want_order)
    by_torch = torch.sort(torch.from_numpy(ids).reshape(-1), stable=True)
    assert_exact(order, by_torch.indices.int())
    counts = torch.bincount(torch.from_numpy(ids).reshape(-1), minlength=num_experts)
    assert_exact(offsets[1:], counts.cumsum(0).int())


def test_offsets_with_empty_experts_and_all_in_one():
    offsets, order = ops.expert_offsets(np.full((4, 2), 3, np.int32), 6)
    assert offsets.tolist() == [0, 0, 0, 0, 8, 8, 8]
    assert order.tolist() == list(range(8))


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_offsets_of_unknown_experts(bad):
    ids = np.array([[0, 4], [bad, 1]], np.int32)
    with pytest.raises(ValueError, match=f"topk_ids holds expert {bad}; wanted 0 to 4"):
        ops.expert_offsets(ids, 5)


@pytest.mark.parametrize("num_experts", [0, -3, 65537, 10**15])
def test_offsets_of_a_senseless_number_of_experts(num_experts):
    with pytest.raises(ValueError, match=f"num_experts is {num_experts}; wanted 1 to 65536"):
        ops.expert_offsets(np.zeros((1, 1), np.int32), num_experts)


def test_offsets_check_the_number_of_experts_below_python_too():
    with pytest.raises(ValueError, match="num_experts is 0; wanted 1 to 65536"):
        _core.expert_offsets(np.zeros((1, 1), np.int32), 0, np.zeros(1, np.int32), np.zeros(1, np.int32))
