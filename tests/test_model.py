"""The whole model: step by step against the references, the same bits however it is run, and what it refuses."""

from __future__ import annotations

import functools
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import MODEL_NOISE, assert_exact, assert_model_close, row_errors
from mxmoe import _core, ops
from mxmoe.checkpoint import Checkpoint
from mxmoe.reference import model as reference
from small_models import BIG, CONFIG, MODES, in_chunks, random_ids, write

# More than one step of 512 tokens.
LONG = random_ids(600)
PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "x")


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.fixture(scope="module")
def model(folder, mode):
    return mxmoe.load(folder, **mode)


@pytest.fixture(scope="module")
def in_one_go(model):
    """Logits of LONG under an instruction set, computed once."""
    return functools.cache(lambda isa: model.forward(LONG))


@pytest.fixture(scope="module")
def truth(folder):
    """The float64 logits and captured values of 90 tokens."""
    seen = {}
    logits = reference.forward(Checkpoint.open(folder), LONG[:90], capture=seen)
    return logits, seen


def rows_of(value):
    return value.reshape(len(value), -1)


# Step by step


def test_the_reference_backend_is_the_reference(folder, truth):
    want, seen = truth
    got, captured = mxmoe.load(folder, backend="reference").forward(LONG[:90], capture=["*"])
    assert got.dtype == np.float64
    # The same formulas in another order of sums.
    assert row_errors(got, want).max() < 1e-11
    for site, value in seen.items():
        np.testing.assert_allclose(captured[site], value, rtol=1e-9, atol=1e-11, err_msg=site)


def test_every_step_agrees_with_the_reference(folder, truth, isa):
    want, seen = truth
    model = mxmoe.load(folder, **MODES["float32"])
    got, captured = model.forward(LONG[:90], capture=["*"])
    assert_model_close(got, want, limit=MODEL_NOISE / 10)
    _, slow = mxmoe.load(folder, backend="reference").forward(LONG[:90], capture=["*"])
    assert list(captured) == model.sites == list(slow)
    for site in model.sites:
        if site.endswith("topk_ids"):
            assert_exact(captured[site], slow[site])
            assert_exact(captured[site], seen[site])
        else:
            assert captured[site].dtype == np.float32
            assert_model_close(rows_of(captured[site]), rows_of(slow[site]), limit=MODEL_NOISE / 10)


