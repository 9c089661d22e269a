"""mxfp4_moe on a GPU against float64, torch and itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compare import assert_close, assert_exact
from cuda_helpers import assert_rows_stand_alone_on_gpu, down, poisoned_up, up
from moe_case import exact_case, make, torch_moe
from mxmoe import cuda, ops
from mxmoe.layers import ExpertMatrix, Experts
from mxmoe.reference import ops as reference
from op_helpers import FLOATS

# The kernels that take scales of any size, and those for Hopper that fold them into the weights.
KERNELS = {"float32": "f32_mxfp4_sm80", "bf16": "bf16_mxfp4_{}_sm80", "folded": "bf16_mxfp4_{}_sm90"}
FEW_PAIRS = 512  # for which there are kernels of their own


@pytest.fixture(params=KERNELS)
def activations(request, gpu):
    """What `run` takes: "folded" is "bf16" by way of Hopper's own kernels."""
    if request.param == "folded" and "sm_90a" not in gpu.available_architectures():
        pytest.skip("no Hopper GPU")
    return request.param


def ran(gpu, activations, num_pairs):
    return gpu.last_kernels()["mxfp4_moe"] == (
        f"mxfp4_moe_{KERNELS[activations]}_kernel".format("few" if num_pairs <= FEW_PAIRS else "many")
    )


def options(activations):
    return {"activations": activations.replace("folded", "bf16"), "foldable_scales": activations == "folded"}


def run(case, activations, weights=None, **changes):
    arrays = weights or [up(a) for a in case.args[3:]]
    kwargs = case.kwargs | options(activations) | changes
    kwargs["residual"] = None if kwargs["residual"] is None else up(kwargs["residual"])
    out = poisoned_up(case.x.shape)
    first = [up(a) for a in case.args[:3]]
    assert ops.mxfp4_moe(*first, *arrays, **kwargs, out=out) is out
    return down(out)


def check(got, case, activations):
    activations = activations.replace("folded", "bf16")
    want = case.run(activations, reference.mxfp4_moe)
    dtype = {"float32": "float32", "bf16": "bfloat16"}[activations]
    assert_close(got, want, baseline=torch_moe(case, activations), dtype=dtype, out_dtype="float32")


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(32, 32), (64, 96), (160, 160), (416, 32), (2880, 32), (32, 3104)]
)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_any_size(gpu, hidden_size, intermediate_size, x_dtype, activations):
    case = make(3, hidden_size, intermediate_size, 3, x_dtype=x_dtype)
    check(run(case, activations), case, activations)
    assert ran(gpu, activations, 6)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 9, 16, 17, 40, 128, 129, 256, 257])
def test_any_number_of_tokens(gpu, num_tokens, activations):
    case = make(num_tokens, 64, 32, 5)
    check(run(case, activations), case, activations)
    assert num_tokens == 0 or ran(gpu, activations, 2 * num_tokens)


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(32, 96), (160, 224), (928, 32), (64, 896)])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("activations", ["bf16", "folded"], indirect=True)
def test_many_pairs_of_any_size(gpu, hidden_size, intermediate_size, x_dtype, activations):
    # 32 experts have fewer pairs each, and their tiles are smaller; the first has more than a tile of either size.
    for num_experts in (4, 32):
        case = make(300, hidden_size, intermediate_size, num_experts, 2, x_dtype=x_dtype)
        case.topk_ids[:150, 0], case.topk_ids[:150, 1] = 0, 2
        check(run(case, activations), case, activations)
        assert ran(gpu, activations, 600)


@pytest.mark.parametrize(("num_experts", "experts_per_token"), [(1, 1), (5, 0), (5, 3), (32, 4), (128, 4), (300, 1)])
def test_any_number_of_experts(gpu, num_experts, experts_per_token, activations):
    case = make(5, 32, 32, num_experts, experts_per_token)
    check(run(case, activations), case, activations)


@pytest.mark.parametrize("num_tokens", [1, 9, 20, 130])
@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_to_one_expert(gpu, num_tokens, expert, activations):
    case = make(num_tokens, 32, 32, 5, 1)
    case.topk_ids[:] = expert
    check(run(case, activations), case, activations)


