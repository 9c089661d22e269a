"""sink_attention on a GPU against float64, torch and itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from attention_case import check_attention, make, padded_left, torch_attention
from compare import assert_close, assert_exact
from cuda_helpers import down, poisoned_up, up
from mxmoe import cuda, ops
from mxmoe.reference import ops as reference
from op_helpers import FLOATS


@dataclass(frozen=True)
class Form:
    """The cache's dtype and whether queries and weights are rounded, as in attention_case; and whose kernels run."""

    mode: str
    head_dim: int = 32
    architecture: str = "sm_80"


FORMS = {
    "float32": Form("float32"),
    "bfloat16": Form("bfloat16"),
    "bfloat16/bf16": Form("bfloat16/bf16"),
    "hopper": Form("bfloat16/bf16", 64, "sm_90a"),
}
TENSOR_CORES = list(FORMS)[2:]
NOT_ROUNDED_TWICE = [name for name in FORMS if name != "bfloat16"]
SPLIT, WHOLE = "sink_attention_bf16_split_{}_kernel", "sink_attention_bf16_{}_kernel"
SIMT = "sink_attention_simt_sm80_kernel"
RAGGED = [(0, 0), (3, 3), (0, 5), (1, 70), (33, 33), (5, 200), (1, 1), (0, 0), (17, 90)]


@pytest.fixture(params=FORMS)
def form(request, gpu):
    """Run a test once in every form, or in those that it names."""
    chosen = FORMS[request.param]
    if chosen.architecture not in gpu.available_architectures():
        pytest.skip("no Hopper GPU")
    with cuda.architecture(chosen.architecture):
        yield chosen


few_forms = pytest.mark.parametrize("form", NOT_ROUNDED_TWICE, indirect=True)
tensor_cores = pytest.mark.parametrize("form", TENSOR_CORES, indirect=True)


def kernel(name, form):
    """Give one of the tensor cores' kernels its architecture."""
    return name.format(form.architecture.replace("sm_", "sm").rstrip("a"))


def run(case, dtype="float32", **changes: Any):
    """The case on the GPU, its result poisoned beforehand."""
    names = ("k_cache", "v_cache", "sinks")
    kwargs = case.kwargs | changes
    arrays = {name: up(kwargs.pop(name)) for name in names}
    scales = kwargs.pop("k_scales", None), kwargs.pop("v_scales", None)
    assert scales == (None, None)
    out = poisoned_up(case.q.shape, FLOATS[dtype])
    if "max_seq_len" not in kwargs:
        kwargs["max_seq_len"] = max((length for _, length in case.sequences), default=0)
    attend = cuda.sink_attention
    attend(up(case.q), **arrays, **kwargs, out=out)
    return down(out)


@pytest.mark.parametrize("head_dim", [1, 7, 16, 32, 33, 64, 80, 128, 256])
def test_any_head_dim(gpu, head_dim, form):
    case = make([(3, 70), (1, 9)], head_dim=head_dim, kv_dtype=form.mode)
    check_attention(run(case), case)
    ran = gpu.last_kernels()["sink_attention"]
    if form.mode != "bfloat16/bf16" or head_dim not in (32, 64, 128):
        assert ran == SIMT
    elif head_dim != 64:
        assert ran == WHOLE.format("sm80")
    else:
        assert ran == kernel(WHOLE, form)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (8, 1), (6, 2), (17, 1), (64, 8)])
@pytest.mark.parametrize("window", [None, 20])
@few_forms
def test_any_number_of_heads(gpu, heads, window, form):
    case = make([(3, 70), (7, 30)], heads, form.head_dim, kv_dtype=form.mode, window=window)
    check_attention(run(case), case)


