"""From logits to the next token: the distribution that is drawn from, its cuts, and repeatability."""

from __future__ import annotations

import math
import warnings
from collections import Counter

import numpy as np
import pytest

import checkpoints
from mxmoe.sampling import Sampler, SamplingParams

DRAWS = 20_000
# Of a chi-square distribution with n degrees of freedom, in terms of its mean n and standard deviation sqrt(2n): a
# right sampler passes six of them once in some million seeds, and these seeds are fixed.
SIGMAS = 6.0


def softmax(x):
    e = np.exp(np.asarray(x, float) - np.max(x))
    return e / e.sum()


def draw(logits, count=DRAWS, seed=0, **params):
    sampler = Sampler(SamplingParams(**({"temperature": 1.0} | params)), seed)
    logits = np.asarray(logits, np.float32)
    return [sampler(logits)[0] for _ in range(count)]


def chi_square(tokens, p):
    """How far counts of tokens are from probabilities, in standard deviations of chi-square above its mean."""
    counts = np.bincount(tokens, minlength=len(p))
    assert (counts[p == 0] == 0).all(), "a token of probability 0 was drawn"
    expected = len(tokens) * p[p > 0]
    assert expected.min() > 5, "too few draws for the approximation"
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


LOGITS = np.random.default_rng(0).standard_normal(30)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_temperature(temperature):
    tokens = draw(LOGITS, temperature=temperature)
    assert chi_square(tokens, softmax(LOGITS / temperature)) < SIGMAS
    # Another temperature would be seen.
    assert chi_square(tokens, softmax(LOGITS / (temperature * 1.2))) > SIGMAS


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_what_a_cut_leaves_keeps_its_proportions(cut):
    p = softmax(LOGITS)
    order = np.argsort(-p)
    p[order[cut.get("top_k", 30) :]] = 0
    p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    p[order[before >= cut.get("top_p", 1)]] = 0
    p[p < cut.get("min_p", 0) * p.max()] = 0
    assert 2 < np.count_nonzero(p) < 30
    assert chi_square(draw(LOGITS, **cut), p / p.sum()) < SIGMAS


def test_order_of_tokens_does_not_matter():
    order = np.random.default_rng(1).permutation(30)
    tokens = draw(LOGITS[order])
    assert chi_square(tokens, softmax(LOGITS[order])) < SIGMAS


@pytest.mark.parametrize("top_k", [1, 2, 7, 29, 30, 1000])
def test_top_k(top_k):
    p = softmax(LOGITS)
    p[np.argsort(-p)[top_k:]] = 0
    tokens = draw(LOGITS, top_k=top_k)
    if top_k == 1:
        assert set(tokens) == {int(np.argmax(LOGITS))}
    else:
        assert chi_square(tokens, p / p.sum()) < SIGMAS


EIGHTHS = np.log([4 / 8, 2 / 8, 1 / 8, 1 / 8])  # exact in binary but for the logarithm


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, 1), (0.3, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.874, 3), (0.876, 4), (1.0, 4)],
)
def test_top_p_takes_the_fewest_that_reach_it(top_p, kept):
    assert set(draw(EIGHTHS, 300, top_p=top_p)) == set(range(kept))


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_top_p_is_reached_by_equality(top_p):
    # Four tokens of exactly a quarter each.
    assert set(draw([1.0, 1.0, 1.0, 1.0], 300, top_p=top_p)) == set(range(round(top_p * 4)))


@pytest.mark.parametrize(("min_p", "kept"), [(1.0, 1), (0.501, 1), (0.499, 2), (0.251, 2), (0.249, 4), (0.0, 4)])
def test_min_p_is_a_share_of_the_likeliest(min_p, kept):
    assert set(draw(EIGHTHS, 300, min_p=min_p)) == set(range(kept))


def test_min_p_keeps_equals():
    assert set(draw([2.0, 2.0, 1.0], 300, min_p=1.0)) == {0, 1}


def test_cuts_come_after_the_temperature_and_one_after_the_other():
    # At temperature 2 the shares 16 : 4 : 1 become 4 : 2 : 1; of the two likeliest, 2/3 and 1/3 then.
    logits = np.log([16.0, 4.0, 1.0])
    assert set(draw(logits, 300, temperature=2.0, top_k=2, top_p=0.66)) == {0}
    assert set(draw(logits, 300, temperature=2.0, top_k=2, top_p=0.68)) == {0, 1}
    assert set(draw(logits, 300, temperature=1.0, top_k=2, top_p=0.68)) == {0}
    assert set(draw(logits, 300, temperature=2.0, min_p=0.4)) == {0, 1}
    assert set(draw(logits, 300, temperature=1.0, min_p=0.4)) == {0}
    assert chi_square(draw(logits, temperature=2.0, top_k=2), np.array([2 / 3, 1 / 3, 0.0])) < SIGMAS


def test_greedy_takes_the_lowest_of_equals():
    greedy = Sampler(SamplingParams())
    for logits, token in (([1, 3, 3, 2], 1), ([0, 0, 0], 0), ([-np.inf, -5, -5], 1), ([7], 0)):
        assert greedy(np.array(logits, np.float32))[0] == token


def test_cuts_between_equals_keep_the_lower():
    assert set(draw([0.0, 1.0, 1.0, 1.0], 300, top_k=2)) == {1, 2}
    assert set(draw([1.0, 1.0, 1.0, 1.0], 300, top_p=0.5)) == {0, 1}


