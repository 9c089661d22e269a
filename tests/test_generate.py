"""Generation: the same tokens alone, in company and over turns; where it ends; and text as it streams."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import checkpoints
import mxmoe
import small_tokenizer
from compare import assert_exact
from small_models import CONFIG, MODES, in_chunks, random_ids, write

PROMPT = random_ids(30)
# The embedding has rows beyond the tokenizer's tokens, as the published models have.
SPARE = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("generate") / "x")


@pytest.fixture(scope="module")
def model(folder):
    return mxmoe.load(folder)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model with a tokenizer."""
    backend = small_tokenizer.backend()
    vocab_size = backend.get_vocab_size() + SPARE
    config = checkpoints.small_config(vocab_size=vocab_size, eos_token_ids=(backend.token_to_id("<|return|>"),))
    path = checkpoints.write(tmp_path_factory.mktemp("generate") / "x", config=config)
    backend.save(str(path / "tokenizer.json"))
    return mxmoe.load(path)


def script(model, tokens, prompt_length):
    """Make the model write these tokens after a prompt of this length, whatever it thinks."""

    def force(logits, context):
        for row, position in zip(logits, context.positions, strict=True):
            row[:] = -20.0
            row[tokens[min(position - prompt_length + 1, len(tokens) - 1)]] = 0.0

    return model.hook("logits", force)


def byte_tokens(model, text):
    """Spell a text with one token for each of its bytes."""
    alone = {model.tokenizer.token_bytes(i): i for i in range(9, 9 + 256)}
    return [alone[bytes([byte])] for byte in text.encode()]


def pairs(steps):
    return [(step.token_id, step.logprob) for step in steps]


def test_greedy_takes_the_likeliest_and_tells_its_logprob(model):
    steps = list(model.generate(PROMPT, 40, stop_token_ids=[]))
    ids = np.concatenate([PROMPT, [step.token_id for step in steps]])
    logits = model.forward(ids[:-1])[len(PROMPT) - 1 :].astype(np.float64)
    assert [step.token_id for step in steps] == logits.argmax(axis=1).tolist()
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))[np.arange(40), ids[len(PROMPT) :]]
    np.testing.assert_allclose([step.logprob for step in steps], logprobs, rtol=1e-12)
    assert [step.finish_reason for step in steps] == [None] * 39 + ["length"]


def test_sampling_options_arrive(model):
    def run(**options):
        return pairs(model.generate(PROMPT, 20, stop_token_ids=[], **options))

    greedy = run()
    assert run(temperature=5.0, seed=1) != greedy
    assert run(temperature=5.0, seed=1) == run(temperature=5.0, seed=1)
    assert run(temperature=5.0, seed=1) != run(temperature=5.0, seed=2)
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert run(temperature=5.0, seed=1, **cut) == greedy


# Where it ends


def test_stop_tokens_are_the_checkpoint_s_by_default(model):
    stop = CONFIG.eos_token_ids[1]
    with script(model, [5, 6, stop, 7], len(PROMPT)):
        steps = list(model.generate(PROMPT, 10))
        assert [(step.token_id, step.finish_reason) for step in steps] == [(5, None), (6, None), (stop, "stop")]
        assert [step.token_id for step in model.generate(PROMPT, 10, stop_token_ids=[6])] == [5, 6]
        assert [step.token_id for step in model.generate(PROMPT, 5, stop_token_ids=[])] == [5, 6, stop, 7, 7]
        (only,) = model.generate(PROMPT, 10, stop_token_ids=np.array([5, 9]))
        assert only.finish_reason == "stop"


def test_a_stop_token_at_the_last_place_is_a_stop(model):
    with script(model, [5, 6], len(PROMPT)):
        assert list(model.generate(PROMPT, 2, stop_token_ids=[6]))[-1].finish_reason == "stop"


def test_one_new_token(model):
    (step,) = model.generate(PROMPT, 1, stop_token_ids=[])
    assert step.finish_reason == "length"
    assert step == mxmoe.GenerationStep(int(model.forward(PROMPT)[-1].argmax()), step.logprob, "length")
    (generation,) = model.generate_batch([PROMPT], 1, stop_token_ids=[])
    assert generation.token_ids == [step.token_id]
    assert generation.logprobs == [step.logprob]
    assert generation.finish_reason == "length"
    assert generation.text is None


