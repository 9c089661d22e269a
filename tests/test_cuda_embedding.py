"""embedding on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from compare import assert_exact
from cuda_helpers import down, poisoned_up, up
from mxmoe import ops
from op_helpers import FLOATS, normal


@pytest.mark.parametrize("hidden_size", [1, 5, 32, 1023, 1024, 1025, 2880])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gap", [0, 1, 4])
def test_rows_come_exactly(gpu, hidden_size, dtype, gap):
    weight = normal(np.random.default_rng(0), (9, hidden_size), dtype)
    ids = np.array([8, 0, 3, 3, 7])
    out = poisoned_up((5, hidden_size))
    assert ops.embedding(ids, up(weight, gap), out=out) is out
    assert_exact(down(out), weight[ids].astype(np.float32))


@pytest.mark.parametrize("ids", [[2, 1], (2, 1), np.array([2, 1], np.int32)])
def test_ids_from_the_host_in_any_form(gpu, ids):
    weight = normal(np.random.default_rng(0), (3, 8))
    assert_exact(down(ops.embedding(ids, up(weight))), weight[[2, 1]])
    assert_exact(down(ops.embedding(up(np.array([2, 1])), up(weight))), weight[[2, 1]])


def test_ids_out_of_range_give_nan(gpu):
    weight = normal(np.random.default_rng(0), (3, 8))
    got = down(ops.embedding([1, -1, 3, 2**62, 2], up(weight)))
    assert np.isnan(got[1:4]).all()
    assert_exact(got[[0, 4]], weight[[1, 2]])


def test_ids_must_be_integers(gpu):
    with pytest.raises(TypeError, match="token_ids has dtype float64; wanted integers"):
        ops.embedding([0.5], up(np.zeros((3, 8), np.float32)))
    with pytest.raises(TypeError, match="token_ids has dtype int32; wanted int64"):
        ops.embedding(up(np.zeros(2, np.int32)), up(np.zeros((3, 8), np.float32)))