@pytest.mark.parametrize("q_dtype", FLOATS)
@pytest.mark.parametrize("y_dtype", FLOATS)
@pytest.mark.parametrize("sinks_dtype", FLOATS)
@pytest.mark.parametrize("length", [40, 300])
def test_any_dtypes(gpu, form, q_dtype, y_dtype, sinks_dtype, length):
    case = make([(2, length)], (8, 2), form.head_dim, form.mode, q_dtype, sinks_dtype)
    check_attention(run(case, y_dtype), case, y_dtype)


@few_forms
@pytest.mark.parametrize("window", [None, 1, 2, 31, 32, 33, 127, 128, 129, 300, 2**31, 2**62])
@pytest.mark.parametrize("new", [1, 20])
def test_any_window(gpu, window, new, form):
    case = make([(new, 300)], (2, 1), form.head_dim, kv_dtype=form.mode, window=window)
    check_attention(run(case), case)


@few_forms
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 127, 128, 129, 257, 520])
@pytest.mark.parametrize("new", [1, 3])
def test_any_length(gpu, length, new, form):
    case = make([(min(new, length), length)] * 2, (4, 1), form.head_dim, form.mode)
    check_attention(run(case), case)


@pytest.mark.parametrize("block_size", [1, 16, 65, 300])
@pytest.mark.parametrize("window", [None, 33])
def test_ragged_batches_on_any_pages(gpu, block_size, form, window):
    case = make(RAGGED, head_dim=form.head_dim, kv_dtype=form.mode, window=window, block_size=block_size)
    check_attention(run(case), case)


@few_forms
@pytest.mark.parametrize("window", [None, 50])
def test_sink_share(gpu, form, window):
    case = make([(3, 30), (2, 300)], head_dim=form.head_dim, kv_dtype=form.mode, window=window)
    share = poisoned_up(case.q.shape[:2])
    got = run(case, sink_share=share)
    assert_exact(got, run(case))
    want = np.empty(case.q.shape[:2])
    reference.sink_attention(case.rounded_q, **case.kwargs, sink_share=want)
    coarsest = "bfloat16" if case.rounds else "float32"
    baseline = torch_attention(case)[1]
    assert_close(down(share), want, baseline=baseline, dtype=coarsest, out_dtype="float32", scale=1.0)


@few_forms
@pytest.mark.parametrize("sink", [-np.inf, -30.0, 30.0, 1e30])
@pytest.mark.parametrize("sm_scale", [0.0, 1.0, -1.0])
def test_sinks_and_scores_of_any_size(gpu, form, sink, sm_scale):
    case = replace(make([(2, 200)], head_dim=form.head_dim, kv_dtype=form.mode), sm_scale=sm_scale)
    case.sinks[:] = sink
    check_attention(run(case), case)


@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_split_pages_and_company(gpu, form, window):
    length = 150
    case = make([(length, length), (3, 290)], (4, 2), form.head_dim, form.mode, window=window)
    want = run(case)
    for size in (1, 7, 64):
        start = length - 2 * size
        for begin in range(start, length, size):
            part = case.tail(0, begin, begin + size)
            assert_exact(run(part), want[begin : begin + size])
    assert_exact(run(case.tail(1, 287, 290)), want[length:])
    for block_size, seed in ((1, 1), (64, 2)):
        assert_exact(run(replace(case, block_size=block_size, page_seed=seed)), want)
    assert_exact(run(case, max_seq_len=None), want)


@tensor_cores
def test_split_and_whole_give_the_same_bits(gpu, form):
    # Many sequences are enough work without splitting; each alone is not.
    multiprocessors, tokens = gpu.status().devices[0].multiprocessors, 1 if form.architecture == "sm_80" else 10
    sequences = [(tokens, 200 + i) for i in range(40)]
    case = make(sequences, (8, 1), form.head_dim, form.mode, block_size=64)
    many = make(sequences * 30, (8, 1), form.head_dim, form.mode) if multiprocessors > 16 else case
    want = run(many)
    assert gpu.last_kernels()["sink_attention"] == kernel(WHOLE, form)
    for b in (0, 17, 39):
        length = many.sequences[b][1]
        got = run(many.tail(b, length - 1, length))
        assert_exact(got, want[tokens * (b + 1) - 1 : tokens * (b + 1)])
        assert gpu.last_kernels()["sink_attention"] == kernel(SPLIT, form)


