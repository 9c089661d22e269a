"""The paged KV cache: places that never collide, a window that stays small, and clear refusals."""

from __future__ import annotations

import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import assert_exact
from mxmoe.kv_cache import KVCache
from small_models import CONFIG, MODES, random_ids, write

SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = CONFIG.sliding_window


def held(cache, kind, sequence):
    """Block numbers that a sequence holds, in order of position."""
    row = cache._pools[kind].table[sequence]
    return row[row >= 0].tolist()


def advance(cache, sequences, counts):
    pages = cache.reserve(sequences, counts)
    cache.commit(sequences, counts)
    return pages


@pytest.mark.parametrize(
    ("kv", "dtype"),
    [("float32", np.float32), ("bf16", ml_dtypes.bfloat16), ("int8", np.int8), ("float64", np.float64)],
)
def test_arrays_have_the_documented_shapes(kv, dtype):
    cache = KVCache(CONFIG, 130, num_sequences=2, dtype=kv, block_size=64)
    for layer, kind in zip(cache.layers, CONFIG.layer_types, strict=True):
        # 130 tokens take 3 blocks of 64; the sliding layers of so short a cache need no fewer.
        assert layer.k.shape == layer.v.shape == (6, 2, 64, 32), kind
        assert layer.k.dtype == layer.v.dtype == dtype
        for scales in (layer.k_scales, layer.v_scales):
            assert (scales is None) == (kv != "int8")
            assert scales is None or (scales.shape == (6, 2, 64) and scales.dtype == np.float32)
    assert cache.nbytes == sum(
        a.nbytes for layer in cache.layers for a in vars(layer).values() if isinstance(a, np.ndarray)
    )
    assert cache.lengths == (0, 0)


def test_a_model_makes_caches_in_its_own_dtype(tmp_path):
    folder = write(tmp_path / "x")
    for kv, dtype in (("float32", np.float32), ("bf16", ml_dtypes.bfloat16), ("int8", np.int8)):
        assert mxmoe.load(folder, kv=kv).new_cache(5).layers[0].k.dtype == dtype
    assert mxmoe.load(folder, backend="reference").new_cache(5).layers[0].k.dtype == np.float64


def test_sliding_layers_do_not_grow_with_the_context():
    short, long = (KVCache(CONFIG, n, num_sequences=3, block_size=16, step_tokens=40) for n in (1000, 131072))
    # 40 new tokens and 19 before them span at most 5 blocks of 16.
    assert short.layers[0].k.shape[0] == long.layers[0].k.shape[0] == 3 * 5
    assert long.layers[1].k.shape[0] == 3 * 131072 // 16


