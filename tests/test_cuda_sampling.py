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


def test_copies_go_to_the_row_of_the_positions_parity(gpu):
    logits = normal(np.random.default_rng(0), (4, 5000))
    positions = np.array([6, 3, 0, 2**40 + 1])
    ids, logprobs = gpu.Pinned((2, 4), "int64"), gpu.Pinned((2, 4), "float32")
    ids.host[:], logprobs.host[:] = -7, -7
    want = [down(a) for a in cuda.greedy_sample(up(logits), copies=(up(positions), ids.array, logprobs.array))]
    for copies, values in zip((ids.host, logprobs.host), want, strict=True):
        expected = np.full((2, 4), -7, copies.dtype)
        expected[positions % 2, np.arange(4)] = values
        assert_exact(copies, expected)
    with pytest.raises(ValueError, match=r"token_id_copies has shape \(2, 4\)"):
        cuda.greedy_sample(up(logits[:3]), copies=(up(positions[:3]), ids.array, logprobs.array))


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


# Drawing: what the sampler draws with the same numbers


def draw(logits, params, uniforms, **kwargs):
    """Draw once for every row; `params` and `uniforms` are one for all rows, or one each."""
    count = len(logits)
    params = params if isinstance(params, list) else [params] * count
    columns = {
        name: up(np.array([getattr(p, name) for p in params], np.int64 if name == "top_k" else np.float64))
        for name in ("temperature", "top_p", "top_k", "min_p")
    }
    both = np.stack([np.broadcast_to(uniforms, count), np.full(count, np.nan)]).astype(np.float64)
    ids, logprobs = cuda.sample(
        up(logits), **columns, uniforms=up(both), positions=up(np.zeros(count, np.int64)), **kwargs
    )
    return down(ids), down(logprobs)


class Given(Sampler):
    """A sampler that draws with a given number."""

    def __init__(self, params, uniform):
        super().__init__(params)
        self._coming = [float(uniform)]


PARAMS = {
    "temperature": SamplingParams(1.0),
    "hot": SamplingParams(30.0),
    "cold": SamplingParams(0.05),
    "nearly frozen": SamplingParams(1e-300),
    "greedy": SamplingParams(0.0, top_p=0.5, top_k=3),
    "top_k": SamplingParams(1.5, top_k=5),
    "top_k of all": SamplingParams(1.5, top_k=10**9),
    "top_p": SamplingParams(1.2, top_p=0.7),
    "next to no top_p": SamplingParams(1.2, top_p=1e-12),
    "min_p": SamplingParams(2.0, min_p=0.2),
    "min_p of one": SamplingParams(2.0, min_p=1.0),
    "all": SamplingParams(1.3, top_p=0.9, top_k=40, min_p=0.01),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("vocab_size", [1, 3, 700, 5000])
def test_draws_what_the_sampler_draws(gpu, params, vocab_size):
    rng = np.random.default_rng(vocab_size)
    uniforms = np.concatenate([[0.0, 1 - 2.0**-53], rng.random(10)])
    logits = normal(rng, (len(uniforms), vocab_size), scale=4.0)
    ids, logprobs = draw(logits, params, uniforms)
    assert gpu.last_kernels()["sample"] == "sample_sm80_kernel"
    want = [Given(params, u)(row) for u, row in zip(uniforms, logits, strict=True)]
    # The last token before 1 is a matter of the last bit.
    own = np.arange(len(uniforms)) != 1
    assert_exact(ids[own], np.array([token for token, _ in want])[own])
    at = np.arange(len(ids)), ids
    exact = torch.log_softmax(torch.from_numpy(logits).double(), 1).numpy()[at]
    baseline = torch.log_softmax(torch.from_numpy(logits), 1).numpy()[at]
    assert_close(logprobs, exact, baseline=baseline, scale=np.abs(logits).max())  # which is what cancels


def test_many_equal_logits(gpu):
    """More in a bin than a list holds: by the bytes of their order instead."""
    rng = np.random.default_rng(0)
    logits = np.round(normal(rng, (6, 3000))).astype(np.float32) * 1e-4
    logits[3] = 0
    logits[4, 100:] = -np.inf
    uniforms = rng.random(6)
    for params in (SamplingParams(1.0), SamplingParams(1.0, top_k=1500, top_p=0.6)):
        ids, _ = draw(logits, params, uniforms)
        assert ids.tolist() == [Given(params, u)(row)[0] for u, row in zip(uniforms, logits, strict=True)]


def test_rows_draw_each_their_own_way(gpu):
    params = list(PARAMS.values())
    rng = np.random.default_rng(0)
    logits, uniforms = normal(rng, (len(params), 900), scale=3.0), rng.random(len(params))
    together = draw(logits, params, uniforms)
    for i, one in enumerate(params):
        for got, alone in zip(together, draw(logits[i : i + 1], one, uniforms[i]), strict=True):
            assert_exact(got[i : i + 1], alone)


def test_draws_follow_the_probabilities(gpu):
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), (40, 1))
    uniforms = (np.arange(40) + 0.5) / 40
    for top_p, want in ((1.0, [20, 12, 6, 2]), (0.75, [25, 15])):
        ids, _ = draw(logits, SamplingParams(1.0, top_p=top_p), uniforms)
        assert np.bincount(ids).tolist() == want


def test_broken_logits_are_told(gpu):
    logits = np.zeros((4, 300), np.float32)
    logits[0, 7], logits[1, 9], logits[2] = np.nan, np.inf, -np.inf
    _, logprobs = draw(logits, SamplingParams(1.0), 0.5)
    assert np.isnan(logprobs).tolist() == [True, True, True, False]


def test_uniforms_and_copies_go_by_the_positions_parity(gpu):
    logits = np.zeros((2, 10), np.float32)
    one = [
        up(np.array([x, x], t)) for x, t in ((1.0, np.float64), (1.0, np.float64), (0, np.int64), (0.0, np.float64))
    ]
    uniforms, ids = gpu.Pinned((2, 2), "float64"), gpu.Pinned((2, 2), "int64")
    uniforms.host[:] = [[0.05, 0.15], [0.25, 0.35]]
    logprobs = gpu.Pinned((2, 2), "float32")
    for positions, want in (([4, 4], [0, 1]), ([7, 7], [2, 3]), ([2, 1], [0, 3])):
        got = cuda.sample(
            up(logits), *one, uniforms.array, up(np.array(positions)), copies=(ids.array, logprobs.array)
        )
        assert down(got[0]).tolist() == want
        at = np.array(positions) % 2, np.arange(2)
        assert ids.host[at].tolist() == want
        assert_exact(logprobs.host[at], down(got[1]))


def test_bad_parameters_are_named(gpu):
    logits, row = up(np.zeros((2, 10), np.float32)), up(np.ones(2))
    whole, both = up(np.zeros(2, np.int64)), up(np.zeros((2, 2)))
    with pytest.raises(TypeError, match="top_k has dtype float64"):
        cuda.sample(logits, row, row, row, row, both, whole)
    with pytest.raises(ValueError, match=r"uniforms has shape \(2,\)|uniforms has shape"):
        cuda.sample(logits, row, row, whole, row, row, whole)
    with pytest.raises(ValueError, match="logprobs shares memory with"):
        cuda.sample(
            logits, row, row, whole, row, both, whole, out=(up(np.zeros(2, np.int64)), logits[:1, :2].reshape(2))
        )
