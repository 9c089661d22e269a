"""embedding against the reference and torch: a copy, so everything is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import assert_exact
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import FLOATS, guarded, normal, strided, strided_output, to_torch


def matrix(vocab_size=50, hidden_size=33, dtype="float32"):
    return normal(np.random.default_rng(0), (vocab_size, hidden_size), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden_size", [1, 7, 16, 33, 2880])
@pytest.mark.parametrize("num_tokens", [0, 1, 19])
def test_rows_are_copied(dtype, hidden_size, num_tokens):
    weight = matrix(50, hidden_size, dtype)
    ids = np.random.default_rng(1).integers(0, 50, num_tokens)
    got = guarded(ops.embedding, ids, weight, shape=(num_tokens, hidden_size), misalign=1)
    assert_exact(got, reference.embedding(ids, weight).astype(np.float32))
    assert_exact(got, torch.nn.functional.embedding(torch.from_numpy(ids), to_torch(weight)).float())


@pytest.mark.parametrize("dtype", FLOATS)
def test_row_strides(dtype):
    weight = matrix(dtype=dtype)
    out, beside = strided_output((3, 33), np.float32)
    assert_exact(ops.embedding([49, 0, 49], strided(weight), out=out), weight[[49, 0, 49]].astype(np.float32))
    beside()


@pytest.mark.parametrize(
    "ids",
    [[3, 1], (3, 1), range(3, 0, -2), np.array([3, 1], np.uint8), np.array([3, 1], ">i4"), torch.tensor([3, 1])],
)
def test_ids_of_any_kind(ids):
    assert_exact(ops.embedding(ids, matrix()), matrix()[[3, 1]])


def test_nan_rows_touch_nobody():
    weight = matrix()
    weight[5] = np.nan
    got = ops.embedding([4, 5, 6], weight)
    assert_exact(got, weight[4:7])
    with pytest.raises(AssertionError):
        assert_exact(ops.embedding([4, 6, 5], weight), weight[4:7])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 50], ValueError, r"token_ids\[1\] is 50; wanted 0 to 49"),
        ([-1], ValueError, r"token_ids\[0\] is -1; wanted 0 to 49"),
        ([2**62], ValueError, r"token_ids\[0\] is 4611686018427387904"),
        ([2**70], TypeError, "token_ids has dtype object; wanted integers"),
        ([0.5], TypeError, "token_ids has dtype float64; wanted integers"),
        ([True], TypeError, "token_ids has dtype bool; wanted integers"),
        ([[0, 1]], ValueError, r"token_ids has shape \(1, 2\)"),
        (3, ValueError, "token_ids has no axes"),
        ("hello", TypeError, "token_ids has dtype <U5; wanted integers"),
        (None, TypeError, "token_ids has dtype object; wanted integers"),
        ([[0], [1, 2]], TypeError, "token_ids is no array of integers"),
    ],
)
def test_ids_of_nonsense_write_nothing(ids, error, message):
    out = np.full((len(ids) if isinstance(ids, list) else 1, 33), 7, np.float32)
    with pytest.raises(error, match=message):
        ops.embedding(ids, matrix(), out=out)
    assert (out == 7).all()


def test_an_empty_vocabulary():
    assert ops.embedding([], np.zeros((0, 8), np.float32)).shape == (0, 8)
    with pytest.raises(ValueError, match=r"token_ids\[0\] is 0; wanted 0 to -1"):
        ops.embedding([0], np.zeros((0, 8), np.float32))
