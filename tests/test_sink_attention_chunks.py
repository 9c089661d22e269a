"""sink_attention over many keys: their fixed chunks, and the bits of a row wherever it is computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attention_case import KV_MODES, AttentionCase, Stored, expected, make, torch_attention
from compare import SLACK, assert_close, assert_exact, relative_error
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import guarded

CHUNK = 1024  # keys that are summed before they meet the others
ROUNDED = ["bfloat16/bf16", "int8/bf16"]

all_modes = pytest.mark.parametrize("mode", KV_MODES)


def check(got, case):
    want, scale = expected(case)
    # Thousands of weights average their roundings out: the floor of one rounding of the result would be too wide.
    assert_close(got, want, baseline=torch_attention(case)[0], scale=scale)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("threads", [1, 3])
@all_modes
def test_lengths_around_a_chunk(isa, length, new, threads, mode):
    case = make([(new, length), (1, 5)], (4, 2), 16, mode)
    with ops.num_threads(threads):
        check(guarded(ops.sink_attention, case.q, **case.kwargs, shape=case.q.shape), case)


@pytest.mark.parametrize("window", [1, 128, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mode", ["float32", *ROUNDED])
def test_windows_around_a_chunk(isa, window, threads, mode):
    case = make([(70, 2 * CHUNK + 10), (2, CHUNK + 64)], (2, 1), 16, mode, window=window)
    with ops.num_threads(threads):
        check(case.run(), case)


@pytest.mark.parametrize("block_size", [64, 300])
@pytest.mark.parametrize("mode", ROUNDED)
def test_long_contexts_at_the_model_shapes(isa, block_size, mode):
    case = make([(2, 8200)], (64, 8), 64, mode, block_size=block_size)
    check(case.run(), case)


@pytest.mark.parametrize("window", [None, 128])
@all_modes
def test_decoding_gives_the_bits_of_prefill(isa, window, mode):
    length = 2 * CHUNK + 70
    case = make([(length, length)], (2, 1), 16, mode, window=window)
    with ops.num_threads(1):
        want = case.run()
    ends = [1, 2, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 64, 2 * CHUNK, 2 * CHUNK + 1, length]
    for threads in (1, 2, 3):
        with ops.num_threads(threads):
            for end in ends:
                assert_exact(case.tail(0, end - 1, end).run(), want[end - 1 : end])
            assert_exact(case.run(), want)
            parts = [case.tail(0, start, min(start + 700, length)).run() for start in range(0, length, 700)]
            assert_exact(np.concatenate(parts), want)


@pytest.mark.parametrize("heads", [(3, 1), (5, 5), (8, 1), (65, 1)])
@pytest.mark.parametrize("mode", ["float32", *ROUNDED])
def test_bits_at_any_number_of_heads_threads_and_company(isa, heads, mode):
    sequences = [(1, CHUNK + 3), (0, 7), (3, 2 * CHUNK + 1), (2, 2), (70, CHUNK + 20)]
    case = make(sequences, heads, 24, mode)
    with ops.num_threads(1):
        want = case.run()
    share = np.full((2, *case.q.shape[:2]), np.nan, np.float32)
    for i, threads in enumerate((1, 3)):
        with ops.num_threads(threads):
            assert_exact(case.run(sink_share=share[i]), want)
            cu = case.cu_seqlens
            for b, (new, length) in enumerate(sequences):
                assert_exact(case.tail(b, length - new, length).run(), want[cu[b] : cu[b + 1]])
    assert_exact(share[1], share[0])


@pytest.mark.parametrize("sink", [-np.inf, -1e30, -3.2e38, 0.0, 1e30, np.inf, np.nan])
@pytest.mark.parametrize("threads", [1, 3])
@all_modes
def test_sinks_of_any_size(isa, sink, threads, mode):
    case = make([(2, CHUNK + 9), (1, 1)], kv_dtype=mode)
    case.sinks[::2] = sink
    share = np.full(case.q.shape[:2], np.nan, np.float32)
    with ops.num_threads(threads):
        got = case.run(sink_share=share)
    if not np.isfinite(sink) and sink != -np.inf:  # as the formula says
        assert np.isnan(got[:, ::2]).all() and np.isnan(share[:, ::2]).all()
        case = replace(case, q=case.q[:, 1::2], sinks=case.sinks[1::2])
        got = got[:, 1::2]
    elif sink < -1e29 or sink > 1e29:
        assert_exact(share[:, ::2], np.full_like(share[:, ::2], float(sink > 0)))
        assert got[:, ::2].any() == (sink < 0)
    assert np.isfinite(got).all()
    check(got, case)


@pytest.mark.parametrize("mode", ["float32", *ROUNDED])
def test_a_broken_key_of_another_chunk(isa, mode):
    length = CHUNK + 200
    case = make([(length, length)], (4, 1), 16, mode)
    want = case.run()
    for at in (CHUNK - 1, CHUNK, CHUNK + 100):
        for (stored,) in (case.keys, case.values):
            array = stored.values if stored.scales is None else stored.scales
            kept = array[at].copy()
            array[at] = np.nan
            got = case.run()
            assert_exact(got[:at], want[:at])
            assert np.isnan(got[at:]).all()
            array[at] = kept


@pytest.mark.parametrize("mode", KV_MODES)
@pytest.mark.parametrize("length", [1, 40, CHUNK + 100])
def test_equal_weights_sum_exactly(isa, mode, length):
    # Scores of zero give weights of one, and whole numbers sum exactly, by whatever instructions.
    case = make([(min(length, 5), length)], (4, 2), 64, mode)
    rng = np.random.default_rng(0)
    whole = rng.integers(-100, 101, case.values[0].values.shape)
    scales = None if case.values[0].scales is None else np.ones(whole.shape[:2], np.float32)
    case.values = [Stored(whole.astype(case.values[0].values.dtype), scales)]
    case = replace(case, sm_scale=0.0, sinks=np.full(4, -np.inf, np.float32))
    got = case.run()
    for i in range(len(got)):
        seen = whole[: length - len(got) + i + 1]
        want = (seen.sum(axis=0).astype(np.float32) / np.float32(len(seen))).astype(np.float32)
        assert_exact(got[i], np.repeat(want, 2, axis=0))


def median_error(y, case: AttentionCase) -> float:
    """Of a result, from the reference, which rounds nothing."""
    return float(np.median(relative_error(y, case.run(reference.sink_attention))))


@pytest.mark.parametrize("mode", KV_MODES)
def test_rounding_costs_what_it_does_in_torch(isa, mode):
    case = make([(40, CHUNK + 300)], (8, 2), 64, mode)
    ours = median_error(case.run(), case)
    by_torch = [median_error(torch_attention(case)[0], case)]
    if not case.rounds:
        assert ours <= SLACK * by_torch[0]
        return
    if isa == "avx512" and mode.startswith("int8"):  # as integers, where the processor has them
        by_torch.append(median_error(torch_attention(case, by_steps=True)[0], case))
    # And it is a rounding, not float32 in disguise.
    assert any(error / SLACK <= ours <= SLACK * error for error in by_torch)
    exact = replace(case, activations="float32")
    assert ours > 100 * median_error(exact.run(), exact)


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_what_activations_mean(isa, activations):
    # A float32 cache is never rounded for; for the others bf16 is the coarsest there is.
    float32 = make([(3, 90)])
    assert_exact(replace(float32, activations=activations).run(), float32.run())
    for kv_dtype in ("bfloat16", "int8"):
        case = make([(3, 90)], kv_dtype=kv_dtype)
        assert_exact(replace(case, activations=activations).run(), replace(case, activations="bf16").run())
        kwargs = case.kwargs
        del kwargs["activations"]
        assert_exact(ops.sink_attention(case.q, **kwargs), replace(case, activations="bf16").run())


def test_unknown_activations_are_an_error():
    with pytest.raises(ValueError, match="activations is 'fp8'; wanted 'float32', 'bf16' or 'int8'"):
        make([(3, 90)]).run(activations="fp8")