def test_keys_of_missing_blocks_are_not_seen(gpu, form):
    case = make([(1, 64)], head_dim=form.head_dim, kv_dtype=form.mode, block_size=16)
    table = case.kwargs["block_table"].copy()
    table[0, 1], table[0, 2] = -1, 10**6
    seen = make([(1, 32)], head_dim=form.head_dim, kv_dtype=form.mode, block_size=16)
    keep = np.r_[0:16, 48:64]
    seen = replace(
        seen,
        q=case.q,
        keys=[replace(case.keys[0], values=case.keys[0].values[keep])],
        values=[replace(case.values[0], values=case.values[0].values[keep])],
        sinks=case.sinks,
    )
    check_attention(run(case, block_table=table), seen)


def test_a_broken_value_reaches_nobody_who_does_not_see_it(gpu, form):
    case = make([(1, 100), (1, 60)], head_dim=form.head_dim, kv_dtype=form.mode, window=30)
    want = run(case)
    for stored in (case.keys, case.values):
        stored[0].values[60] = np.nan  # before the first sequence's window
    assert_exact(run(case), want)
    case.values[0].values[99] = np.nan
    got = run(case)
    assert np.isnan(got[0]).all()
    assert_exact(got[1:], want[1:])


@pytest.mark.parametrize("window", [None, 33])
def test_padding_before_the_first_key_is_not_felt(gpu, form, window):
    case = make(
        [(3, 3), (20, 20), (5, 90), (1, 1), (0, 4)], head_dim=form.head_dim, kv_dtype=form.mode, window=window
    )
    case.sinks[1] = -np.inf
    q, kwargs, own = padded_left(case, [0, 1, 64, 210, 9])
    want_share, share = poisoned_up(case.q.shape[:2]), poisoned_up(q.shape[:2])
    want = run(case, sink_share=want_share)
    arrays = {name: up(kwargs.pop(name)) for name in ("k_cache", "v_cache", "sinks")}
    out = poisoned_up(q.shape)
    ops.sink_attention(up(q), **arrays, **kwargs, sink_share=share, out=out)
    got, share = down(out), down(share)
    assert_exact(got[own], want)
    assert_exact(share[own], down(want_share))
    assert_exact(got[~own], np.zeros_like(got[~own]))
    assert_exact(share[~own], np.tile(np.array([1, 0, 1, 1], np.float32), ((~own).sum(), 1)))


def test_ops_dispatches_by_the_arrays(gpu):
    case = make([(2, 40)], head_dim=32, kv_dtype="bfloat16/bf16")
    arrays = {name: up(value) for name, value in case.kwargs.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in case.kwargs.items() if not isinstance(value, np.ndarray)}
    assert_exact(down(ops.sink_attention(up(case.q), **arrays, **rest)), run(case))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sm_scale": np.nan}, "sm_scale is nan"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"max_seq_len": 10**6}, "max_seq_len is 1000000; block_table has room for"),
        ({"cu_seqlens": [0, 1, 2]}, r"cu_seqlens has shape \(3,\)"),
        ({"activations": "fp8"}, "activations is 'fp8'"),
        ({"seq_lens": [2**40]}, "seq_lens holds values beyond int32"),
    ],
)
def test_bad_arguments(gpu, changes, message):
    case = make([(2, 40)], head_dim=32, kv_dtype="bfloat16/bf16")
    kwargs = case.kwargs | changes
    for name in ("k_cache", "v_cache", "sinks"):
        kwargs[name] = up(kwargs[name])
    with pytest.raises(ValueError, match=message):
        cuda.sink_attention(up(case.q), **kwargs)