@pytest.mark.parametrize("bias_dtype", FLOATS)
@pytest.mark.parametrize("residual", [False, True])
def test_biases_and_residual(gpu, bias_dtype, residual, activations):
    case = make(bias_dtype=bias_dtype, residual=residual, swiglu_alpha=1.2, swiglu_limit=3.0)
    got = run(case, activations)
    check(got, case, activations)
    if residual:  # in place
        own = up(case.residual)
        weights = [up(a) for a in case.args]
        ops.mxfp4_moe(*weights, **options(activations), **(case.kwargs | {"residual": own}), out=own)
        assert_exact(down(own), got)


@pytest.mark.parametrize("num_tokens", [3, 20, 140])
def test_exact_where_nothing_rounds(gpu, num_tokens, activations):
    case = exact_case(num_tokens)
    case.weights["down_scales"] -= 1  # up to 128
    assert_exact(
        run(case, activations),
        case.run(options(activations)["activations"], reference.mxfp4_moe).astype(np.float32),
    )


def one_hot(scales):
    """A case of an expert and a token for each pair of scales: gate picks +-1 of x by every code under both.

    The result shows them in float32, subnormal or huge.
    """
    num_experts = len(scales)
    case = make(num_experts, 32, 32, num_experts, 1, bias_dtype="float32", swiglu_alpha=0.0, swiglu_limit=3e38)
    case.topk_ids[:, 0] = np.arange(num_experts)
    case.topk_weights[:] = 1
    case.x[:] = 0
    case.x[:, 3] = 1
    codes = np.zeros((num_experts, 64, 32), np.uint8)
    codes[:, 0::2, 3] = np.arange(32) % 16
    case.weights["gate_up_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(num_experts, 64, 1, 16)
    case.weights["gate_up_scales"] = np.repeat(np.array(scales, np.uint8), 32, 1)[..., None]
    case.weights["gate_up_bias"] = np.tile(np.float32([0, 1]), (num_experts, 32))
    identity = np.broadcast_to(np.eye(32, dtype=np.uint8) * 2, (num_experts, 32, 32))  # the code of 1
    case.weights["down_blocks"] = (identity[..., 0::2] | identity[..., 1::2] << 4).reshape(num_experts, 32, 1, 16)
    case.weights["down_scales"] = np.full((num_experts, 32, 1), 127, np.uint8)
    case.weights["down_bias"][:] = 0
    return case


def check_one_hot(case, activations):
    want = case.run(options(activations)["activations"], reference.mxfp4_moe).astype(np.float32)
    assert np.unique(want).size > len(case.x)
    assert_exact(np.abs(run(case, activations)), np.abs(want))


@pytest.mark.parametrize("scale", [0, 1, 127, 252])
@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_every_code_under_extreme_scales(gpu, scale, name):
    check_one_hot(one_hot([(scale, scale)]), name)


def test_every_code_under_every_scale_that_may_be_folded(gpu, activations):
    scales = np.append(np.arange(2, 129), 2).reshape(-1, 2)
    assert cuda.scales_are_foldable(scales)
    check_one_hot(one_hot(scales), activations)


@pytest.mark.parametrize("scale", [0, 1, 129, 254])
def test_other_scales_may_not_be_folded(gpu, scale):
    scales = np.full((2, 3), 100, np.uint8)
    assert cuda.scales_are_foldable(scales, up(scales))
    scales[1, 1] = scale
    assert not cuda.scales_are_foldable(scales) and not cuda.scales_are_foldable(up(scales))
    if scale == 129 and "sm_90a" in gpu.available_architectures():  # and would be wrong
        with pytest.raises(AssertionError):
            check_one_hot(one_hot([(scale, scale)]), "folded")


def test_a_layer_knows_what_its_scales_allow(gpu):
    if "sm_90a" not in gpu.available_architectures():
        pytest.skip("no Hopper GPU")
    case = make()
    arrays = {name: up(array) for name, array in case.weights.items()}
    matrices = {
        name: ExpertMatrix(arrays.pop(f"{name}_blocks"), arrays.pop(f"{name}_scales"), packed=False)
        for name in ("gate_up", "down")
    }
    experts = Experts(
        cuda, **matrices, **arrays, activations="bf16", swiglu_alpha=1.702, swiglu_limit=7.0, foldable_scales=True
    )
    inputs = [up(a) for a in (*case.args[:3], np.zeros(case.x.shape, np.float32))]
    want = down(experts(*inputs))
    assert ran(gpu, "folded", 12)
    check(want, case, "folded")
    scales = case.weights["down_scales"].copy()
    scales[1, 2, 1] = 129
    experts.down_scales = up(scales)
    experts(*inputs)
    assert ran(gpu, "bf16", 12)
    experts.down_scales = up(case.weights["down_scales"])
    assert_exact(down(experts(*inputs)), want)
    assert ran(gpu, "folded", 12)


def test_another_architecture_can_be_forced(gpu):
    case = make()
    with cuda.architecture("sm_80"):
        check(run(case, "folded"), case, "bf16")
        assert ran(gpu, "bf16", 12)


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


def test_rows_stand_alone(gpu, activations):
    # Kernels and tiles go by the number of tokens.
    num_tokens = 140 if activations == "float32" else 270
    case = make(num_tokens, 416, 32, 4, 2, residual=True)
    weights = [up(a) for a in case.args[3:]]
    assert_rows_stand_alone_on_gpu(lambda rows: run(case.rows(rows), activations, weights), num_tokens, (1, 17, 129))


@pytest.mark.parametrize("hidden_size", [928, 3136])
@pytest.mark.parametrize("name", ["bf16", "folded"])
def test_slices_of_k_are_added_in_one_order(gpu, name, hidden_size):
    # More than a slice of K, and than shared memory holds at once.
    case = make(140, hidden_size, 32, 2, 1)
    case = replace(case, topk_ids=np.repeat(case.topk_ids, 4, 1), topk_weights=np.repeat(case.topk_weights, 4, 1))
    weights = [up(a) for a in case.args[3:]]
    many = run(case, name, weights)
    for rows in (slice(0, 1), slice(3, 12), slice(20, 50)):
        assert_exact(run(case.rows(rows), name, weights), many[rows])


def test_rows_may_be_apart(gpu, activations):
    case = make(6, 64, 32, 5, residual=True)
    want = run(case, activations)
    out = up(np.full(case.x.shape, np.nan, np.float32), 3)
    arrays = [up(case.x, 5), *(up(a) for a in case.args[1:])]
    ops.mxfp4_moe(*arrays, **options(activations), residual=up(case.residual, 1), out=out)
    assert_exact(down(out), want)


def test_a_broken_row_stays_alone(gpu, activations):
    case = make(12, 64, 32, 3, 2)
    want = run(case, activations)
    case.x[4, 7] = np.nan
    got = run(case, activations)
    assert np.isnan(got[4]).all()
    assert_exact(np.delete(got, 4, 0), np.delete(want, 4, 0))


@pytest.mark.parametrize(("num_tokens", "launches"), [(3, 2), (128, 2), (129, 5)])
@pytest.mark.parametrize("name", ["bf16", "folded"])
def test_few_tokens_take_two_launches(gpu, name, num_tokens, launches):
    case = make(num_tokens, 64, 32, 8, 4, residual=True)
    want = run(case, name)  # and takes what memory it wants
    arrays, residual, out = [up(a) for a in case.args], up(case.residual), poisoned_up(case.x.shape)
    with cuda.graph() as graph:
        ops.mxfp4_moe(*arrays, **options(name), residual=residual, out=out)
    assert graph.num_nodes == launches
    for _ in range(2):
        graph.replay()
        assert_exact(down(out), want)


def test_more_tokens_than_scratch_holds_at_once(gpu):
    case = make(4110, 32, 32, 3, 1)
    rows = [0, 4095, 4096, 4109]
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
    for activations in ("bf16", "folded"):
        bad = run(case.with_weights(**wrong(case.weights)), activations)
        with pytest.raises(AssertionError):
            check(bad, case, activations)


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