@pytest.mark.parametrize("dense", ["bf16", "int8"])
@pytest.mark.parametrize("kv", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("activations", ["float32", "bf16", "int8"])
def test_every_mode_runs_and_is_near(folder, truth, dense, kv, activations):
    want, _ = truth
    got = mxmoe.load(folder, dense=dense, kv=kv, activations=activations).forward(LONG[:90])
    # What one rounding to int8 leaves of these few layers; the peers' tests hold each mode to its own error.
    assert_model_close(got, want, limit=0.15)
    exact = (dense, kv, activations) == ("bf16", "float32", "float32")
    assert exact or np.median(row_errors(got, want)) > 10 * MODEL_NOISE, "nothing was rounded"


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_layouts_give_the_same_logits(tmp_path, mode):
    logits = []
    for layout in checkpoints.LAYOUTS:
        logits.append(mxmoe.load(write(tmp_path / layout, layout=layout), **mode).forward(LONG[:50]))
    assert_exact(logits[1], logits[0])
    assert_exact(logits[2], logits[0])


SHAPES = {
    "one sliding layer": {"num_hidden_layers": 1},
    "one full layer": {"num_hidden_layers": 1, "layer_types": ("full_attention",)},
    "all sliding": {"layer_types": ("sliding_attention",) * 2},
    "all full, no window": {"layer_types": ("full_attention",) * 2, "sliding_window": None},
    "one expert": {"num_experts": 1, "experts_per_token": 1},
    "every expert": {"num_experts": 6, "experts_per_token": 6},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "a window of one": {"sliding_window": 1},
    "a window past the prompt": {"sliding_window": 4096},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_unusual_shapes(tmp_path, changes):
    config = checkpoints.small_config(**changes)
    folder = checkpoints.write(tmp_path / "x", config=config)
    ids = random_ids(80, vocab_size=config.vocab_size)
    model = mxmoe.load(folder, **MODES["float32"])
    got = model.forward(ids)
    assert_model_close(got, reference.forward(Checkpoint.open(folder), ids), limit=MODEL_NOISE / 10)
    assert_exact(in_chunks(model, ids, PRIMES), got)


# The same bits


CHUNKS = {
    "ones": [1] * 70,
    "sevens": [7] * 21,
    "primes": PRIMES,
    "a page less one": [63] * 10,
    "a page": [64] * 10,
    "a page and one": [65] * 10,
    "within the window": [19] * 8,
    "the window": [20] * 8,
    "past the window": [21] * 8,
    "a step, then one by one": [512, *[1] * 20],
    "one, then a step and more": [1, 599],
}


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_any_chunks_give_the_same_bits(model, in_one_go, sizes, isa):
    assert_exact(in_chunks(model, LONG, sizes), in_one_go(isa))


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(folder, mode, in_one_go, threads, isa):
    one = mxmoe.load(folder, **mode, num_threads=1).forward(LONG)
    assert_exact(one, in_one_go(isa))
    many = mxmoe.load(folder, **mode, num_threads=threads)
    assert_exact(many.forward(LONG), one)
    assert_exact(in_chunks(many, LONG[:40], [1] * 40), one[:40])


LENGTHS = [1, 70, 7, 300, 64, 150, 21]


def prompts_of(lengths):
    return [random_ids(length, seed=100 + i) for i, length in enumerate(lengths)]


def test_any_company_and_order_gives_the_same_bits(model, isa):
    prompts = prompts_of(LENGTHS)
    alone = [model.forward(ids) for ids in prompts]
    orders = [range(7), range(6, -1, -1), [3, 0, 5], [2, 1], [6, 4, 0, 1, 2, 5, 3]]
    for order in orders:
        bounds = np.concatenate([[0], np.cumsum([LENGTHS[i] for i in order])])
        together = model.forward(np.concatenate([prompts[i] for i in order]), cu_seqlens=bounds)
        for i, begin, end in zip(order, bounds, bounds[1:], strict=False):
            assert_exact(together[begin:end], alone[i])


def test_prompts_and_single_tokens_side_by_side(model, isa):
    prompts = prompts_of([90, 40, 200])
    alone = [model.forward(ids) for ids in prompts]
    cache = model.new_cache(200, num_sequences=4)
    got = [[] for _ in prompts]
    done = [0, 0, 0]
    # Sequence 0 runs on token by token while the others come in in pieces, in changing order.
    for sizes in ([1, 13, 0], [1, 0, 100], [40, 1, 1], [1, 26, 64], [47, 0, 35]):
        order = [i for i in (2, 0, 1) if sizes[i]]
        pieces = [prompts[i][done[i] : done[i] + sizes[i]] for i in order]
        bounds = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
        rows = model.forward(np.concatenate(pieces), cache=cache, cu_seqlens=bounds, sequences=[i + 1 for i in order])
        for i, begin, end in zip(order, bounds, bounds[1:], strict=False):
            got[i].append(rows[begin:end])
            done[i] += sizes[i]
    assert cache.lengths == (0, 90, 40, 200)
    for i in range(3):
        assert_exact(np.concatenate(got[i]), alone[i])


def test_instruction_sets_may_differ_but_little(folder, truth):
    model = mxmoe.load(folder, **MODES["float32"])
    for name in _core.available_isas():
        with ops.isa(name):
            assert_model_close(model.forward(LONG[:90]), truth[0], limit=MODEL_NOISE / 10)


def test_logits_of_chosen_rows(model):
    prompts = prompts_of([30, 1, 600])
    bounds = [0, 30, 31, 631]
    ids = np.concatenate(prompts)
    every = model.forward(ids, cu_seqlens=bounds)
    assert_exact(model.forward(ids, cu_seqlens=bounds, logits="last"), every[[29, 30, 630]])
    cache = model.new_cache(700, num_sequences=3)
    nothing = model.forward(ids, cache=cache, cu_seqlens=bounds, logits="none")
    assert nothing.shape == (0, CONFIG.vocab_size)
    assert nothing.dtype == np.float32
    assert cache.lengths == (30, 1, 600)


def test_calling_the_model_is_forward(model):
    assert_exact(model(LONG[:5]), model.forward(LONG[:5]))


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.uint8, np.uint64], ids=str)
def test_ids_of_any_integer_kind(model, kind):
    ids = kind(LONG[:9].tolist()) if kind in (list, tuple) else LONG[:9].astype(kind)
    assert_exact(model.forward(ids), model.forward(LONG[:9]))


