"""An int8 cache on a GPU: written with the CPU's bits, attended to as near to float64 as on the CPU, whole models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import mxmoe
from attention_case import check_attention, make, padded_left, torch_attention
from compare import assert_close, assert_exact, assert_model_close
from cuda_helpers import down, poisoned_up, up
from mxmoe import cuda, ops
from mxmoe.checkpoint import Checkpoint
from mxmoe.reference import model as reference_model
from mxmoe.reference import ops as reference
from op_helpers import BF16, FLOATS, normal
from small_models import MODES as MODEL_MODES
from small_models import in_chunks, random_ids, write

# What is rounded; see attention_case.
MODES = ["int8", "int8/bf16"]
SIMT = "sink_attention_simt_sm80_kernel"
RAGGED = [(0, 0), (3, 3), (0, 5), (1, 70), (33, 33), (5, 200), (1, 1), (17, 90)]
ARRAYS = ("k_cache", "v_cache", "k_scales", "v_scales", "sinks")


def run(case, dtype="float32", q=None, **changes: Any):
    kwargs = case.kwargs | changes
    arrays = {name: up(kwargs.pop(name)) for name in ARRAYS}
    q = case.q if q is None else q
    out = poisoned_up(q.shape, FLOATS[dtype])
    cuda.sink_attention(up(q), **arrays, **kwargs, out=out)
    return down(out)


# The write


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (2, 33), (3, 64), (8, 64), (5, 256)])
def test_the_write_has_the_cpus_bits(gpu, x_dtype, heads, head_dim):
    rng = np.random.default_rng(head_dim)
    k, v = (normal(rng, (7, heads, head_dim), x_dtype, 3.0) for _ in range(2))
    k[0, 0], v[1, 0], k[2, 0] = 0.0, 1e-37, 1e-20
    k[3, 0, -1], v[4, 0, 0] = np.nan, -np.inf
    slots = rng.permutation(12)[:7]
    shape = (3, heads, 4, head_dim)
    held = [np.full(shape, -128, np.int8) for _ in range(2)] + [np.full(shape[:3], 7.0, np.float32) for _ in range(2)]
    there = [up(x) for x in held]
    cuda.kv_cache_write(up(k), up(v), *there[:2], slots, k_scales=there[2], v_scales=there[3])
    ops.kv_cache_write(k, v, *held[:2], slots, k_scales=held[2], v_scales=held[3])
    assert gpu.last_kernels()["kv_cache_write"] == "kv_cache_write_int8_sm80_kernel"
    for got, want in zip(there, held, strict=True):
        assert_exact(down(got), want)
    assert sum(np.isnan(scales).sum() for scales in held[2:]) == 2


def test_a_write_out_of_range_writes_nothing(gpu):
    rows = up(np.ones((3, 2, 32), np.float32))
    held = [up(np.full((2, 2, 4, 32), 5, np.int8)) for _ in range(2)] + [
        up(np.ones((2, 2, 4), np.float32)) for _ in "kv"
    ]
    cuda.kv_cache_write(rows, rows, *held[:2], [-1, 8, 2**40], k_scales=held[2], v_scales=held[3])
    assert all((down(x) == (5 if i < 2 else 1)).all() for i, x in enumerate(held))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_scales": None}, "k_scales is missing; an int8 cache wants"),
        ({"v_scales": (2, 2, 3)}, r"v_scales has shape \(2, 2, 3\)"),
    ],
)
def test_scales_belong_to_it(gpu, changes, message):
    rows = up(np.ones((1, 2, 32), np.float32))
    caches = [up(np.zeros((2, 2, 4, 32), np.int8)) for _ in "kv"]
    scales = {name: (2, 2, 4) for name in ("k_scales", "v_scales")} | changes
    scales = {name: shape and up(np.ones(shape, np.float32)) for name, shape in scales.items()}
    with pytest.raises(ValueError, match=message):
        cuda.kv_cache_write(rows, rows, *caches, [0], **scales)
    wide = [up(np.zeros((2, 2, 4, 32), np.float32)) for _ in "kv"]
    with pytest.raises(ValueError, match="k_scales came with a float32 cache"):
        cuda.kv_cache_write(rows, rows, *wide, [0], k_scales=up(np.ones((2, 2, 4), np.float32)))


# Attention


@pytest.mark.parametrize("head_dim", [1, 33, 32, 64, 128, 256])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("q_dtype", FLOATS)
def test_any_head_dim(gpu, head_dim, mode, q_dtype):
    case = make([(3, 70), (1, 9)], head_dim=head_dim, kv_dtype=mode, q_dtype=q_dtype)
    check_attention(run(case), case)
    tensor_cores = mode == "int8/bf16" and head_dim in (32, 64, 128)
    assert (gpu.last_kernels()["sink_attention"] == SIMT) != tensor_cores


@pytest.mark.parametrize("heads", [(3, 3), (64, 8)])
@pytest.mark.parametrize("window", [None, 1, 130])
@pytest.mark.parametrize("mode", MODES)
def test_heads_and_windows(gpu, heads, window, mode):
    case = make([(2, 70), (3, 160)], heads, 32, kv_dtype=mode, window=window)
    check_attention(run(case, "bfloat16"), case, "bfloat16")


@pytest.mark.parametrize("block_size", [1, 16, 65])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [None, 33])
def test_ragged_batches_on_any_pages(gpu, block_size, mode, window):
    case = make(RAGGED, head_dim=32, kv_dtype=mode, window=window, block_size=block_size)
    check_attention(run(case), case)


@pytest.mark.parametrize("length", [1, 31, 33, 127, 129, 520])
def test_any_length(gpu, length):
    case = make([(1, length)] * 2, (4, 1), 32, "int8/bf16")
    check_attention(run(case), case)


@pytest.mark.parametrize("mode", MODES)
def test_sink_share(gpu, mode):
    case = make([(3, 30), (2, 300)], head_dim=32, kv_dtype=mode)
    share, want = poisoned_up(case.q.shape[:2]), np.empty(case.q.shape[:2])
    run(case, sink_share=share)
    reference.sink_attention(case.rounded_q, **case.kwargs, sink_share=want)
    coarsest = "bfloat16" if case.rounds else "float32"
    baseline = torch_attention(case)[1]
    assert_close(down(share), want, baseline=baseline, dtype=coarsest, out_dtype="float32", scale=1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_split_pages_and_company(gpu, mode, window):
    length = 150
    case = make([(length, length), (3, 290)], (4, 2), 32, mode, window=window)
    want = run(case)
    for size in (1, 7, 64):
        for begin in range(length - 2 * size, length, size):
            assert_exact(run(case.tail(0, begin, begin + size)), want[begin : begin + size])
    assert_exact(run(case.tail(1, 287, 290)), want[length:])
    assert_exact(run(replace(case, block_size=64, page_seed=2)), want)


@pytest.mark.parametrize("mode", MODES)
def test_a_broken_scale_reaches_nobody_who_does_not_see_it(gpu, mode):
    case = make([(1, 100), (9, 60)], head_dim=32, kv_dtype=mode, window=30)
    want = run(case)
    for stored in (case.keys, case.values):
        stored[0].scales[60] = np.nan  # before the first sequence's window
    assert_exact(run(case), want)
    # The last token's, in one tile with tokens that do not see it.
    case.values[1].scales[59] = np.nan
    got = run(case)
    assert_exact(got[:-1], want[:-1])
    assert np.isnan(got[-1]).all()


def test_a_query_that_is_not_finite_spoils_its_row_alone(gpu):
    case = make([(5, 60)], head_dim=32, kv_dtype="int8/bf16")
    want = run(case)
    q = case.q.copy()
    q[2, 1, 3], q[4, 0, 0] = np.inf, np.nan
    got = run(case, q=q)
    broken = np.zeros(q.shape[:2], bool)
    broken[2, 1] = broken[4, 0] = True
    assert np.isnan(got[broken]).all()
    assert_exact(got[~broken], want[~broken])


@pytest.mark.parametrize("mode", MODES)
def test_padding_before_the_first_key_is_not_felt(gpu, mode):
    case = make([(3, 3), (20, 20), (5, 90)], head_dim=32, kv_dtype=mode, window=33)
    q, kwargs, own = padded_left(case, [0, 1, 64])
    got = run(replace(case, q=q), **kwargs)
    assert_exact(got[own], run(case))
    assert_exact(got[~own], np.zeros_like(got[~own]))


CHANGES = {
    "sinks": lambda case: {"sinks": case.sinks + 4},
    "window": lambda case: {"sliding_window": 40},
    "keys' scales": lambda case: {"k_scales": np.roll(case.kwargs["k_scales"], 1, axis=2)},
    "values' scales": lambda case: {"v_scales": np.roll(case.kwargs["v_scales"], 1, axis=2)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_must_differ_does(gpu, change):
    case = make([(2, 60)], head_dim=32, kv_dtype="int8/bf16", window=41)
    check_attention(run(case), case)
    with pytest.raises(AssertionError):
        check_attention(run(case, **change(case)), case)


def test_queries_keep_fourteen_bits(gpu):
    """With a wide key and nothing else to see, the sink's share shows what became of the query."""
    case = make([(1, 1)], (4, 1), 32, kv_dtype="int8/bf16")
    case.sinks[:] = 0
    shares = {}
    for name, q in {"exact": case.q, "coarse": case.q.astype(BF16).astype(np.float32)}.items():
        share = poisoned_up(case.q.shape[:2])
        run(case, q=q, sink_share=share)
        shares[name] = np.log(1 / down(share) - 1)  # the score
    want = np.einsum("thd,jd->th", case.rounded_q, case.keys[0].wide[:, 0]) * case.sm_scale
    error = {name: np.abs(score - want).max() for name, score in shares.items()}
    assert error["exact"] < 1e-5 and error["coarse"] > 20 * error["exact"]


