"""mxfp4_moe against float64, torch and itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compare import FLOOR, SLACK, assert_close, assert_exact, relative_error
from moe_case import exact_case, make, torch_moe
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import (
    FLOATS,
    TOKEN_COUNTS,
    assert_rows_stand_alone,
    decode_mxfp4,
    guarded,
    strided,
    strided_output,
)

ACTIVATIONS = ["float32", "bf16", "int8"]
all_activations = pytest.mark.parametrize("activations", ACTIVATIONS)


def run(case, activations, **kwargs):
    return guarded(ops.mxfp4_moe, *case.args, activations=activations, **case.kwargs, shape=case.x.shape, **kwargs)


def check(got, case, activations):
    """Against the reference, with as much error as torch makes by the same roundings."""
    dtype = {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}[activations]
    want = case.run(activations, reference.mxfp4_moe)
    assert_close(got, want, baseline=torch_moe(case, activations), dtype=dtype, out_dtype="float32")


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(32, 32), (32, 96), (64, 32), (96, 64), (160, 224), (2880, 32), (32, 2880)]
)
@pytest.mark.parametrize("x_dtype", FLOATS)
@all_activations
def test_any_size(isa, hidden_size, intermediate_size, x_dtype, activations):
    case = make(6, hidden_size, intermediate_size, 3, x_dtype=x_dtype)
    check(run(case, activations, misalign=1), case, activations)


@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@all_activations
def test_any_number_of_tokens(isa, num_tokens, activations):
    case = make(num_tokens, 64, 32, 5)
    check(run(case, activations), case, activations)


@pytest.mark.parametrize(("num_experts", "experts_per_token"), [(1, 1), (5, 0), (5, 2), (5, 3), (32, 4), (128, 4)])
@all_activations
def test_any_number_of_experts(isa, num_experts, experts_per_token, activations):
    case = make(12, 32, 32, num_experts, experts_per_token)
    check(run(case, activations), case, activations)


@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS[1:])
@pytest.mark.parametrize("expert", [0, 3, 4])
def test_all_tokens_to_one_expert(isa, num_tokens, expert):
    case = make(num_tokens, 32, 32, 5, 1)
    case.topk_ids[:] = expert
    for activations in ACTIVATIONS:
        check(run(case, activations), case, activations)


@pytest.mark.parametrize("bias_dtype", FLOATS)
@pytest.mark.parametrize("residual", [False, True])
@all_activations
def test_biases_and_residual(isa, bias_dtype, residual, activations):
    case = make(bias_dtype=bias_dtype, residual=residual)
    check(run(case, activations), case, activations)


@pytest.mark.parametrize(
    ("alpha", "limit", "size"),
    [
        *[(1.702, 7.0, size) for size in (1e-3, 1.0, 1e3)],
        *[(1.0, 0.25, size) for size in (1e-3, 1.0, 1e3)],
        *[(0.0, np.inf, size) for size in (1e-3, 1.0, 1e3)],
        (30.0, 1e30, 1.0),
        (-1.0, 2.0, 1.0),  # unbounded below: with larger inputs the formula itself is ill-conditioned
    ],
)
def test_swiglu_of_any_constants(isa, alpha, limit, size):
    case = make(32, swiglu_alpha=alpha, swiglu_limit=limit)
    case.x *= np.float32(size)
    check(run(case, "float32"), case, "float32")


@all_activations
def test_the_same_expert_twice_counts_twice(isa, activations):
    case = make(5, experts_per_token=3)
    case.topk_ids[:, 1] = case.topk_ids[:, 0]
    check(run(case, activations), case, activations)


@all_activations
def test_in_place_and_row_strides(isa, activations):
    case = make(7, residual=True)
    want = case.run(activations)
    apart = replace(case, x=strided(case.x), residual=strided(case.residual, 5))
    assert_exact(apart.run(activations), want)
    out, beside = strided_output(case.x.shape, np.float32, 9)
    out[...] = case.residual
    assert replace(apart, residual=out).run(activations, out=out) is out
    assert_exact(out, want)
    beside()


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 30])
@all_activations
def test_whole_numbers_come_out_exact(isa, num_tokens, activations):
    case = exact_case(num_tokens)
    want = case.run(activations, reference.mxfp4_moe)
    assert_exact(want.astype(np.float32).astype(np.float64), want)
    assert_exact(run(case, activations), want.astype(np.float32))


@all_activations
def test_holders_of_parts_of_the_experts_add_up(isa, activations):
    case = exact_case(num_experts=5, residual=False)
    whole, total = run(case, activations), 0
    for first, last in ((0, 1), (1, 4), (4, 5)):
        part = case.with_weights(**{name: w[first:last] for name, w in case.weights.items()})
        part = replace(part, options=case.options | {"first_expert": first})
        total = total + run(part, activations)
    assert_exact(total, whole)


@all_activations
def test_a_holder_of_none_gives_the_residual(isa, activations):
    case = make(6, residual=True, first_expert=5)
    assert_exact(run(case, activations), case.residual)
    case = replace(case, residual=None, options={"first_expert": 2**62})
    assert_exact(run(case, activations), np.zeros_like(case.x))


@all_activations
def test_decodes_every_code_at_every_scale(isa, activations):
    # Expert e turns every token into 127 at place e, by its biases alone, so that y is 127 times a column of its
    # second matrix. All 32 experts have the same one: in row h each code twice, in both nibbles, at scale byte h.
    case = make(32, 256, 32, 32, 1, bias_dtype="float32", swiglu_alpha=0.0, swiglu_limit=1e6)
    rng = np.random.default_rng(0)
    rows = [np.concatenate([rng.permutation(16)[:, None], rng.permutation(16)[:, None]], axis=1) for _ in range(256)]
    codes = np.stack(rows).astype(np.uint8)  # (256, 16 bytes, 2 nibbles)
    blocks = (codes[..., 0] | codes[..., 1] << 4)[:, None]
    scales = np.minimum(np.arange(256), 244).astype(np.uint8)[:, None]  # 127 * 6 * 2^117 is within float32
    one = np.zeros((32, 32, 2), np.float32)
    one[np.arange(32), np.arange(32), 0] = 2 * 127
    case = case.with_weights(
        gate_up_blocks=np.zeros_like(case.weights["gate_up_blocks"]),
        gate_up_bias=one.reshape(32, 64),
        down_blocks=np.tile(blocks, (32, 1, 1, 1)),
        down_scales=np.tile(scales, (32, 1, 1)),
        down_bias=np.zeros((32, 256), np.float32),
    )
    case.topk_ids = np.arange(32, dtype=np.int32)[:, None]
    case.topk_weights[:] = 1
    want = 127 * decode_mxfp4(blocks, scales).T
    assert_exact(run(case, activations) + 0.0, want + 0.0)  # sums have no -0


@all_activations
def test_rows_stand_alone(isa, activations):
    case = make(70, 96, 64, 4, 2, residual=True)
    case.topk_ids[10:40] = [3, 1]
    assert_rows_stand_alone(lambda rows: case.rows(rows).run(activations), 70, sizes=(1, 2, 3, 7, 8, 9, 16, 17, 65))


@all_activations
def test_rows_of_any_magnitude_stand_alone(isa, activations):
    # Products of scales from far below the normal numbers to far above one: alone, a row may be computed by another
    # path than in company.
    rng = np.random.default_rng(0)
    case = make(70, 96, 64, 4, 2, bias_dtype="float32")
    case.x *= 10.0 ** rng.uniform(-44, 8, (70, 3)).repeat(32, axis=1).astype(np.float32)
    case.x[::9, 32:64] = 0
    for name in ("gate_up_scales", "down_scales"):
        case.weights[name][:] = rng.integers(0, 150, case.weights[name].shape)
    case.weights["down_bias"][:] = 0
    assert np.isfinite(run(case, activations)).all()
    assert_rows_stand_alone(lambda rows: case.rows(rows).run(activations), 70, sizes=(1, 6, 7, 33))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@all_activations
def test_a_broken_row_stays_alone(isa, broken, activations):
    case = make(12, num_experts=3)
    want = case.run(activations)
    case.x[5, 40] = broken
    got = case.run(activations)
    if np.isnan(broken):
        assert np.isnan(got[5]).all()
    assert_exact(np.delete(got, 5, 0), np.delete(want, 5, 0))


@all_activations
def test_nan_passes_the_clamps(isa, activations):
    for half in (0, 1):
        case = make(3, num_experts=1, experts_per_token=1)
        case.weights["gate_up_bias"][0, half] = np.nan
        assert np.isnan(case.run(activations)).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_rounding_costs_no_more_than_in_torch(isa, activations, seed):
    case = make(64, 256, 256, 4, 2, seed=seed)
    got, by_torch = case.run(activations), torch_moe(case, activations)
    # Against the formula: what the roundings cost.
    want = case.run("float32", reference.mxfp4_moe)
    cost, torch_cost = np.median(relative_error(got, want)), np.median(relative_error(by_torch, want))
    assert torch_cost / SLACK <= cost <= SLACK * torch_cost
    # Against the same roundings in float64: float32 noise, but for an activation here and there that stood on the
    # edge between two values. Most rows have none, so the median is as strict as float32.
    rounded = torch_moe(case, activations, torch.float64).numpy()
    noise, torch_noise = relative_error(got, rounded), relative_error(by_torch, rounded)
    assert np.median(noise) <= SLACK * np.median(torch_noise) + FLOOR * 2.0**-24


def swap_nibbles(case, name):
    blocks = case.weights[name]
    return case.with_weights(**{name: blocks >> 4 | blocks << 4})


def swap_gate_and_up(case):
    swapped = {}
    for part in ("blocks", "scales", "bias"):
        w = case.weights[f"gate_up_{part}"]
        swapped[f"gate_up_{part}"] = w.reshape(w.shape[0], -1, 2, *w.shape[2:])[:, :, ::-1].reshape(w.shape)
    return case.with_weights(**swapped)


def halves_for_pairs(case):
    names = [name for name in case.weights if name.startswith("gate_up")]
    half = case.weights["gate_up_bias"].shape[1] // 2
    order = np.arange(2 * half).reshape(2, half).T.reshape(-1)
    return case.with_weights(**{name: case.weights[name][:, order] for name in names})


def without(case, name):
    return case.with_weights(**{name: np.zeros_like(case.weights[name])})


def one_scale_up(case, name, at):
    scales = case.weights[name].copy()
    scales[at] += 1
    return case.with_weights(**{name: scales})


WRONG = {
    "gate_up nibbles swapped": lambda c: swap_nibbles(c, "gate_up_blocks"),
    "down nibbles swapped": lambda c: swap_nibbles(c, "down_blocks"),
    "gate and up swapped": swap_gate_and_up,
    "gate and up in halves": halves_for_pairs,
    "gate_up bias missing": lambda c: without(c, "gate_up_bias"),
    "down bias missing": lambda c: without(c, "down_bias"),
    "bias of the next expert": lambda c: c.with_weights(down_bias=np.roll(c.weights["down_bias"], 1, 0)),
    "wrong expert": lambda c: replace(c, topk_ids=(c.topk_ids + 1) % 5),
    "wrong expert for one token": lambda c: replace(c, topk_ids=np.where([[0]] * 5 + [[1]], 0, c.topk_ids)),
    "weights of the choices exchanged": lambda c: replace(c, topk_weights=c.topk_weights[:, ::-1]),
    "second choice dropped": lambda c: replace(c, topk_ids=c.topk_ids[:, :1], topk_weights=c.topk_weights[:, :1]),
    "all gate_up scales off by one": lambda c: c.with_weights(gate_up_scales=c.weights["gate_up_scales"] + 1),
    "one gate_up scale off by one": lambda c: one_scale_up(c, "gate_up_scales", (slice(None), 3, 0)),
    "one down scale off by one": lambda c: one_scale_up(c, "down_scales", (slice(None), 3, 0)),
    "scales of the next block": lambda c: c.with_weights(gate_up_scales=c.weights["gate_up_scales"][..., ::-1]),
    "residual forgotten": lambda c: replace(c, residual=None),
    "clamp forgotten": lambda c: replace(c, options={"swiglu_limit": 1e9}),
    "alpha of 1": lambda c: replace(c, options={"swiglu_alpha": 1.0}),
    "experts of the next holder": lambda c: replace(c, options={"first_expert": 1}),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_experts_are_rejected(wrong):
    case = make(6, 64, 64, 5, 2, residual=True)
    bad = wrong(case).run("float32", reference.mxfp4_moe).astype(np.float32)
    assert np.isfinite(bad).all()
    for activations in ACTIVATIONS:
        with pytest.raises(AssertionError):
            check(bad, case, activations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "x", np.zeros((6, 48), np.float32)), "x has hidden_size 48; wanted a multiple of 32"),
        (lambda c: setattr(c, "x", np.zeros((6, 0), np.float32)), "x has hidden_size 0"),
        (lambda c: setattr(c, "x", np.zeros((6, 96), np.float32)), r"gate_up_blocks has shape"),
        (lambda c: c.topk_ids.__setitem__((2, 1), -1), "topk_ids holds -1; wanted 0 or more"),
        (lambda c: c.topk_ids.__setitem__((2, 1), -(2**31)), "topk_ids holds -2147483648"),
        (lambda c: c.options.update(swiglu_alpha=np.nan), "swiglu_alpha is nan"),
        (lambda c: c.options.update(swiglu_limit=0.0), "swiglu_limit is 0; wanted a number above 0"),
        (lambda c: c.options.update(swiglu_limit=np.nan), "swiglu_limit is nan"),
        (lambda c: c.options.update(first_expert=-1), "first_expert is -1; wanted 0 or more"),
        (lambda c: c.weights.update({k: w[:0] for k, w in c.weights.items()}), "gate_up_blocks holds no experts"),
        (
            lambda c: c.weights.update({k: w[:, :-2] for k, w in c.weights.items() if k.startswith("gate_up")}),
            "gate_up_blocks has 190 rows; wanted",
        ),
        (lambda c: c.weights.update(down_bias=c.weights["down_bias"][:, :-1]), r"down_bias has shape \(5, 63\)"),
        (lambda c: c.weights.update(gate_up_scales=c.weights["gate_up_scales"][:4]), "gate_up_scales has shape"),
        (lambda c: c.weights.update(down_blocks=c.weights["down_blocks"][..., :8]), "down_blocks has"),
        (lambda c: setattr(c, "residual", np.zeros((6, 32), np.float32)), "residual has shape"),
        (lambda c: setattr(c, "topk_ids", c.topk_ids[:5]), "topk_ids has shape"),
        (lambda c: setattr(c, "topk_weights", c.topk_weights[:, :1]), "topk_weights has shape"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    case = make(6, 64, 96, 5, 2)
    change(case)
    for name, array in case.weights.items():  # slices of the axes behind the first are not contiguous
        case.weights[name] = np.ascontiguousarray(array)
    with pytest.raises(ValueError, match=message):
        case.run("float32")


def test_unknown_activations():
    with pytest.raises(ValueError, match="activations is 'fp8'; wanted 'float32', 'bf16' or 'int8'"):
        make().run("fp8")
