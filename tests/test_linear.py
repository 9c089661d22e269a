"""linear against float64, torch and itself, for every pair of formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import SLACK, assert_close, assert_exact, relative_error
from mxmoe import _core, ops, packing
from mxmoe.reference import ops as reference
from op_helpers import (
    BF16,
    BLOCK,
    FLOATS,
    TOKEN_COUNTS,
    assert_rows_stand_alone,
    bf16_as_integers,
    guarded,
    normal,
    round_activations,
    strided,
    strided_output,
    to_torch,
    wide,
)

FORMATS = [(weight, a) for weight in ("bfloat16", "int8") for a in ("float32", "bf16", "int8")]
all_formats = pytest.mark.parametrize(("weight_dtype", "activations"), FORMATS)
SIZES = [1, 31, 32, 33, 63, 64, 96, 100, 2880]


class Case:
    """Inputs of one call, and what it should give."""

    def __init__(self, num_tokens, in_features, out_features, weight_dtype, x_dtype="float32", bias=None, seed=0):
        rng = np.random.default_rng(seed)
        self.x = normal(rng, (num_tokens, in_features), x_dtype)
        self.scales = None
        if weight_dtype == "int8":
            self.weight = rng.integers(-128, 128, (out_features, in_features), dtype=np.int8)
            self.scales = normal(rng, (out_features, in_features // BLOCK), "bfloat16", 0.01)
        else:
            self.weight = normal(rng, (out_features, in_features), "bfloat16")
        self.bias = None if bias is None else normal(rng, (out_features,), bias)

    @property
    def args(self):
        return self.x, self.weight, self.bias

    def dense(self):
        """Weights in float64."""
        w = wide(self.weight)
        return w if self.scales is None else w * np.repeat(wide(self.scales), BLOCK, axis=1)

    def rounded_x(self, activations):
        # There is no integer dot with bfloat16 weights: int8 rounds to bfloat16 there.
        weights = "bfloat16" if self.scales is None else "int8"
        return round_activations(
            self.x, "bf16" if activations == "int8" and weights == "bfloat16" else activations, weights
        )

    def run(self, activations, rows=slice(None), residual=None, **kwargs):
        x = self.x[rows]
        return ops.linear(
            x, self.weight, self.bias, scales=self.scales, activations=activations, residual=residual, **kwargs
        )

    def check(self, got, activations, residual=None):
        """Rounded inputs given, only float32 summation is left to differ."""
        x = self.rounded_x(activations)
        want = reference.linear(x, self.weight, self.bias, scales=self.scales, residual=residual)
        # The size of the sum's terms: a sum that happens to cancel is not expected to be more exact.
        scale = np.sqrt(x**2 @ self.dense().T ** 2) + 1e-30
        assert_close(got, want, baseline=self.torch(x, residual), scale=scale)

    def torch(self, x, residual=None):
        y = torch.nn.functional.linear(torch.from_numpy(x).float(), torch.from_numpy(self.dense()).float())
        for term in (self.bias, residual):
            if term is not None:
                y = y + to_torch(term).float()
        return y


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(
    ("in_features", "weight_dtype", "activations"),
    [(k, w, a) for k in SIZES for w, a in FORMATS if w != "int8" or k % BLOCK == 0],
)
def test_any_in_features(isa, in_features, x_dtype, weight_dtype, activations):
    case = Case(6, in_features, 9, weight_dtype, x_dtype, bias="float32")
    got = guarded(ops.linear, *case.args, scales=case.scales, activations=activations, shape=(6, 9), misalign=1)
    case.check(got, activations)


@pytest.mark.parametrize("num_tokens", TOKEN_COUNTS)
@all_formats
def test_any_number_of_tokens(isa, num_tokens, weight_dtype, activations):
    case = Case(num_tokens, 96, 7, weight_dtype, bias="bfloat16")
    residual = normal(np.random.default_rng(1), (num_tokens, 7))
    options = {"scales": case.scales, "activations": activations, "residual": residual}
    case.check(guarded(ops.linear, *case.args, **options, shape=(num_tokens, 7)), activations, residual)


@pytest.mark.parametrize("out_features", [0, 1, 2, 3, 4, 5, 8, 63, 64, 65, 130])
@all_formats
def test_any_out_features(isa, out_features, weight_dtype, activations):
    case = Case(5, 64, out_features, weight_dtype, bias="float32")
    got = guarded(ops.linear, *case.args, scales=case.scales, activations=activations, shape=(5, out_features))
    case.check(got, activations)


@pytest.mark.parametrize("bias", [None, *FLOATS])
@pytest.mark.parametrize("with_residual", [False, True])
@all_formats
def test_bias_and_residual(isa, bias, with_residual, weight_dtype, activations):
    case = Case(5, 64, 13, weight_dtype, bias=bias)
    residual = normal(np.random.default_rng(1), (5, 13)) if with_residual else None
    got = guarded(
        ops.linear, *case.args, scales=case.scales, activations=activations, residual=residual, shape=(5, 13)
    )
    case.check(got, activations, residual)


@all_formats
def test_in_place_and_row_strides(isa, weight_dtype, activations):
    case = Case(6, 64, 11, weight_dtype, bias="float32")
    residual = normal(np.random.default_rng(1), (6, 11))
    want = case.run(activations, residual=residual)
    case.x, case.weight = strided(case.x, 5), strided(case.weight, 7)
    case.scales = None if case.scales is None else strided(case.scales)
    assert_exact(case.run(activations, residual=strided(residual)), want)
    out, check = strided_output((6, 11), np.float32)
    out[...] = residual
    assert case.run(activations, residual=out, out=out) is out
    assert_exact(out, want)
    check()


@all_formats
def test_rows_stand_alone(isa, weight_dtype, activations):
    case = Case(150, 96, 67, weight_dtype, bias="float32")
    assert_rows_stand_alone(lambda rows: case.run(activations, rows), 150, sizes=(1, 2, 3, 4, 5, 8, 63, 64, 65, 128))


@all_formats
def test_outputs_stand_alone(isa, weight_dtype, activations):
    case = Case(5, 100 if weight_dtype == "bfloat16" else 96, 70, weight_dtype)
    want = case.run(activations)
    weight, scales = case.weight, case.scales
    for rows in (slice(0, 1), slice(3, 8), slice(1, 67)):
        case.weight, case.scales = weight[rows], None if scales is None else scales[rows]
        assert_exact(case.run(activations), want[:, rows])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@all_formats
def test_a_broken_row_stays_alone(isa, broken, weight_dtype, activations):
    case = Case(9, 64, 5, weight_dtype)
    case.weight[case.weight == 0] = 1
    want = case.run(activations)
    case.x[4, 40] = broken
    got = case.run(activations)
    assert not np.isfinite(got[4]).any()
    assert_exact(np.delete(got, 4, 0), np.delete(want, 4, 0))


@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_int8_dots_are_exact(isa, num_tokens):
    # Whole numbers with 127 in every block keep their value; every partial sum fits float32.
    rng = np.random.default_rng(0)
    case = Case(num_tokens, 96, 70, "int8")
    case.x = rng.integers(-127, 128, case.x.shape).astype(np.float32)
    case.x[:, ::BLOCK] = rng.choice([-127, 127], case.x[:, ::BLOCK].shape)
    case.scales = (2.0 ** rng.integers(-3, 4, case.scales.shape)).astype(BF16)
    case.weight[:, 5] = -128
    want = (case.x.astype(np.float64) @ case.dense().T).astype(np.float32)
    for activations in ("int8", "bf16", "float32"):
        assert_exact(case.run(activations), want)


def test_int8_dots_do_not_saturate(isa):
    x = np.full((5, 64), 127, np.float32) * np.array([[1], [-1], [1], [-1], [1]], np.float32)
    for value in (-128, -127, 127):
        weight, scales = np.full((3, 64), value, np.int8), np.ones((3, 2), BF16)
        got = ops.linear(x, weight, scales=scales, activations="int8")
        assert_exact(got, np.repeat(x[:, :1] * 64 * value, 3, axis=1))


def test_int8_blocks_of_any_size(isa):
    case = Case(8, 96, 5, "int8")
    case.x *= np.float32(10.0) ** np.array([[-30], [-20], [-3], [0], [3], [10], [20], [30]], np.float32)
    case.x[3, 32:64] = 0
    case.check(case.run("int8"), "int8")
    case.x[:] = 0
    assert_exact(case.run("int8"), np.zeros((8, 5), np.float32))
    case.x[:] = 1e-44  # below what has a reciprocal: counts as zero
    assert (np.abs(case.run("int8")) < 1e-37).all()


def _rounded_by(x, activations="bf16"):
    """What the op makes of activations: the product with the unit matrix, in int8."""
    weight = np.eye(x.shape[1], dtype=np.int8)
    return ops.linear(x, weight, scales=np.ones((len(weight), len(weight) // BLOCK), BF16), activations=activations)


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_bf16_keeps_eight_bits_of_all_that_counts(isa, num_tokens, x_dtype):
    # Half of the values within a factor of 128 of their block's largest, the others anywhere below.
    rng = np.random.default_rng(num_tokens)
    x = rng.choice([-1, 1], (num_tokens, 3, BLOCK)) * 2.0 ** rng.uniform(-7, 0, (num_tokens, 3, BLOCK))
    x[..., 0] = rng.uniform(1, 1.99, (num_tokens, 3))
    small = rng.random(x.shape) < 0.5
    x = np.where(small & (x != x[..., :1]), x * 2.0 ** rng.uniform(-30, -7, x.shape), x)
    x = (x * 10.0 ** rng.uniform(-20, 20, (num_tokens, 3, 1))).reshape(num_tokens, -1).astype(FLOATS[x_dtype])
    got = _rounded_by(x)
    want = round_activations(x, "bf16", "int8").astype(np.float32)
    assert_exact(got + 0.0, want + 0.0)  # sums have no -0
    blocks, rounded = wide(got).reshape(-1, BLOCK), wide(x.astype(BF16)).reshape(-1, BLOCK)
    largest = np.abs(rounded).max(axis=1, keepdims=True)
    power = 2.0 ** np.floor(np.log2(largest * (1 + 2**-7)))  # the next one from all ones on
    assert (blocks == rounded)[np.abs(rounded) >= power / 128].all()
    assert (np.abs(blocks - rounded) <= power * 2.0**-15).all()


@pytest.mark.parametrize("num_tokens", [1, 6, 7, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_of_every_eight_bits(isa, num_tokens, packed):
    """Largest magnitudes and others beside them, of either sign: none is cut off, whatever it is split in."""
    bits = np.concatenate([np.arange(128, 256), -np.arange(128, 256)]).astype(np.float32)
    largest, other = bits, bits[::-1] * 2.0 ** -(np.arange(len(bits)) % 7)
    x = np.zeros((len(bits), BLOCK), np.float32)
    x[:, 3], x[:, 5], x[:, 12], x[:, 30] = largest, -largest, other, largest * 2.0**-6
    x = np.resize(
        x.reshape(-1, 8 * BLOCK), (num_tokens * -(-32 // num_tokens), 8 * BLOCK)
    )  # each value meets its token
    weight, scales = np.eye(x.shape[1], dtype=np.int8), np.ones((x.shape[1], x.shape[1] // BLOCK), BF16)
    if packed:
        weight, scales = packing.pack_linear(weight, scales)
    for rows in np.split(x, len(x) // num_tokens):
        got = ops.linear(rows, weight, scales=scales, activations="bf16")
        assert_exact(got + 0.0, rows + 0.0)


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_bf16_blocks_of_any_size(isa, num_tokens):
    values = np.array([0.0, 1e-44, 1e-38, 3e-30, 1e-9, 1.0, 1e20, 3e38], np.float32)
    x = np.tile(values.repeat(BLOCK), (num_tokens, 1))
    # What is so small that its products are nothing may be nothing itself.
    assert_close(_rounded_by(x), wide(x.astype(BF16)), dtype="bfloat16", out_dtype="float32", scale=1e-34 + x)
    x[:, -5] = np.float32(3.4e38)  # beyond bfloat16
    assert not np.isfinite(_rounded_by(x)).any()


@pytest.mark.skipif("avx2" not in _core.available_isas(), reason="this CPU has no integers of 16 bits to multiply")
@pytest.mark.parametrize("num_tokens", [1, 4, 7, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_integers_for_bf16_give_the_same_bits_on_every_level(num_tokens, packed):
    case = Case(num_tokens, 2880, 80, "int8", bias="float32")
    if packed:
        case.weight, case.scales = packing.pack_linear(case.weight, case.scales)
    results = {}
    for level in _core.available_isas():
        with ops.isa(level):
            if bf16_as_integers():
                results[level] = case.run("bf16")
    first, *others = results.values()
    for other in others:
        assert_exact(other, first)


@all_formats
def test_rounding_costs_no_more_than_in_torch(isa, weight_dtype, activations):
    case = Case(64, 2880, 40, weight_dtype)
    want = reference.linear(case.x, case.weight, scales=case.scales)
    got = relative_error(case.run(activations), want)
    by_torch = relative_error(case.torch(case.rounded_x(activations)), want)
    assert np.median(got) <= SLACK * np.median(by_torch)
    if activations != "float32":  # and it is a rounding, not float32 in disguise
        assert np.median(got) >= np.median(by_torch) / SLACK


WRONG = {
    "bias missing": lambda c, r: reference.linear(c.x, c.weight, scales=c.scales, residual=r),
    "residual forgotten": lambda c, r: reference.linear(c.x, c.weight, c.bias, scales=c.scales),
    "residual twice": lambda c, r: reference.linear(c.x, c.weight, c.bias, scales=c.scales, residual=2 * r),
    "weight rows shifted": lambda c, r: reference.linear(
        c.x, np.roll(c.weight, 1, 0), c.bias, scales=c.scales, residual=r
    ),
    "last input left out": lambda c, r: reference.linear(
        np.concatenate([c.x[:, :-1], 0 * c.x[:, -1:]], axis=1), c.weight, c.bias, scales=c.scales, residual=r
    ),
    "one weight off by one step": lambda c, r: reference.linear(
        c.x, c.weight + np.eye(*c.weight.shape, dtype=c.weight.dtype), c.bias, scales=c.scales, residual=r
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8"])
def test_wrong_products_are_rejected(wrong, weight_dtype):
    case = Case(5, 96, 13, weight_dtype, bias="float32")
    case.weight[case.weight == 127] = 126
    residual = normal(np.random.default_rng(1), (5, 13))
    with pytest.raises(AssertionError):
        case.check(wrong(case, residual).astype(np.float32), "float32", residual)


@pytest.mark.parametrize("rows_or_columns", [0, 1])
def test_shifted_scales_are_rejected(rows_or_columns):
    case = Case(5, 96, 13, "int8")
    bad = reference.linear(case.x, case.weight, scales=np.roll(case.scales, 1, rows_or_columns))
    with pytest.raises(AssertionError):
        case.check(bad.astype(np.float32), "float32")


@pytest.mark.parametrize(("activations", "coarser"), [("float32", "bf16"), ("bf16", "int8")])
def test_coarser_rounding_is_rejected(isa, activations, coarser):
    case = Case(5, 96, 13, "int8")
    with pytest.raises(AssertionError):
        case.check(case.run(coarser), activations)


def call(**changes):
    case = Case(3, 64, 5, "int8")
    args = dict(x=case.x, weight=case.weight, scales=case.scales) | changes
    return ops.linear(**args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scales=None), "weight is int8 but scales is missing"),
        (dict(weight=np.zeros((5, 64), BF16)), "scales came with bfloat16 weights; wanted none"),
        (
            dict(x=np.zeros((3, 33), np.float32), weight=np.zeros((5, 33), np.int8)),
            "weight is int8 with in_features 33; wanted a multiple of 32",
        ),
        (dict(x=np.zeros((3, 0), np.float32), weight=np.zeros((5, 0), BF16), scales=None), "x has in_features 0"),
        (dict(activations="fp8"), "activations is 'fp8'; wanted 'float32', 'bf16' or 'int8'"),
        (dict(residual=np.zeros((3, 4), np.float32)), r"residual has shape \(3, 4\)"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_residual_may_be_out_itself_but_not_half_of_it():
    x, weight = np.ones((2, 4), np.float32), np.ones((4, 4), BF16)
    memory = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="out shares memory with residual"):
        ops.linear(x, weight, residual=memory[:2], out=memory[1:])
    assert_exact(ops.linear(x, weight, residual=memory[:2], out=memory[:2]), np.full((2, 4), 5, np.float32))
