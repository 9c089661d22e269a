"""Attention's two kernels for Hopper: the same bits from both, whatever a row's company, and no unseen keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attention_case import check_attention, make, padded_left
from compare import assert_exact
from cuda_helpers import down, poisoned_up, up
from mxmoe import cuda
from test_cuda_sink_attention import run

SPLIT, WHOLE = "sink_attention_bf16_split_sm90_kernel", "sink_attention_bf16_sm90_kernel"
MODE = "bfloat16/bf16"


@pytest.fixture(autouse=True)
def _on_hopper(gpu):
    if "sm_90a" not in gpu.available_architectures():
        pytest.skip("no Hopper GPU")
    with cuda.architecture("sm_90a"):
        yield


def draw(sequences, heads=(8, 1), **options):
    return make(sequences, heads, 64, MODE, **options)


def run_whole(gpu, case, table=None):
    """The case in company of itself, often enough that nothing is split; its own rows of the result."""
    kwargs = case.kwargs
    table = kwargs["block_table"] if table is None else table
    rows = len(case.q) * case.q.shape[1]
    times = -(-3 * 64 * gpu.status().devices[0].multiprocessors // rows)
    starts = np.concatenate([case.cu_seqlens[:-1] + i * len(case.q) for i in range(times)] + [[times * len(case.q)]])
    got = run(
        replace(case, q=np.concatenate([case.q] * times)),
        block_table=np.tile(table, (times, 1)),
        cu_seqlens=starts.astype(np.int32),
        seq_lens=np.tile(kwargs["seq_lens"], times),
    )
    assert gpu.last_kernels()["sink_attention"] == WHOLE
    got = got.reshape(times, *case.q.shape)
    for other in got[1:]:
        assert_exact(other, got[0])
    return got[0]


def run_split(gpu, case):
    got = run(case)
    assert gpu.last_kernels()["sink_attention"] == SPLIT
    return got


@pytest.mark.parametrize("group", [1, 3, 4, 5, 8, 16, 64, 70])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 200])
def test_a_row_has_the_same_bits_in_both_and_in_any_chunk(gpu, group, window):
    length = 290
    case = draw([(length, length)], (group, 1), window=window, block_size=48)
    want = run_whole(gpu, case)
    check_attention(want, case)
    for begin, end in ((0, 1), (127, 128), (128, 129), (250, 257), (289, 290), (200, 290)):
        if end <= 128:  # a single chunk is never split
            assert_exact(run(case.tail(0, begin, end)), want[begin:end])
        elif -(-(end - begin) * group // 64) < 3 * gpu.status().devices[0].multiprocessors:
            assert_exact(run_split(gpu, case.tail(0, begin, end)), want[begin:end])
    for begin, end in ((3, 26), (100, 290), (131, 290)):
        assert_exact(run_whole(gpu, case.tail(0, begin, end)), want[begin:end])


@pytest.mark.parametrize("heads", [(3, 3), (8, 2), (24, 8)])
def test_any_batch_gives_the_same_bits(gpu, heads):
    sequences = [(0, 0), (3, 3), (1, 300), (40, 200), (0, 5), (150, 500), (1, 129), (9, 9)]
    case = draw(sequences, heads, window=170)
    want = run_whole(gpu, case)
    check_attention(want, case)
    assert_exact(run(case), want)
    ran, starts = set(), case.cu_seqlens
    for b, (new, length) in enumerate(sequences):
        if new:
            assert_exact(run(case.tail(b, length - new, length)), want[starts[b] : starts[b + 1]])
            ran.add(gpu.last_kernels()["sink_attention"])
    assert ran == {SPLIT, WHOLE}


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_warpgroups_gives_the_same_bits(gpu, seed):
    """More chunks than the ring has stages, and tiles of one block that see other chunks."""
    case = draw([(170, 1700)], (2, 1), window=None if seed % 2 else 1200)
    if gpu.architectures() == "emulation":
        gpu.set_seed(100 + seed)
    want = run_whole(gpu, case)
    if seed < 2:
        check_attention(want, case)
    if gpu.architectures() == "emulation":
        gpu.set_seed(0)
        assert_exact(run_whole(gpu, case), want)
    assert_exact(run_split(gpu, case.tail(0, 1699, 1700)), want[-1:])


@pytest.mark.parametrize("chunks", range(7, 14))
@pytest.mark.parametrize("seed", range(4))
def test_warpgroups_without_rows_stay_in_step(gpu, chunks, seed):
    """They have nothing to do but to fetch, and must not release what others still use."""
    if gpu.architectures() == "emulation":
        gpu.set_seed(10 * chunks + seed)
    case = draw([(3, 128 * chunks - 9)], (4, 1))
    whole = run_whole(gpu, case)
    assert_exact(run_split(gpu, case), whole)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_more_chunks_than_the_merge_takes_at_once(gpu, architecture):
    case = draw([(2, 128 * 258 - 5), (1, 128 * 256), (1, 128 * 257)], (3, 1))
    with cuda.architecture(architecture):
        check_attention(run(case), case)
        assert "split" in gpu.last_kernels()["sink_attention"]


def test_both_give_the_same_bits_at_depth(gpu):
    length = 128 * 257 - 20
    case = draw([(13, length)], (64, 1))
    want = run_whole(gpu, case)
    assert_exact(run_split(gpu, case.tail(0, length - 1, length)), want[-1:])


@pytest.mark.parametrize("sink", [-np.inf, -30.0, 0.0, 30.0, 1e30])
@pytest.mark.parametrize("sm_scale", [0.0, 0.125, -1.0])
def test_sinks_and_scales_of_any_size(gpu, sink, sm_scale):
    case = replace(draw([(4, 300), (30, 30)]), sm_scale=sm_scale)
    case.sinks[:] = sink
    split, share = run_split(gpu, case), poisoned_up(case.q.shape[:2])
    check_attention(split, case)
    assert_exact(run_whole(gpu, case), split)
    assert_exact(run(case, sink_share=share), split)
    assert np.isfinite(down(share)).all()


def test_a_query_that_is_not_finite_spoils_its_row_alone(gpu):
    case = draw([(5, 300)])
    want = run_split(gpu, case)
    for sm_scale in (0.125, 0.0):
        case.q[2, 1, 3], case.q[4, 0, 0] = np.inf, np.nan
        case = replace(case, sm_scale=sm_scale)
        broken = np.zeros(case.q.shape[:2], bool)
        broken[2, 1] = broken[4, 0] = True
        for got in (run_split(gpu, case), run_whole(gpu, case)):
            assert np.isnan(got[broken]).all()
            assert sm_scale == 0.0 or (got[~broken] == want[~broken]).all()


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("missing", [-1, 10**6, -(2**31)])
def test_keys_of_missing_blocks_are_not_seen(gpu, window, missing):
    """Missing at the edges of chunks and within, and most that a row sees: as if nothing weighed anything there."""
    case = draw([(260, 600)], (2, 1), window=window, block_size=32)
    gone = [10, 11, 13, 14, 15, 18]  # of the chunks that begin at 256, 384 and 512
    case.q[..., 0] = 1
    case.keys[0].values[..., 0] = 0
    for block in gone:
        case.keys[0].values[32 * block : 32 * block + 32] = np.eye(1, 64) * -1e4
    want = run_whole(gpu, case)
    check_attention(want, case)
    table = case.kwargs["block_table"].copy()
    table[0, gone] = missing
    assert_exact(run_whole(gpu, case, table), want)
    assert_exact(run(case, block_table=table), want)
    last = case.tail(0, 599, 600)
    table[0, : last.first_needed(0) // 32] = -1
    got = run(last, block_table=np.where(table == missing, missing, last.kwargs["block_table"]))
    assert gpu.last_kernels()["sink_attention"] == SPLIT
    assert_exact(got, want[-1:])


@pytest.mark.parametrize("window", [None, 33, 130])
def test_padding_before_the_first_key_is_not_felt(gpu, window):
    case = draw([(3, 3), (140, 140), (5, 290), (1, 1), (0, 4)], (4, 2), window=window)
    case.sinks[1] = -np.inf
    want = run(case)
    q, kwargs, own = padded_left(case, [0, 1, 64, 210, 9])
    arrays = {name: up(kwargs.pop(name)) for name in ("k_cache", "v_cache", "sinks")}
    out = poisoned_up(q.shape)
    cuda.sink_attention(up(q), **arrays, **kwargs, out=out)
    got = down(out)
    assert_exact(got[own], want)
    assert_exact(got[~own], np.zeros_like(got[~own]))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_sign_of_a_zero_does_not_tell_of_neighbours(gpu, architecture):
    """Sums that fall below the smallest number, where a tile's later rows see another chunk."""
    case = draw([(40, 270)], (1, 1))
    case.values[0].values[:] = 0
    case.values[0].values[:128] = -1e-40
    case.keys[0].values[:] = 0
    case.keys[0].values[128:256] = 1
    case.q[:] = 8  # a score of 64 against 0
    with cuda.architecture(architecture):
        together = run(case)
        for position in (254, 255, 256):
            alone = run(case.tail(0, position, position + 1))
            assert_exact(alone, together[position - 230 : position - 229])
            assert not np.signbit(alone[alone == 0]).any()


CHANGES = {
    "sinks": lambda case: {"sinks": case.sinks + 4},
    "window": lambda case: {"sliding_window": 140},
    "keys": lambda case: {"k_cache": np.roll(case.kwargs["k_cache"], 1, axis=2)},
    "values": lambda case: {"v_cache": np.roll(case.kwargs["v_cache"], 1, axis=2)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_must_differ_does(gpu, change):
    case = draw([(2, 200)], window=141)
    check_attention(run(case), case)
    with pytest.raises(AssertionError):
        check_attention(run(case, **change(case)), case)