def test_a_vanishing_temperature_is_greedy():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (1e-3, 1e-30, 5e-324):
            assert set(draw([1.0, 2.0, 1.9], 50, temperature=temperature)) == {1}


def test_an_enormous_temperature_is_uniform():
    assert chi_square(draw(LOGITS, temperature=1e6), np.full(30, 1 / 30)) < SIGMAS


def test_forbidden_tokens_are_never_drawn():
    logits = LOGITS.copy()
    logits[[0, 5, int(np.argmax(LOGITS))]] = -np.inf
    for params in ({}, {"top_k": 30}, {"top_p": 0.9999}, {"min_p": 1e-9}, {"temperature": 100.0}):
        assert not {0, 5, int(np.argmax(LOGITS))} & set(draw(logits, 2000, **params))


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.1}]
)
def test_logprobs_are_of_the_model_s_own_distribution(params):
    sampler = Sampler(SamplingParams(**({"temperature": 1.0} | params)), 3)
    want = np.log(softmax(LOGITS.astype(np.float32)))
    for _ in range(100):
        token, logprob = sampler(LOGITS.astype(np.float32))
        assert isinstance(token, int)
        assert isinstance(logprob, float)
        assert logprob == pytest.approx(want[token], abs=1e-12)


def test_logprobs_of_large_and_tiny_logits():
    greedy = Sampler(SamplingParams())
    assert greedy(np.array([3e38, -3e38], np.float32)) == (0, 0.0)
    assert greedy(np.array([-3e38, -3e38], np.float32)) == (0, pytest.approx(-math.log(2)))
    assert greedy(np.full(1000, 1e-30, np.float32))[1] == pytest.approx(-math.log(1000))


def test_the_logits_are_left_alone():
    logits = LOGITS.astype(np.float32)
    logits.flags.writeable = False
    draw(logits, 10, top_k=3, top_p=0.5, min_p=0.1)


def test_seeds_repeat_and_differ():
    runs = [draw(LOGITS, 200, seed=seed) for seed in (0, 0, 1, 2**63, np.int64(1))]
    assert runs[0] == runs[1]
    assert runs[2] == runs[4]
    assert len({tuple(run) for run in runs}) == 3


def test_successive_draws_are_independent():
    pairs = Counter(zip(*[iter(draw([0.0, 0.0], 8000))] * 2, strict=True))
    counts = np.array([pairs[i, j] for i in (0, 1) for j in (0, 1)])
    assert chi_square(np.repeat(np.arange(4), counts), np.full(4, 0.25)) < SIGMAS


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [1.0, np.inf], [-np.inf, -np.inf], [0.0, np.nan, np.inf]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(logits, temperature):
    with pytest.raises(ValueError, match="wanted finite numbers") as problem:
        Sampler(SamplingParams(temperature=temperature))(np.array(logits, np.float32))
    checkpoints.assert_clear(problem)


BAD = [
    ("temperature", -0.1, "temperature is -0.1; wanted 0 or more"),
    ("temperature", math.nan, "temperature is nan"),
    ("temperature", math.inf, "temperature is inf"),
    ("temperature", "warm", "temperature is 'warm'; wanted a number"),
    ("temperature", None, "temperature is None; wanted a number"),
    ("top_p", 0.0, "top_p is 0.0; wanted above 0, up to 1"),
    ("top_p", 1.0001, "top_p is 1.0001"),
    ("top_p", math.nan, "top_p is nan"),
    ("top_p", True, "top_p is True"),
    ("top_k", -1, "top_k is -1; wanted 0 or more"),
    ("top_k", 1.5, "top_k is 1.5; wanted a whole number"),
    ("top_k", math.nan, "top_k is nan; wanted a whole number"),
    ("min_p", -1e-9, "min_p is -1e-09; wanted 0 to 1"),
    ("min_p", 1.5, "min_p is 1.5"),
    ("min_p", [0.1], "min_p is"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_parameters_out_of_range(name, value, message):
    with pytest.raises((ValueError, TypeError), match=message) as problem:
        SamplingParams(**{name: value})
    checkpoints.assert_clear(problem)


@pytest.mark.parametrize(
    ("seed", "message"), [(-1, "seed is -1; wanted 0 or more"), (0.5, "seed is 0.5"), (None, "None")]
)
def test_bad_seeds(seed, message):
    with pytest.raises((ValueError, TypeError), match=message) as problem:
        Sampler(SamplingParams(), seed)
    checkpoints.assert_clear(problem)


def test_numpy_s_numbers_are_numbers():
    params = SamplingParams(np.float32(0.5), np.float64(0.5), np.int32(3), np.float32(0.0))
    assert Sampler(params, 1)(LOGITS)[0] in np.argsort(-LOGITS)[:3]


def test_numbers_can_be_asked_for_beforehand():
    logits = np.random.default_rng(0).standard_normal(50)
    params = SamplingParams(1.0)
    plain, asked = Sampler(params, 5), Sampler(params, 5)
    tokens = [plain(logits)[0] for _ in range(6)]
    assert len(set(asked.peek(3))) == 3
    assert asked.peek(2) == asked.peek(3)[:2]
    assert [asked(logits)[0] for _ in range(2)] == tokens[:2]
    number = asked.peek(1)[0]
    assert asked.take() == number  # in place of a draw
    assert [asked(logits)[0] for _ in range(3)] == tokens[3:]
    assert params.temperature and asked.draws
    greedy = Sampler(SamplingParams())
    assert not greedy.draws
    before = greedy.peek(1)
    greedy(logits)
    assert greedy.peek(1) == before