@pytest.mark.parametrize("step", [1, 7, 16, 40])
def test_sliding_layers_hold_only_the_window(step):
    cache = KVCache(CONFIG, 2000, block_size=16, step_tokens=40)
    for length in range(step, 2000, step):
        advance(cache, [0], [step])
        first = max(0, length - WINDOW + 1) // 16
        assert len(held(cache, SLIDING, 0)) == -(-length // 16) - first
        assert len(held(cache, FULL, 0)) == -(-length // 16)
    # The next query sees the 19 keys before its own: they lie in at most 3 blocks.
    assert len(held(cache, SLIDING, 0)) <= 3


def test_the_window_stays_while_a_model_generates(tmp_path):
    model = mxmoe.load(write(tmp_path / "x"))
    cache = model.new_cache(1000)
    model.forward(random_ids(700), cache=cache)
    for _ in model.generate(random_ids(5), 150, cache=cache, stop_token_ids=[]):
        assert len(held(cache, SLIDING, 0)) <= 2
    assert cache.lengths == (854,)
    assert len(held(cache, FULL, 0)) == -(-854 // 256)
    # 512 new tokens and a window of 20 take at most 4 blocks, however long the text.
    assert cache.layers[0].k.shape[0] == 4


def test_slots_are_where_the_block_table_says():
    cache = KVCache(CONFIG, 200, num_sequences=3, block_size=16, step_tokens=64)
    advance(cache, [2], [30])
    advance(cache, [0, 1], [5, 20])
    pages = advance(cache, [1, 2], [3, 40])
    for kind in (SLIDING, FULL):
        table, slots = pages[kind].block_table, pages[kind].slots
        assert table.dtype == np.int32
        assert slots.dtype == np.int64
        assert table.shape == (2, -(-200 // 16))
        positions = [(0, p) for p in range(20, 23)] + [(1, p) for p in range(30, 70)]
        assert slots.tolist() == [int(table[row, p // 16]) * 16 + p % 16 for row, p in positions]


@pytest.mark.parametrize("seed", range(4))
def test_no_place_is_given_twice(seed):
    """Any order of steps, abandoned steps and resets: what is visible is held by one sequence alone."""
    rng = np.random.default_rng(seed)
    cache = KVCache(CONFIG, 300, num_sequences=4, block_size=8, step_tokens=50)
    owner = {kind: {} for kind in (SLIDING, FULL)}  # slot -> (sequence, position)
    for _ in range(400):
        sequences = rng.permutation(4)[: rng.integers(1, 5)].tolist()
        counts = [int(min(rng.choice([1, 1, 3, 20, 50]), 300 - cache.lengths[s])) for s in sequences]
        for s, n in zip(sequences, counts, strict=True):
            if n == 0 or rng.random() < 0.02:
                cache.reset(s)
        going = [(s, n) for s, n in zip(sequences, counts, strict=True) if n and cache.lengths[s] + n <= 300]
        if not going:
            continue
        sequences, counts = map(list, zip(*going, strict=True))
        pages = cache.reserve(sequences, counts)
        if rng.random() < 0.2:
            continue  # a step that failed: nothing was committed
        at = [(s, cache.lengths[s] + i) for s, n in zip(sequences, counts, strict=True) for i in range(n)]
        for kind in (SLIDING, FULL):
            assert len(set(pages[kind].slots.tolist())) == len(at)
            owner[kind] |= dict(zip(pages[kind].slots.tolist(), at, strict=True))
        cache.commit(sequences, counts)
        for kind, pool in cache._pools.items():
            for s, length in enumerate(cache.lengths):
                first = 0 if kind == FULL else max(0, length - WINDOW + 1)
                slots = pool.slots(s, first, length)
                assert [owner[kind][slot] for slot in slots] == [(s, p) for p in range(first, length)]
            taken = [block for s in range(4) for block in held(cache, kind, s)]
            assert len(set(taken)) == len(taken)
            assert sorted(taken + pool._free) == list(range(pool.num_blocks))


def test_reset_gives_everything_back():
    cache = KVCache(CONFIG, 100, num_sequences=2, block_size=8, step_tokens=100)
    for _ in range(20):  # more often than the pool would last if a block were lost
        advance(cache, [0, 1], [100, 3])
        cache.reset(0)
        assert cache.lengths == (0, 3)
        assert held(cache, SLIDING, 0) == held(cache, FULL, 0) == []
        cache.reset(1)
        cache.reset(1)
    assert cache.lengths == (0, 0)


def test_an_abandoned_step_changes_nothing():
    cache = KVCache(CONFIG, 100, block_size=8)
    advance(cache, [0], [10])
    cache.reserve([0], [90])
    assert cache.lengths == (10,)
    got, want = cache.reserve([0], [3]), KVCache(CONFIG, 100, block_size=8)
    advance(want, [0], [10])
    for kind, pages in want.reserve([0], [3]).items():
        assert_exact(got[kind].slots, pages.slots)


@pytest.mark.parametrize("name", MODES)
def test_the_paging_is_not_seen_in_the_logits(tmp_path, name):
    """Small blocks, scattered over the pool by other sequences, give the same bits as large ones in order."""
    model = mxmoe.load(write(tmp_path / "x"), **MODES[name])
    ids = random_ids(150)
    want = model.forward(ids)
    for block_size in (1, 5, 16, 64, 128):
        options = {"dtype": MODES[name]["kv"], "block_size": block_size, "step_tokens": 33}
        cache = KVCache(CONFIG, 150, num_sequences=3, **options)
        rows = []
        for begin in range(0, 150, 30):
            model.forward(random_ids(11, seed=begin), cache=cache, sequences=[1])
            rows.append(model.forward(ids[begin : begin + 30], cache=cache, sequences=[2]))
        assert_exact(np.concatenate(rows), want)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_is_taken_only_when_written():
    """A cache for the whole context costs next to nothing before it is used."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    cache = KVCache(CONFIG, 131072, num_sequences=8, dtype="float32")
    assert cache.nbytes > 500 << 20
    assert resident() - before < 16 << 20
    written = cache.layers[1].k[:4000]
    written[...] = 1
    assert resident() - before >= written.nbytes // 2 > 16 << 20, "resident memory is not measured"


BAD_CACHES = {
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0; wanted 1 to"),
    "past the context": ({"max_tokens": 131073}, "wanted 1 to the model's context of 131072"),
    "no sequences": ({"num_sequences": 0}, "num_sequences is 0; wanted 1 or more"),
    "no block": ({"block_size": 0}, "block_size is 0"),
    "no step": ({"step_tokens": -1}, "step_tokens is -1"),
    "half a token": ({"max_tokens": 10.5}, "max_tokens is 10.5; wanted a whole number"),
    "a truth value": ({"num_sequences": True}, "num_sequences is True; wanted a whole number"),
    "unknown dtype": ({"dtype": "fp8"}, "kv is 'fp8'; wanted 'float32', 'bf16' or 'int8'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CACHES.values(), ids=BAD_CACHES)
def test_bad_caches_are_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message) as problem:
        KVCache(CONFIG, **({"max_tokens": 10} | changes))
    checkpoints.assert_clear(problem)


def test_what_does_not_fit_is_refused():
    cache = KVCache(CONFIG, 100, num_sequences=2, step_tokens=50)
    advance(cache, [1], [50])
    advance(cache, [1], [45])
    for call, message in [
        (lambda: cache.reserve([1], [6]), "sequence 1 holds 95 of 100 tokens; 6 more do not fit"),
        (lambda: cache.reserve([0], [51]), "51 new tokens; the cache takes up to 50"),
        (lambda: cache.reserve([2], [1]), "sequence is 2; the cache has 0 to 1"),
        (lambda: cache.reserve([-1], [1]), "sequence is -1"),
        (lambda: cache.reset(2), "sequence is 2"),
        (lambda: cache.check_room(0, 101), "101 more do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.lengths == (0, 95)
    advance(cache, [1, 0], [5, 50])
    assert cache.lengths == (50, 100)