def test_threads_of_python_share_one_model(folder, mode):
    model = mxmoe.load(folder, **mode, num_threads=2)
    prompts = prompts_of([30, 5, 80, 61])

    def generate(i):
        steps = model.generate(prompts[i], 40, temperature=1.0, seed=i, stop_token_ids=[])
        return [(step.token_id, step.logprob) for step in steps]

    want = [generate(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(generate, range(4))) == want


# What is refused


REFUSED = {
    "negative id": ({"token_ids": [1, -3]}, "token_ids holds -3; wanted 0 to 199"),
    "id past the vocabulary": ({"token_ids": [1, 200]}, "token_ids holds 200"),
    "huge id": ({"token_ids": np.array([2**63 + 5], np.uint64)}, "token_ids holds 9223372036854775813"),
    "no ids": ({"token_ids": []}, "non-empty"),
    "ids in rows": ({"token_ids": [[1, 2]]}, r"shape \(1, 2\)"),
    "one bare id": ({"token_ids": 3}, r"shape \(\)"),
    "float ids": ({"token_ids": [1.0, 2.0]}, "float64"),
    "boolean ids": ({"token_ids": [True, False]}, "bool"),
    "text": ({"token_ids": "hello"}, "wanted a non-empty vector of integers"),
    "ragged ids": ({"token_ids": [[1], [2, 3]]}, "token_ids is ragged"),
    "offsets that begin late": ({"cu_seqlens": [1, 4]}, "wanted it to run from 0 to 4"),
    "offsets that end early": ({"cu_seqlens": [0, 3]}, "wanted it to run from 0 to 4"),
    "offsets past the end": ({"cu_seqlens": [0, 5]}, "wanted it to run from 0 to 4"),
    "one offset": ({"cu_seqlens": [0]}, "wanted it to run"),
    "offsets that fall": ({"cu_seqlens": [0, 3, 2, 4]}, "at least one token"),
    "an empty sequence": ({"cu_seqlens": [0, 2, 2, 4]}, "at least one token"),
    "float offsets": ({"cu_seqlens": [0, 1.5, 4]}, "cu_seqlens"),
    "offsets in rows": ({"cu_seqlens": [[0, 4]]}, "cu_seqlens"),
    "offsets of text": ({"cu_seqlens": ["a", "b"]}, "cu_seqlens"),
    "too few sequences": ({"cu_seqlens": [0, 2, 4], "sequences": [0]}, "wanted 2 different numbers"),
    "a sequence twice": ({"cu_seqlens": [0, 2, 4], "sequences": [1, 1]}, "wanted 2 different numbers"),
    "a sequence that is not there": ({"sequences": [2]}, "the cache has 0 to 1"),
    "a negative sequence": ({"sequences": [-1]}, "sequence is -1"),
    "half a sequence": ({"sequences": [0.5]}, "sequences"),
    "too many tokens": ({"token_ids": [1] * 61}, "holds 5 of 65 tokens; 61 more do not fit"),
    "too many for the second": ({"token_ids": [1] * 67, "cu_seqlens": [0, 1, 67]}, "sequence 1 holds 0 of 65"),
    "unknown rows": ({"logits": "first"}, "wanted 'all', 'last' or 'none'"),
    "unknown site": ({"capture": ["layers.9.residual"]}, "layers.9.residual"),
    "a site's name alone": ({"capture": "logits"}, "wanted a list of sites"),
    "no cache": ({"cache": {}}, "cache is of type dict; wanted a KVCache"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_leave_the_cache_as_it_was(folder, changes, message):
    model = mxmoe.load(folder)
    cache = model.new_cache(65, num_sequences=2)
    model.forward(LONG[:5], cache=cache)
    with pytest.raises((ValueError, TypeError), match=message) as problem:
        model.forward(**({"token_ids": LONG[:4], "cache": cache} | changes))
    checkpoints.assert_clear(problem)
    assert cache.lengths == (5, 0)
    # And it goes on as if nothing had been.
    assert_exact(model.forward(LONG[5:65], cache=cache), model.forward(LONG[:65])[5:])


def test_a_cache_of_another_model_is_refused(folder, tmp_path):
    model = mxmoe.load(folder)
    other = mxmoe.load(write(tmp_path / "x", config=replace(CONFIG, sliding_window=21)))
    with pytest.raises(ValueError, match="cache was made for a model of another configuration") as problem:
        model.forward(LONG[:4], cache=other.new_cache(10))
    checkpoints.assert_clear(problem)


def test_a_sequence_that_was_reset_starts_anew(model):
    cache = model.new_cache(300, num_sequences=2)
    model.forward(LONG[:299], cache=cache, sequences=[1])
    model.forward(LONG[50:250], cache=cache, sequences=[0])
    cache.reset(1)
    assert cache.lengths == (200, 0)
    assert_exact(in_chunks(model, LONG[:300], PRIMES, cache, sequence=1), model.forward(LONG[:300]))
    # The other sequence did not notice.
    assert_exact(model.forward(LONG[250:350], cache=cache, sequences=[0]), model.forward(LONG[50:350])[200:])


def test_bits_are_compared_for_real(model):
    """Other ids, and the same ids one place later, give other bits: the tests above can fail."""
    want = model.forward(LONG[:30])
    changed = LONG[:30].copy()
    changed[10] = (changed[10] + 1) % CONFIG.vocab_size
    got = model.forward(changed)
    assert_exact(got[:10], want[:10])
    for i in (10, 11, 29):
        assert (got[i] != want[i]).any()
    with pytest.raises(AssertionError):
        assert_exact(got, want)


# True sizes


@pytest.fixture(scope="module")
def slice_of_20b(tmp_path_factory):
    config = replace(
        BIG, num_hidden_layers=1, layer_types=("sliding_attention",), vocab_size=640, eos_token_ids=(639,)
    )
    path = checkpoints.write(tmp_path_factory.mktemp("slice") / "x", config=config)
    ids = random_ids(140, vocab_size=config.vocab_size)
    yield path, ids, reference.forward(Checkpoint.open(path), ids[:3])
    shutil.rmtree(path)  # half a gigabyte, which pytest would keep for three runs


@pytest.mark.parametrize("name", MODES)
def test_a_layer_of_true_size(slice_of_20b, name):
    path, ids, want = slice_of_20b
    model = mxmoe.load(path, **MODES[name])
    got = model.forward(ids[:3])
    # The roundings of 2880 products average out better than in the small models.
    assert_model_close(got, want, limit={"float32": MODEL_NOISE / 10, "bf16": 0.02, "int8": 0.08}[name])
    whole = model.forward(ids)
    assert_exact(whole[:3], got)
    assert_exact(in_chunks(model, ids, [1, 1, 5, 57, 65, 1]), whole)