# The same tokens in company and over turns


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 50}], ids=["greedy", "sampled"])
def test_a_batch_gives_each_what_it_gets_alone(folder, name, options):
    model = mxmoe.load(folder, **MODES[name])
    prompts = [random_ids(n, seed=n) for n in (1, 45, 8, 300, 250)]  # together more than one step
    with model.hook("logits", lambda logits, _: np.where(np.arange(200) % 3 == 0, logits + 1, logits)):
        # Tokens that are not rare, so that sequences end at different times.
        options = {"stop_token_ids": [3, 30, 60, 90, 120], **options}
        alone = [list(model.generate(p, 25, seed=5 + i, **options)) for i, p in enumerate(prompts)]
        together = model.generate_batch(prompts, 25, seed=5, **options)
        assert len({len(steps) for steps in alone}) > 1
        for steps, generation in zip(alone, together, strict=True):
            assert generation.token_ids == [step.token_id for step in steps]
            assert generation.logprobs == [step.logprob for step in steps]
            assert generation.finish_reason == steps[-1].finish_reason
        backwards = model.generate_batch(prompts[::-1], 25, seed=range(9, 4, -1), **options)
        assert backwards == together[::-1]


def test_seeds_of_a_batch_count_up_from_one_number(model):
    options = {"temperature": 3.0, "stop_token_ids": []}
    counted = model.generate_batch([PROMPT] * 3, 10, seed=np.int64(4), **options)
    assert counted == model.generate_batch([PROMPT] * 3, 10, seed=[4, 5, 6], **options)
    assert counted[0] != counted[1]
    assert len(set(map(str, model.generate_batch([PROMPT] * 3, 10, seed=[1, 1, 1], **options)))) == 1


def test_an_empty_batch(model):
    assert model.generate_batch([], 5) == []


@pytest.mark.parametrize("name", MODES)
def test_turns_on_one_cache_equal_one_whole_prompt(folder, name):
    model = mxmoe.load(folder, **MODES[name])
    cache = model.new_cache(400)
    conversation: list[int] = []
    pending: list[int] = []
    for turn in range(4):
        pending += random_ids(40 + turn, seed=turn).tolist()
        conversation += random_ids(40 + turn, seed=turn).tolist()
        steps = list(model.generate(pending, 30, temperature=1.0, seed=turn, cache=cache, stop_token_ids=[]))
        whole = list(model.generate(conversation, 30, temperature=1.0, seed=turn, stop_token_ids=[]))
        assert steps == whole
        conversation += [step.token_id for step in steps]
        # Every token but the last is in the cache.
        assert cache.lengths == (len(conversation) - 1,)
        pending = conversation[-1:]
    want = model.forward(conversation)
    assert_exact(model.forward(pending, cache=cache)[0], want[-1])


def test_a_cache_that_is_exactly_large_enough(model):
    cache = model.new_cache(39)
    with pytest.raises(ValueError, match="40 more do not fit"):
        model.generate(PROMPT, 11, cache=cache)
    assert len(list(model.generate(PROMPT, 10, cache=cache, stop_token_ids=[]))) == 10
    assert cache.lengths == (39,)


def test_a_generation_that_is_left_early_leaves_the_cache_usable(model):
    cache = model.new_cache(100)
    steps = model.generate(PROMPT, 50, cache=cache, stop_token_ids=[])
    taken = [next(steps).token_id for _ in range(3)]
    steps.close()
    assert cache.lengths == (len(PROMPT) + 2,)
    rest = random_ids(20, seed=9)
    got = in_chunks(model, np.concatenate([taken[-1:], rest]), [1, 7], cache)
    assert_exact(got, model.forward(np.concatenate([PROMPT, taken, rest]))[len(PROMPT) + 2 :])


def test_up_to_the_end_of_the_context(tmp_path):
    config = checkpoints.small_config(max_position_embeddings=64)
    model = mxmoe.load(checkpoints.write(tmp_path / "x", config=config))
    ids = random_ids(60, vocab_size=128)
    assert len(list(model.generate(ids, 5, stop_token_ids=[]))) == 5
    assert model.forward(random_ids(64, vocab_size=128)).shape == (64, 128)
    for call in (
        lambda: model.generate(ids, 6),
        lambda: model.generate_batch([ids[:3], ids], 6),
    ):
        with pytest.raises(
            ValueError, match="60 and 6 new tokens do not fit in the model's context of 64"
        ) as problem:
            call()
        checkpoints.assert_clear(problem)
    with pytest.raises(ValueError, match="context of 64"):
        model.forward(random_ids(65, vocab_size=128))


# Text


