"""Generating on a GPU: tokens, batches, steps launched ahead, and what ends it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import mxmoe
from compare import assert_exact
from cuda_models import GPU_MODES, IDS, plain, small_pages
from mxmoe import cuda
from mxmoe.decoding import _Recording
from mxmoe.sampling import Sampler, SamplingParams
from small_models import CONFIG, MODES, in_chunks, random_ids


def generated(model, prompt, count, **options):
    return [s.token_id for s in model.generate(prompt, count, stop_token_ids=[], **options)]


def test_greedy_tokens_are_those_of_the_logits(gpu_model):
    steps = list(gpu_model.generate(IDS[:30], 25, stop_token_ids=[]))
    ids = np.concatenate([IDS[:30], [s.token_id for s in steps]])
    logits = gpu_model.forward(ids)[29:-1].astype(np.float64)
    assert_exact(np.array([s.token_id for s in steps]), logits.argmax(axis=1))
    top = logits.max(axis=1)
    want = -np.log(np.exp(logits - top[:, None]).sum(axis=1))
    np.testing.assert_allclose([s.logprob for s in steps], want, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_cpu(gpu, gpu_load, gpu_folder):
    model, cpu = gpu_load(gpu, "float32"), mxmoe.load(gpu_folder, **MODES["float32"])
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
        assert generated(model, IDS[:4], 4, **options) == generated(cpu, IDS[:4], 4, **options)


def test_a_batch_gives_what_each_gives_alone(gpu_model):
    prompts = [random_ids(n, seed=n) for n in (12, 1, 30)]
    for options in ({}, {"temperature": 1.0}):
        together = gpu_model.generate_batch(prompts, 6, **options)
        for i, (prompt, one) in enumerate(zip(prompts, together, strict=True)):
            alone = list(gpu_model.generate(prompt, 6, seed=i, **options))
            assert [s.token_id for s in alone] == one.token_ids
            assert [s.logprob for s in alone] == one.logprobs


@pytest.fixture
def starts(monkeypatch):
    """The ids that every step launched by a decoder was given: None for those of the step before."""
    seen = []
    start = _Recording.start

    def spy(self, model, cache, rope, ids, *rest):
        seen.append(ids)
        return start(self, model, cache, rope, ids, *rest)

    monkeypatch.setattr(_Recording, "start", spy)
    return seen


def test_the_next_step_is_launched_before_the_last_token_is_read(gpu_model, starts):
    steps = gpu_model.generate(IDS[:5], 6, stop_token_ids=[])
    tokens = [next(steps).token_id, next(steps).token_id]
    assert [ids is None for ids in starts] == [False, True]  # the prompt's token came another way
    tokens += [step.token_id for step in steps]
    assert [ids is None for ids in starts] == [False, *[True] * 4]  # no step for a seventh
    ids = np.concatenate([IDS[:5], tokens])
    assert_exact(np.array(tokens), gpu_model.forward(ids)[4:-1].argmax(axis=1))


def test_a_step_launched_in_vain_leaves_nothing(gpu_model, starts):
    tokens = generated(gpu_model, IDS[:20], 8)
    del starts[:]
    cache, other = (small_pages(gpu_model, 40) for _ in range(2))
    steps = list(gpu_model.generate(IDS[:20], 8, stop_token_ids=[tokens[3]], cache=cache))
    assert len(steps) == 4 and len(starts) == 4  # one of them past the stop token
    assert cache.lengths == (23,)
    ids = np.concatenate([IDS[:20], tokens[:3], IDS[23:30]])
    assert_exact(in_chunks(gpu_model, ids[23:], [1] * 7, cache), gpu_model.forward(ids)[23:])
    # What stands in its place is never seen, wherever the cache is used next.
    steps = gpu_model.generate(IDS[:20], 8, stop_token_ids=[], cache=other)
    for _ in range(3):
        next(steps)
    steps.close()
    other.reset()
    assert_exact(in_chunks(gpu_model, IDS[:29], [9, *[1] * 20], other), gpu_model.forward(IDS[:29]))


def test_drawn_tokens_are_those_of_the_host(gpu_model, starts):
    """The same numbers, however a step runs: launched ahead, or watched and then drawn apart."""
    for options in ({"temperature": 1.0}, {"temperature": 1.5, "top_p": 0.8, "top_k": 30, "min_p": 0.02, "seed": 7}):
        sampler = Sampler(SamplingParams(**{k: v for k, v in options.items() if k != "seed"}), options.get("seed", 0))
        ids = list(IDS[:9])
        for _ in range(9):
            ids.append(sampler(gpu_model.forward(ids, logits="last")[0])[0])
        want = ids[9:]
        assert not starts
        assert generated(gpu_model, IDS[:9], 9, **options) == want
        assert [ids is None for ids in starts] == [False, *[True] * 7]
        del starts[:]
        steps, tokens = gpu_model.generate(IDS[:9], 9, stop_token_ids=[], **options), []
        for i in range(9):
            if i == 5:
                with plain(gpu_model):
                    tokens.append(next(steps).token_id)
            else:
                tokens.append(next(steps).token_id)
        assert tokens == want
        del starts[:]


def test_changes_between_steps_are_felt_by_the_next(gpu, gpu_folder):
    def tokens_of(between, ahead):
        model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
        cache, token = small_pages(model, 60), IDS[0]
        tokens = []
        for i in range(9):
            where = {"cache": cache, "ahead": ahead}
            token = model.likeliest([token], **where)[0][0]
            tokens.append(int(token))
            if i in (3, 6):
                between(model, cache)
        return tokens

    def other_head(model, cache):
        head = model.lm_head.weight
        head.set(np.ascontiguousarray(head.numpy()[::-1]))

    def other_norm(model, cache):
        model.norm.weight = cuda.array(-model.norm.weight.numpy())

    def other_history(model, cache):
        length = cache.lengths[0]
        cache.reset()
        model.forward(IDS[30 : 30 + length], cache=cache)

    def hook(model, cache):
        model.hook("layers.0.residual", lambda x, _: 0.5 * x)

    def another_token(model, cache):
        model.forward([5], cache=cache)

    want = tokens_of(lambda *_: None, False)
    assert tokens_of(lambda *_: None, True) == want
    for between in (other_head, other_norm, other_history, hook, another_token):
        changed = tokens_of(between, False)
        assert tokens_of(between, True) == changed
        assert changed != want, between


def test_a_full_cache_ends_it(gpu_model):
    cache = small_pages(gpu_model, 12)
    assert len(generated(gpu_model, IDS[:4], 9, cache=cache)) == 9
    assert cache.lengths == (12,)
    cache.reset()
    token = IDS[0]
    for _ in range(12):
        (token,), _ = gpu_model.likeliest([token], cache=cache, ahead=True)
    with pytest.raises(ValueError, match="1 more do not fit"):
        gpu_model.likeliest([token], cache=cache, ahead=True)


def test_stop_tokens_end_it(gpu_model):
    tokens = generated(gpu_model, IDS[:20], 12)
    steps = list(gpu_model.generate(IDS[:20], 12, stop_token_ids=[tokens[4]]))
    assert [s.token_id for s in steps] == tokens[: tokens.index(tokens[4]) + 1]
    assert steps[-1].finish_reason == "stop"


def test_broken_weights_are_told(gpu, gpu_folder):
    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    model.norm.weight = cuda.array(np.full(CONFIG.hidden_size, np.nan, np.float32))
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match="are the weights or a hook broken"):
            generated(model, IDS[:5], 3, **options)
    good = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    steps = good.generate(IDS[:5], 9, temperature=1.0, stop_token_ids=[])
    next(steps), next(steps)
    good.norm.weight = model.norm.weight
    with pytest.raises(ValueError, match="the logits hold a NaN or infinity"):
        next(steps)


def test_threads_of_python_share_one_model(gpu, gpu_load):
    model = gpu_load(gpu, "bf16")
    prompts = [random_ids(n, seed=n) for n in (9, 20)]
    want = [generated(model, p, 6) for p in prompts]

    def run(prompt):
        cuda.use(gpu)
        return generated(model, prompt, 6)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, prompts)) == want
