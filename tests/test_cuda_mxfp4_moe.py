"""mxfp4_moe on a GPU against float64, torch and itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from moe_case import exact_case, make, torch_moe
from mxmoe import cuda, ops
from mxmoe.reference import ops as reference
from op_helpers import FLOATS

ACTIVATIONS = ["float32", "bf16"]
all_activations = pytest.mark.parametrize("activations", ACTIVATIONS)


def run(case, activations, weights=None, **changes):
    arrays = weights or [up(a) for a in case.args[3:]]
    kwargs = case.kwargs | changes
    kwargs["residual"] = None if kwargs["residual"] is None else up(kwargs["residual"])
    out = poisoned_up(case.x.shape)
    first = [up(a) for a in case.args[:3]]
    assert ops.mxfp4_moe(*first, *arrays, activations=activations, **kwargs, out=out) is out
    return down(out)


def check(got, case, activations):
    want = case.run(activations, reference.mxfp4_moe)
    dtype = {"float32": "float32", "bf16": "bfloat16"}[activations]
    assert_close(got, want, baseline=torch_moe(case, activations), dtype=dtype, out_dtype="float32")


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(32, 32), (64, 96), (160, 160), (416, 32), (2880, 32), (32, 3104)]
)
@pytest.mark.parametrize("x_dtype", FLOATS)
@all_activations
def test_any_size(gpu, hidden_size, intermediate_size, x_dtype, activations):
    case = make(3, hidden_size, intermediate_size, 3, x_dtype=x_dtype)
    check(run(case, activations), case, activations)
    assert gpu.last_kernels()["mxfp4_moe"].startswith(f"mxfp4_moe_{'f32' if activations == 'float32' else 'bf16'}_")


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 9, 16, 17, 40, 128, 129, 150])
@all_activations
def test_any_number_of_tokens(gpu, num_tokens, activations):
    case = make(num_tokens, 64, 32, 5)
    check(run(case, activations), case, activations)


@pytest.mark.parametrize(("num_experts", "experts_per_token"), [(1, 1), (5, 0), (5, 3), (32, 4), (128, 4), (300, 1)])
@all_activations
def test_any_number_of_experts(gpu, num_experts, experts_per_token, activations):
    case = make(5, 32, 32, num_experts, experts_per_token)
    check(run(case, activations), case, activations)


@pytest.mark.parametrize("num_tokens", [1, 9, 20, 130])
@pytest.mark.parametrize("expert", [0, 4])
@all_activations
def test_all_tokens_to_one_expert(gpu, num_tokens, expert, activations):
    case = make(num_tokens, 32, 32, 5, 1)
    case.topk_ids[:] = expert
    check(run(case, activations), case, activations)


@pytest.mark.parametrize("bias_dtype", FLOATS)
@pytest.mark.parametrize("residual", [False, True])
@all_activations
def test_biases_and_residual(gpu, bias_dtype, residual, activations):
    case = make(bias_dtype=bias_dtype, residual=residual, swiglu_alpha=1.2, swiglu_limit=3.0)
    got = run(case, activations)
    check(got, case, activations)
    if residual:  # in place
        own = up(case.residual)
        weights = [up(a) for a in case.args]
        ops.mxfp4_moe(*weights, activations=activations, **(case.kwargs | {"residual": own}), out=own)
        assert_exact(down(own), got)


@pytest.mark.parametrize("num_tokens", [3, 20, 140])
@all_activations
def test_exact_where_nothing_rounds(gpu, num_tokens, activations):
    case = exact_case(num_tokens)
    assert_exact(run(case, activations), case.run(activations, reference.mxfp4_moe).astype(np.float32))


@pytest.mark.parametrize("scale", [0, 1, 127, 253, 254])
@all_activations
def test_every_code_under_extreme_scales(gpu, scale, activations):
    # One block each way: gate picks +-1 of x by its code, and the result shows it in float32, subnormal or huge.
    case = make(1, 32, 32, 1, 1, bias_dtype="float32", swiglu_alpha=0.0, swiglu_limit=3e38)
    case.x[:] = 0
    case.x[0, 3] = 1
    codes = np.zeros((1, 64, 32), np.uint8)
    codes[0, 0::2, 3] = np.arange(32) % 16
    case.weights["gate_up_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(1, 64, 1, 16)
    case.weights["gate_up_scales"] = np.full((1, 64, 1), min(scale, 252), np.uint8)
    case.weights["gate_up_bias"] = np.tile(np.float32([0, 1]), 32)[None]
    identity = np.eye(32, dtype=np.uint8) * 2  # the code of 1
    case.weights["down_blocks"] = (identity[:, 0::2] | identity[:, 1::2] << 4).reshape(1, 32, 1, 16)
    case.weights["down_scales"] = np.full((1, 32, 1), 127, np.uint8)
    case.weights["down_bias"][:] = 0
    case.topk_weights[:] = 1
    assert_exact(
        np.abs(run(case, activations)), np.abs(case.run(activations, reference.mxfp4_moe).astype(np.float32))
    )


@all_activations
def test_experts_held_elsewhere_contribute_nothing(gpu, activations):
    case = make(20, 64, 32, 8, 3, first_expert=0)
    whole = run(case, activations)
    halves = []
    for first in (0, 4):
        part = replace(
            case,
            weights={name: array[first : first + 4] for name, array in case.weights.items()},
            options={"first_expert": first},
        )
        halves.append(run(part, activations))
        check(halves[-1], part, activations)
    assert np.abs(halves[0] + halves[1] - whole).max() <= 1e-5 * np.abs(whole).max()
    case.topk_ids[3] = [-1, 2**31 - 1, -(2**31)]
    got = run(case, activations)
    assert_exact(got[3], np.zeros(64, np.float32))
    assert_exact(np.delete(got, 3, 0), np.delete(whole, 3, 0))


@all_activations
def test_rows_stand_alone(gpu, activations):
    # Up to 16, 128 and more tokens take tiles of different sizes.
    case = make(140, 416, 32, 4, 2, residual=True)
    weights = [up(a) for a in case.args[3:]]
    assert_rows_stand_alone_on_gpu(lambda rows: run(case.rows(rows), activations, weights), 140, (1, 17, 129))


@all_activations
def test_rows_may_be_apart(gpu, activations):
    case = make(6, 64, 32, 5, residual=True)
    want = run(case, activations)
    out = up(np.full(case.x.shape, np.nan, np.float32), 3)
    arrays = [up(case.x, 5), *(up(a) for a in case.args[1:])]
    ops.mxfp4_moe(*arrays, activations=activations, residual=up(case.residual, 1), out=out)
    assert_exact(down(out), want)


@all_activations
def test_a_broken_row_stays_alone(gpu, activations):
    case = make(12, 64, 32, 3, 2)
    want = run(case, activations)
    case.x[4, 7] = np.nan
    got = run(case, activations)
    assert np.isnan(got[4]).all()
    assert_exact(np.delete(got, 4, 0), np.delete(want, 4, 0))


def test_more_tokens_than_scratch_holds_at_once(gpu):
    case = make(2100, 32, 32, 3, 1)
    rows = [0, 2047, 2048, 2099]
    got = run(case, "bf16")
    check(got, case, "bf16")
    assert_exact(got[rows], run(case.rows(rows), "bf16"))


WRONG = {
    "nibbles swapped": lambda w: {"gate_up_blocks": w["gate_up_blocks"] >> 4 | w["gate_up_blocks"] << 4},
    "scale off by one": lambda w: {"down_scales": w["down_scales"] + 1},
    "gate and up exchanged": lambda w: {
        "gate_up_blocks": w["gate_up_blocks"].reshape(5, -1, 2, 2, 16)[:, :, ::-1].reshape(5, -1, 2, 16)
    },
    "bias missing": lambda w: {"down_bias": w["down_bias"] * 0},
    "the next expert": lambda w: {name: np.roll(array, 1, 0) for name, array in w.items()},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_results_are_rejected(gpu, wrong):
    case = make()
    bad = run(case.with_weights(**wrong(case.weights)), "bf16")
    with pytest.raises(AssertionError):
        check(bad, case, "bf16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": "int8"}, "activations is 'int8'; wanted 'float32' or 'bf16' on a GPU"),
        ({"swiglu_limit": 0.0}, "swiglu_limit is 0; wanted a number above 0"),
        ({"first_expert": -1}, "first_expert is -1; wanted 0 or more"),
    ],
)
def test_bad_options(gpu, changes, message):
    case = make()
    with pytest.raises(ValueError, match=message):
        cuda.mxfp4_moe(*(up(a) for a in case.args), **changes)


def test_bad_arrays(gpu):
    case = make()
    arrays = dict(zip(("x", "topk_ids", "topk_weights"), case.args, strict=False)) | case.weights
    for name, bad, message in (
        ("down_scales", case.weights["down_scales"][:, :-1], "down_scales has shape"),
        ("topk_weights", case.topk_weights[:-1], "topk_weights has shape"),
        ("topk_ids", case.topk_ids.astype(np.int64), "topk_ids has dtype int64; wanted int32"),
        ("gate_up_blocks", np.zeros((5, 12, 2, 256), np.uint8), "packed|has shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cuda.mxfp4_moe(**{key: up(np.ascontiguousarray(a)) for key, a in (arrays | {name: bad}).items()})
