"""greedy_sample on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from mxmoe import cuda
from mxmoe.sampling import Sampler, SamplingParams
from op_helpers import normal


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 257, 4095, 4096, 4097, 20000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_matches_the_sampler(gpu, vocab_size, scale):
    logits = normal(np.random.default_rng(0), (3, vocab_size), scale=scale)
    out = poisoned_up((3,), np.int64), poisoned_up((3,))
    for _ in range(2):  # the counters must be as the second launch wants them
        cuda.greedy_sample(up(logits), out=out)
    ids, logprobs = (down(a) for a in out)
    sampler = Sampler(SamplingParams())
    want = [sampler(row) for row in logits]
    assert ids.tolist() == [token for token, _ in want]
    baseline = torch.log_softmax(torch.from_numpy(logits), 1).amax(dim=1)
    assert_close(logprobs, np.array([logprob for _, logprob in want]), baseline=baseline, scale=1.0)


def test_ties_nan_and_infinity(gpu):
    logits = np.zeros((5, 9000), np.float32)
    logits[0, [8999, 5000]] = 2
    logits[1, [7, 8000]] = np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    logits[4, :8999] = -np.inf
    ids, logprobs = (down(a) for a in cuda.greedy_sample(up(logits)))
    assert ids.tolist() == [5000, 7, 3, 0, 8999]
    assert np.isnan(logprobs).tolist() == [False, True, True, True, False]
    assert logprobs[4] == 0


def test_rows_stand_alone(gpu):
    logits = normal(np.random.default_rng(0), (7, 5000))
    assert_rows_stand_alone_on_gpu(lambda rows: down(cuda.greedy_sample(up(logits[rows]))[1]), 7, (1, 3))


def test_rows_may_be_apart(gpu):
    logits = normal(np.random.default_rng(0), (3, 100))
    for got, want in zip(cuda.greedy_sample(up(logits, 5)), cuda.greedy_sample(up(logits)), strict=True):
        assert_exact(down(got), down(want))


def test_nothing_and_nonsense(gpu):
    ids, logprobs = cuda.greedy_sample(up(np.zeros((0, 8), np.float32)))
    assert down(ids).shape == down(logprobs).shape == (0,)
    with pytest.raises(ValueError, match="logits has vocab_size 0"):
        cuda.greedy_sample(up(np.zeros((2, 0), np.float32)))