def test_attention_wants_the_scales_of_an_int8_cache_alone(gpu):
    case = make([(2, 20)], head_dim=32, kv_dtype="int8")
    held = {name: up(value) for name, value in case.kwargs.items() if name in ARRAYS}
    rest = {name: value for name, value in case.kwargs.items() if name not in ARRAYS}
    with pytest.raises(ValueError, match="v_scales is missing"):
        cuda.sink_attention(up(case.q), **(held | {"v_scales": None}), **rest)
    wide = {name: up(np.zeros(held[name].shape, BF16)) for name in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match="k_scales came with a bfloat16 cache; wanted none"):
        cuda.sink_attention(up(case.q), **(held | wide), **rest)


# Models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "x")


def test_a_model_is_as_near_the_reference_as_on_the_cpu(gpu, folder):
    ids = random_ids(40)
    truth = reference_model.forward(Checkpoint.open(folder), ids)
    options = MODEL_MODES["bf16"] | {"kv": "int8"}
    model, cpu = mxmoe.load(folder, **options, device="cuda"), mxmoe.load(folder, **options)
    got = model.forward(ids)
    assert_model_close(got, truth, cpu.forward(ids))
    assert_exact(in_chunks(model, ids, [13, *[1] * 12]), got)
    bounds = [0, 40, 47]
    together = model.forward(np.concatenate([ids, ids[:7]]), cu_seqlens=bounds)
    assert_exact(together[:40], got)
    assert_exact(together[40:], got[:7])


def test_generation_is_recorded_with_it(gpu, folder):
    model = mxmoe.load(folder, device="cuda", kv="int8")
    ids = random_ids(9)
    steps = [step.token_id for step in model.generate(ids, 8, stop_token_ids=[])]
    logits = model.forward(np.concatenate([ids, steps]))[8:-1]
    assert_exact(np.array(steps), logits.argmax(axis=1))
