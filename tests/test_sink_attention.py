"""sink_attention against float64, torch and itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attention_case import KV_MODES, Stored, check_attention, make, padded_left, torch_attention
from compare import assert_close, assert_exact, poisoned
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import FLOATS, guarded, strided, strided_output, to_torch, unchanged

RAGGED = [(0, 0), (3, 3), (0, 5), (1, 70), (65, 65), (5, 200), (1, 1), (0, 0), (17, 90)]


def run(case, dtype="float32", **kwargs):
    return guarded(ops.sink_attention, case.q, **case.kwargs, shape=case.q.shape, dtype=FLOATS[dtype], **kwargs)


@pytest.mark.parametrize("head_dim", [1, 2, 4, 7, 8, 15, 16, 17, 24, 32, 48, 64, 65, 80, 96, 128, 160, 255, 256])
@pytest.mark.parametrize("kv_dtype", KV_MODES)
def test_any_head_dim(isa, head_dim, kv_dtype):
    case = make([(20, 70), (1, 9)], head_dim=head_dim, kv_dtype=kv_dtype)
    check_attention(run(case, misalign=1), case)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16/bf16"])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (8, 1), (64, 8), (64, 1), (65, 1), (130, 2), (192, 1)])
@pytest.mark.parametrize("window", [None, 20])
def test_any_number_of_heads(isa, heads, window, kv_dtype):
    case = make([(3, 70), (7, 30)], heads, kv_dtype=kv_dtype, window=window)
    check_attention(run(case), case)


@pytest.mark.parametrize("kv_dtype", KV_MODES)
@pytest.mark.parametrize("q_dtype", FLOATS)
@pytest.mark.parametrize("y_dtype", FLOATS)
@pytest.mark.parametrize("sinks_dtype", FLOATS)
def test_any_dtypes(isa, kv_dtype, q_dtype, y_dtype, sinks_dtype):
    case = make([(4, 80)], (8, 2), 24, kv_dtype, q_dtype, sinks_dtype)
    check_attention(run(case, y_dtype), case, y_dtype)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16/bf16"])
@pytest.mark.parametrize("window", [None, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 199, 200, 201, 2**31, 2**62])
@pytest.mark.parametrize("new", [1, 70, 200])
def test_any_window(isa, window, new, kv_dtype):
    case = make([(new, 200)], (2, 1), kv_dtype=kv_dtype, window=window)
    check_attention(run(case), case)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16/bf16"])
def test_window_of_zero_is_none(isa, kv_dtype):
    case = make([(70, 70)], kv_dtype=kv_dtype)
    assert_exact(case.run(sliding_window=0), case.run())


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16/bf16"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 193])
@pytest.mark.parametrize("new", [1, 2, 64])
@pytest.mark.parametrize("window", [None, 64])
def test_any_length(isa, length, new, window, kv_dtype):
    case = make([(min(new, length), length)] * 8, (4, 1), 32, kv_dtype, window=window)
    check_attention(run(case), case)


@pytest.mark.parametrize("block_size", [1, 16, 64, 65, 300])
@pytest.mark.parametrize("kv_dtype", KV_MODES)
@pytest.mark.parametrize("window", [None, 33])
def test_ragged_batches_on_any_pages(isa, block_size, kv_dtype, window):
    case = make(RAGGED, kv_dtype=kv_dtype, window=window, block_size=block_size)
    check_attention(run(case), case)


@pytest.mark.parametrize("sequences", [[], [(0, 0)], [(0, 40), (0, 0)]])
def test_nothing_to_do(isa, sequences):
    case = make([(1, 1)])
    kwargs = case.kwargs | dict(
        cu_seqlens=np.zeros(len(sequences) + 1, np.int32),
        seq_lens=np.array([length for _, length in sequences], np.int32),
        block_table=np.full((len(sequences), 3), -1, np.int32),
    )
    assert ops.sink_attention(case.q[:0], **kwargs).shape == (0, 4, 16)


@pytest.mark.parametrize("kv_dtype", KV_MODES)
@pytest.mark.parametrize("window", [None, 1, 50])
def test_sink_share(isa, kv_dtype, window):
    case = make(RAGGED, kv_dtype=kv_dtype, window=window)
    share, beside = poisoned(case.q.shape[:2], np.float32)
    got = run(case, sink_share=None)
    kwargs = case.kwargs
    assert_exact(ops.sink_attention(case.q, **kwargs, sink_share=share), got)
    beside()
    want = np.empty(share.shape)
    reference.sink_attention(case.rounded_q, **kwargs, sink_share=want)
    coarsest = "bfloat16" if case.rounds else "float32"
    assert_close(share, want, baseline=torch_attention(case)[1], dtype=coarsest, out_dtype="float32", scale=1.0)


def test_without_sinks_it_is_plain_attention(isa):
    case = make([(70, 70)], (2, 2), 32)
    case.sinks[:] = -np.inf
    k, v = (torch.from_numpy(x[0].wide).float().transpose(0, 1) for x in (case.keys, case.values))
    plain = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(case.q).transpose(0, 1), k, v, is_causal=True
    )
    assert_close(run(case), case.run(reference.sink_attention), baseline=plain.transpose(0, 1).contiguous())
    share = np.full((70, 2), np.nan, np.float32)
    case.run(sink_share=share)
    assert_exact(share, np.zeros((70, 2), np.float32))


@pytest.mark.parametrize("kv_dtype", KV_MODES)
def test_a_great_sink_takes_everything(isa, kv_dtype):
    case = make([(70, 70)], kv_dtype=kv_dtype)
    case.sinks[:] = 1e30
    share = np.full((70, 4), np.nan, np.float32)
    assert_exact(case.run(sink_share=share), np.zeros_like(case.q))
    assert_exact(share, np.ones((70, 4), np.float32))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16/bf16"])
@pytest.mark.parametrize("sm_scale", [0.0, 1e-3, 1.0, 20.0, -1.0])
@pytest.mark.parametrize("sink", [-1e4, -30.0, 30.0])
def test_scores_of_any_size(isa, sm_scale, sink, kv_dtype):
    case = replace(make([(20, 100)], head_dim=32, kv_dtype=kv_dtype), sm_scale=sm_scale)
    case.sinks[:] = sink
    check_attention(run(case), case)


@pytest.mark.parametrize("kv_dtype", KV_MODES)
def test_token_strides(isa, kv_dtype):
    case = make([(9, 40)], kv_dtype=kv_dtype)
    want = case.run()
    out, beside = strided_output(case.q.shape, np.float32, 7)
    assert_exact(replace(case, q=strided(case.q)).run(out=out), want)
    beside()
    # Queries as they come: the first heads in a row of queries, keys and values.
    rows = np.concatenate([case.q, case.q[:, :2]], axis=1)
    assert_exact(replace(case, q=rows[:, :4]).run(), want)


@pytest.mark.parametrize("kv_dtype", KV_MODES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (130, 2)])
@pytest.mark.parametrize("window", [None, 1, 2, 64, 100])
def test_bits_do_not_depend_on_the_split(isa, kv_dtype, heads, window):
    length = 150 if heads[0] < 100 else 70
    case = make([(length, length)], heads, kv_dtype=kv_dtype, window=window)
    want = case.run()
    for size in (1, 7, 64, 65, 100):
        starts = range(0, length, size)
        parts = [case.tail(0, start, min(start + size, length)).run() for start in starts]
        assert_exact(np.concatenate(parts), want)


@pytest.mark.parametrize("kv_dtype", KV_MODES)
@pytest.mark.parametrize("window", [None, 33])
def test_bits_do_not_depend_on_pages_threads_and_company(isa, window, kv_dtype):
    case = make(RAGGED, kv_dtype=kv_dtype, window=window)
    with ops.num_threads(1):
        want = case.run()
    for threads in (2, 3):
        with ops.num_threads(threads):
            assert_exact(case.run(), want)
    for block_size, seed in ((1, 1), (16, 2), (64, 3), (65, 4), (7, 5)):
        assert_exact(replace(case, block_size=block_size, page_seed=seed).run(), want)
    cu = case.cu_seqlens
    for b, (new, length) in enumerate(case.sequences):
        assert_exact(case.tail(b, length - new, length).run(), want[cu[b] : cu[b + 1]])
    order = [5, 2, 8, 4, 0, 3, 1, 6, 7]
    shuffled = replace(
        case,
        q=np.concatenate([case.q[cu[b] : cu[b + 1]] for b in order]),
        sequences=[case.sequences[b] for b in order],
        keys=[case.keys[b] for b in order],
        values=[case.values[b] for b in order],
    )
    assert_exact(shuffled.run(), np.concatenate([want[cu[b] : cu[b + 1]] for b in order]))


def test_caches_and_tables_are_only_read(isa):
    case = make(RAGGED, kv_dtype="int8", window=33)
    kwargs = case.kwargs
    for array in kwargs.values():
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    with unchanged(case.q, *kwargs.values()):
        ops.sink_attention(case.q, **kwargs)


def rolled_heads(case):
    def turn(stored):
        return [Stored(np.roll(x.values, 1, axis=1), x.scales) for x in stored]

    return replace(case, keys=turn(case.keys), values=turn(case.values))


WRONG = {
    "sink dropped": lambda c: replace(c, sinks=np.full_like(c.sinks, -np.inf)),
    "sink of another head": lambda c: replace(c, sinks=np.roll(c.sinks, 1)),
    "window one too wide": lambda c: replace(c, window=c.window + 1),
    "window one too narrow": lambda c: replace(c, window=c.window - 1),
    "window forgotten": lambda c: replace(c, window=None),
    "scale forgotten": lambda c: replace(c, sm_scale=1.0),
    "heads of another group": rolled_heads,
    "keys shifted": lambda c: replace(c, keys=[Stored(np.roll(x.values, 1, axis=0)) for x in c.keys]),
    "values shifted": lambda c: replace(c, values=[Stored(np.roll(x.values, 1, axis=0)) for x in c.values]),
    "keys for values": lambda c: replace(c, values=c.keys),
    "a key of the future": lambda c: replace(c, sequences=[(new, length + 1) for new, length in c.sequences]),
    "a key too few": lambda c: replace(c, sequences=[(new, length - 1) for new, length in c.sequences]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_attention_is_rejected(wrong):
    case = make([(3, 60), (30, 90)], (8, 2), window=33)
    case.sinks += 1
    changed = wrong(case)
    if changed.sequences != case.sequences:  # one more key than there was: any will do
        changed.keys, changed.values = (
            [Stored(np.concatenate([x.values, x.values[:1]])) for x in stored]
            for stored in (changed.keys, changed.values)
        )
    bad = changed.run(reference.sink_attention).astype(np.float32)
    assert np.isfinite(bad).all()
    with pytest.raises(AssertionError):
        check_attention(bad, case)


def test_heads_interleaved_over_groups_are_rejected():
    # Head h belongs to group h / (Hq / Hkv), not to h modulo Hkv.
    case = make([(5, 60)], (8, 2))
    order = np.arange(8).reshape(4, 2).T.reshape(-1)
    bad = replace(case, q=case.q[:, order], sinks=case.sinks[order]).run(reference.sink_attention)
    with pytest.raises(AssertionError):
        check_attention(bad[:, np.argsort(order)].astype(np.float32), case)


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cu_seqlens=int32(1, 3, 8)), "cu_seqlens runs from 1 to 8; wanted 0 to num_tokens = 8"),
        (dict(cu_seqlens=int32(0, 3, 7)), "cu_seqlens runs from 0 to 7; wanted 0 to num_tokens = 8"),
        (dict(cu_seqlens=int32(0, 9, 8)), "cu_seqlens falls from 9 to 8"),
        (dict(cu_seqlens=int32(0, -1, 8)), "cu_seqlens falls from 0 to -1"),
        (dict(cu_seqlens=int32(0, 8)), r"cu_seqlens has shape \(2,\)"),
        (dict(seq_lens=int32(2, 90)), r"seq_lens\[0\] is 2; wanted at least its 3 new tokens"),
        (dict(seq_lens=int32(-1, 90)), r"seq_lens\[0\] is -1"),
        (dict(seq_lens=int32(60, 113)), r"seq_lens\[1\] is 113; block_table has room for 112"),
        (dict(seq_lens=int32(60, 2**31 - 1)), r"seq_lens\[1\] is 2147483647; block_table has room for 112"),
        (dict(seq_lens=int32(60, 90, 1)), "cu_seqlens has shape"),
        (dict(sliding_window=-1), "sliding_window is -1; wanted 1 or more"),
        (dict(sm_scale=np.nan), "sm_scale is nan; wanted a finite number"),
        (dict(sm_scale=np.inf), "sm_scale is inf"),
        (dict(sinks=np.zeros(7, np.float32)), r"sinks has shape \(7,\)"),
        (dict(k_scales=np.zeros((1, 2, 16), np.float32)), "k_scales came with a float32 cache; wanted none"),
        (dict(v_scales=np.zeros((1, 2, 16), np.float32)), "v_scales came with a float32 cache; wanted none"),
        (dict(sink_share=np.zeros((8, 7), np.float32)), "sink_share has shape"),
        (dict(out=np.zeros((8, 8, 15), np.float32)), "out has shape"),
        (dict(block_table=np.zeros((1, 7), np.int32)), "block_table has shape"),
        (dict(block_table=np.zeros((2, 0), np.int32)), "block_table has room for 0"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    case = make([(3, 60), (5, 90)], (8, 2))
    with pytest.raises(ValueError, match=message):
        case.run(**changes)


@pytest.mark.parametrize("bad", [-1, 13, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("window", [None, 20])
def test_blocks_out_of_range_are_an_error_only_where_they_are_looked_at(isa, bad, window):
    case = make([(3, 60), (5, 90)], (8, 2), window=window)
    kwargs = case.kwargs
    assert kwargs["k_cache"].shape[0] == 13 or window
    want = case.run()
    for b in (0, 1):
        _, length = case.sequences[b]
        for column in range(kwargs["block_table"].shape[1]):
            table = kwargs["block_table"].copy()
            table[b, column] = bad
            if case.first_needed(b) // 16 <= column <= (length - 1) // 16:
                with pytest.raises(ValueError, match=rf"block_table\[{b}, {column}\] is {bad}; wanted 0 to"):
                    case.run(block_table=table)
            else:
                assert_exact(case.run(block_table=table), want)


@pytest.mark.parametrize(
    ("q_shape", "cache_shape", "message"),
    [
        ((1, 3, 16), (2, 2, 4, 16), "q has 3 heads; wanted a multiple of k_cache's 2"),
        ((1, 0, 16), (2, 2, 4, 16), "q has 0 heads"),
        ((1, 2, 16), (2, 2, 4, 8), r"q has shape \(1, 2, 16\)"),
        ((1, 1, 257), (2, 1, 4, 257), "q has head_dim 257; wanted at most 256"),
        ((1, 1, 16), (2, 0, 4, 16), "k_cache has shape"),
        ((1, 1, 16), (2, 1, 0, 16), "k_cache has shape"),
        ((1, 1, 0), (2, 1, 4, 0), "k_cache has shape"),
        ((1, 1, 16), (0, 1, 4, 16), r"block_table\[0, 0\] is 0; wanted 0 to -1"),
    ],
)
def test_caches_that_do_not_fit(q_shape, cache_shape, message):
    cache = np.zeros(cache_shape, np.float32)
    with pytest.raises(ValueError, match=message):
        ops.sink_attention(
            np.zeros(q_shape, np.float32),
            cache,
            cache.copy(),
            np.zeros(q_shape[1], np.float32),
            block_table=np.zeros((1, 1), np.int32),
            cu_seqlens=int32(0, 1),
            seq_lens=int32(1),
            sm_scale=1.0,
        )


@pytest.mark.parametrize("missing", ["k_scales", "v_scales"])
def test_int8_caches_want_scales(missing):
    with pytest.raises(ValueError, match=f"{missing} is missing; an int8 cache wants"):
        make([(3, 60)], kv_dtype="int8").run(**{missing: None})


def test_caches_of_two_dtypes_are_an_error():
    case = make([(3, 60)])
    with pytest.raises(TypeError, match="v_cache has dtype bfloat16; wanted float32"):
        case.run(v_cache=case.kwargs["v_cache"].astype(FLOATS["bfloat16"]))


def test_torch_tensors_all_the_way(isa):
    case = make([(3, 60)], kv_dtype="bfloat16", q_dtype="bfloat16")
    tensors = {k: to_torch(v) if isinstance(v, np.ndarray) else v for k, v in case.kwargs.items()}
    got = ops.sink_attention(to_torch(case.q), **tensors)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.bfloat16
    assert_exact(got, case.run())


def cache_with_strides(cache, order, extra):
    """The same cache in memory whose axes lie in another order, the last but `extra` heads further apart."""
    blocks, heads, size, head_dim = cache.shape
    shape = [cache.shape[axis] for axis in order]
    memory = np.full((*shape[:2], shape[2] + extra, head_dim), np.nan, np.float32).astype(cache.dtype)
    view = memory[:, :, : shape[2]].transpose([*np.argsort(order), 3])
    view[...] = cache
    assert view.shape == (blocks, heads, size, head_dim)
    return view


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "bfloat16/bf16"])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("extra", [0, 3])
def test_caches_of_any_strides(isa, kv_dtype, order, extra):
    case = make(RAGGED, kv_dtype=kv_dtype, window=33, block_size=7)
    kwargs = case.kwargs
    want = case.run()
    turned = {
        "k_cache": cache_with_strides(kwargs["k_cache"], order, extra),
        "v_cache": cache_with_strides(kwargs["v_cache"], order[::-1], 0),
    }
    assert turned["k_cache"].strides != turned["v_cache"].strides
    assert_exact(case.run(**turned), want)


def test_strides_that_cut_heads_are_an_error():
    case = make([(3, 60)], head_dim=16)
    cache = case.kwargs["v_cache"]
    memory = np.zeros((*cache.shape[:3], 17), np.float32)
    with pytest.raises(
        ValueError, match="v_cache has a stride of 17 elements on axis 2; wanted a multiple of head_dim"
    ):
        case.run(v_cache=memory[..., :16])


@pytest.mark.parametrize("kv_dtype", KV_MODES)
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("threads", [1, 3])
def test_padding_before_the_first_key_is_not_felt(isa, kv_dtype, window, threads):
    case = make([(3, 3), (70, 70), (5, 90), (1, 1), (0, 4), (17, 17)], kv_dtype=kv_dtype, window=window)
    case.sinks[1] = -np.inf
    q, kwargs, own = padded_left(case, [0, 1, 64, 2100, 9, 0])
    want_share, share = (np.full((len(x), 4), np.nan, np.float32) for x in (case.q, q))
    want = case.run(sink_share=want_share)
    with ops.num_threads(threads):
        got = guarded(ops.sink_attention, q, **kwargs, shape=q.shape, dtype=np.float32)
        ops.sink_attention(q, **kwargs, sink_share=share)
    assert_exact(got[own], want)
    assert_exact(share[own], want_share)
    assert_exact(got[~own], np.zeros_like(got[~own]))
    assert_exact(share[~own], np.tile(np.float32([1, 0, 1, 1]), ((~own).sum(), 1)))


@pytest.mark.parametrize("window", [None, 5])
def test_padding_in_the_reference(window):
    case = make([(3, 3), (5, 40)], window=window)
    q, kwargs, own = padded_left(case, [4, 9])
    share = np.full(q.shape[:2], np.nan)
    got = reference.sink_attention(q, **kwargs, sink_share=share)
    assert_exact(got[own], case.run(reference.sink_attention))
    assert_exact(got[~own], np.zeros_like(got[~own]))
    assert (share[~own] == 1).all() and (share[own] < 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(key_starts=int32(0)), r"key_starts has shape \(1,\)"),
        (dict(key_starts=int32(0, -1)), r"key_starts\[1\] is -1; wanted 0 or more"),
        (dict(key_starts=int32(0, 23)), r"seq_lens\[1\] is 90; block_table has room for 89"),
        (
            dict(key_starts=int32(1, 0), seq_lens=int32(1, 90)),
            r"seq_lens\[0\] is 1; wanted at least its 3 new tokens",
        ),
        (dict(key_starts=int32(5, 0), seq_lens=int32(-1, 90)), r"seq_lens\[0\] is -1"),
    ],
)
def test_starts_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make([(3, 60), (5, 90)], (8, 2)).run(**changes)