TEXTS = {
    "ascii": "plain words",
    "two bytes": "naïve Grüße",
    "three bytes": "日本語",
    "four bytes": "🦀 and 🦀",
    "joined": "👩‍👩‍👧 é",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_streams_in_whole_characters(writer, text):
    prompt = "Reasoning"
    length = len(writer.tokenizer.encode(prompt))
    tokens = byte_tokens(writer, text)
    with script(writer, tokens, length):
        pieces = list(writer.stream(prompt, len(tokens)))
        assert "".join(pieces) == text == writer.complete(prompt, len(tokens))
        assert all(pieces), "an empty piece was sent"
        # One piece for each character: as soon as its last byte is there, and not before.
        assert pieces == list(text)


def test_a_character_that_is_never_finished(writer):
    prompt = "Reasoning"
    tokens = byte_tokens(writer, "a🦀")[:-1]
    with script(writer, tokens, len(writer.tokenizer.encode(prompt))):
        assert list(writer.stream(prompt, len(tokens))) == ["a", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_random_text_join_to_the_whole(writer, seed):
    options = {"temperature": 2.0, "seed": seed, "stop_token_ids": []}
    prompt = "Channel must be included for 日本"
    whole = writer.complete(prompt, 80, **options)
    assert "".join(writer.stream(prompt, 80, **options)) == whole
    tokens = [step.token_id for step in writer.generate(writer.tokenizer.encode(prompt), 80, **options)]
    assert whole == writer.tokenizer.decode(token for token in tokens if token < writer.tokenizer.vocab_size)
    (generation,) = writer.generate_batch([prompt], 80, **options)
    assert generation.text == whole
    assert generation.token_ids == tokens


def test_tokens_past_the_tokenizer_s_vocabulary_stand_for_nothing(writer):
    spare = writer.tokenizer.vocab_size + SPARE - 1
    tokens = [*byte_tokens(writer, "日")[:2], spare, *byte_tokens(writer, "日")[2:], spare, *byte_tokens(writer, "x")]
    prompt = "a"
    with script(writer, tokens, len(writer.tokenizer.encode(prompt))):
        assert writer.complete(prompt, len(tokens)) == "日x"
        (generation,) = writer.generate_batch([prompt], len(tokens))
    assert generation.text == "日x"
    assert generation.token_ids == tokens


def test_the_stop_token_is_not_in_the_text(writer):
    end = writer.tokenizer.special("<|return|>")
    other = writer.tokenizer.special("<|end|>")
    tokens = [*byte_tokens(writer, "ok"), other, end, *byte_tokens(writer, "more")]
    with script(writer, tokens, len(writer.tokenizer.encode("a"))):
        assert writer.complete("a", 10) == "ok<|end|>"
        (generation,) = writer.generate_batch(["a"], 10)
        assert generation == mxmoe.Generation(tokens[:4], generation.logprobs, "stop", "ok<|end|>")
        assert writer.complete("a", 6, stop_token_ids=[]) == "ok<|end|><|return|>mo"


STOPS = {
    "within one token": ("one two three", ["two"], "one "),
    "over several": ("abc###def", ["###"], "abc"),
    "the first of two": ("abcdef", ["e", "cd"], "ab"),
    "a false start": ("aab aaab", ["aaab"], "aab "),
    "inside characters of several bytes": ("日本語", ["本"], "日"),
    "at the very beginning": ("stop", ["st"], ""),
    "at the very end": ("text.", ["."], "text"),
    "begun but not finished": ("almost st", ["stop"], "almost st"),
    "never": ("abc", ["xyz"], "abc"),
}


@pytest.mark.parametrize(("text", "stop", "want"), STOPS.values(), ids=STOPS)
def test_stop_strings(writer, text, stop, want):
    prompt = "Valid"
    tokens = byte_tokens(writer, text)
    with script(writer, tokens, len(writer.tokenizer.encode(prompt))):
        assert writer.complete(prompt, len(tokens), stop=stop) == want
        assert "".join(writer.stream(prompt, len(tokens), stop=stop)) == want
        seen = []
        (generation,) = writer.generate_batch(
            [prompt], len(tokens), stop=stop, on_step=lambda *call: seen.append(call)
        )
    assert generation.text == want
    stopped = any(s in text for s in stop)
    assert generation.finish_reason == ("stop" if stopped else "length")
    # It ends with the token that completes the stop string.
    ends = [len(text[: text.index(s) + len(s)].encode()) for s in stop if s in text]
    assert generation.token_ids == tokens[: min(ends, default=len(tokens))]
    assert [number for number, _, _ in seen] == [0] * len(generation.token_ids)
    assert [step.token_id for _, step, _ in seen] == generation.token_ids
    assert "".join(piece for _, _, piece in seen) == want


def test_a_batch_of_texts_and_ids_tells_every_step(writer):
    prompts = ["Reasoning", writer.tokenizer.encode("system"), "日本語"]
    seen = {0: [], 1: [], 2: []}
    got = writer.generate_batch(
        prompts, 12, temperature=1.5, on_step=lambda i, step, text: seen[i].append((step, text))
    )
    for i, generation in enumerate(got):
        steps, texts = zip(*seen[i], strict=True)
        assert [step.token_id for step in steps] == generation.token_ids
        assert [step.logprob for step in steps] == generation.logprobs
        assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
        assert steps[-1].finish_reason == generation.finish_reason
        assert "".join(texts) == generation.text


def test_special_tokens_in_a_prompt_stay_text(writer):
    ids = []
    with writer.hook("embedding", lambda _, context: ids.append(len(context.positions))):
        writer.complete("<|end|>", 1)
    assert ids == [len(writer.tokenizer.encode("<|end|>"))]
    assert ids[0] > 1


# What is refused, at the call


REFUSED = {
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; wanted 1 or more"),
    "half a token": ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; wanted a whole number"),
    "a truth value": ({"max_new_tokens": True}, "max_new_tokens is True"),
    "negative temperature": ({"temperature": -1.0}, "temperature is -1.0"),
    "top_p of 0": ({"top_p": 0.0}, "top_p is 0.0"),
    "top_k of -1": ({"top_k": -1}, "top_k is -1"),
    "min_p of 2": ({"min_p": 2.0}, "min_p is 2.0"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "seed of text": ({"seed": "x"}, "seed"),
    "past the context": ({"max_new_tokens": 200_000}, "do not fit in the model's context of 131072"),
    "one stop id alone": ({"stop_token_ids": 5}, "stop_token_ids is 5; wanted a sequence of token ids"),
    "stop ids of text": ({"stop_token_ids": ["a"]}, "stop_token_ids is"),
}
BAD_PROMPTS = {
    "empty": ([], "non-empty vector"),
    "out of the vocabulary": ([1, 200], "token_ids holds 200; wanted 0 to 199"),
    "negative": ([-1], "token_ids holds -1"),
    "in rows": ([[1, 2]], r"shape \(1, 2\)"),
    "floats": ([0.5], "float64"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("method", ["generate", "generate_batch"])
def test_bad_options_are_refused_at_the_call(model, method, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as problem:
        getattr(model, method)([PROMPT] if method == "generate_batch" else PROMPT, **options)
    checkpoints.assert_clear(problem)


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("method", ["stream", "complete"])
def test_bad_options_of_texts_are_refused_at_the_call(writer, method, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as problem:
        getattr(writer, method)("a", **options)
    checkpoints.assert_clear(problem)


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_are_refused_at_the_call(model, prompt, message):
    for call in (lambda: model.generate(prompt), lambda: model.generate_batch([PROMPT, prompt])):
        with pytest.raises(ValueError, match=message) as problem:
            call()
        checkpoints.assert_clear(problem)


def test_bad_caches_are_refused_at_the_call(model):
    for cache, message in (({}, "cache is of type dict"), (model.new_cache(20), "do not fit")):
        with pytest.raises((ValueError, TypeError), match=message) as problem:
            model.generate(PROMPT, cache=cache)
        checkpoints.assert_clear(problem)


def test_text_needs_a_tokenizer(model):
    for call in (
        lambda: model.complete("hello"),
        lambda: model.stream("hello"),
        lambda: model.generate_batch(["hello"]),
        lambda: model.generate_batch([PROMPT], stop=["x"]),
    ):
        with pytest.raises(ValueError, match=r"has no tokenizer\.json; wanted one, or token ids") as problem:
            call()
        checkpoints.assert_clear(problem)


def test_bad_texts_are_refused_at_the_call(writer):
    for call, message in (
        (lambda: writer.stream(""), "the prompt is empty"),
        (lambda: writer.generate_batch(["a", ""]), "the prompt is empty"),
        (lambda: writer.stream("a\ud800"), "lone surrogate"),
        (lambda: writer.stream("a", stop=[""]), "non-empty string"),
        (lambda: writer.stream("a", stop="end"), "sequence of strings"),
        (lambda: writer.generate_batch("a"), "prompts is a str; wanted a sequence of prompts"),
        (lambda: writer.generate_batch(["a", "b"], seed=[1]), "seed has 1 numbers; wanted 2, one for each prompt"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_a_broken_hook_ends_generation_with_a_word(model):
    def break_logits(logits, _):
        logits[:] = np.nan

    with model.hook("logits", break_logits), pytest.raises(ValueError, match="are the weights or a hook broken"):
        list(model.generate(PROMPT, 3))


def test_longer_generations_begin_like_shorter_ones(model):
    runs = [pairs(model.generate(PROMPT, n, temperature=1.0, seed=3, stop_token_ids=[])) for n in (1, 5, 40, 100)]
    for short, long in pairwise(runs):
        assert long[: len(short)] == short
