"""mxfp4_dequantize, mxfp4_quantize and int8_quantize: exact against ml_dtypes and the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compare import assert_exact
from mxmoe import _core, ops
from mxmoe.reference import ops as reference
from op_helpers import BF16, BLOCK, FLOATS, decode_mxfp4, normal, random_mxfp4, strided, to_torch, unchanged, wide


def every_code_at_every_scale():
    """Blocks (256, 8, 16) and scales (256, 8): row s has all 256 bytes, so each code in either nibble, at scale s."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 1, 1))
    return blocks, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_decodes_every_code_at_every_scale(dtype):
    blocks, scales = every_code_at_every_scale()
    got = ops.mxfp4_dequantize(blocks, scales, dtype=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        want = decode_mxfp4(blocks, scales)
        assert_exact(got, want.astype(FLOATS[dtype]))
        assert_exact(got, reference.mxfp4_dequantize(blocks, scales).astype(FLOATS[dtype]))
    assert np.isnan(wide(got[255])).all() and not np.isnan(wide(got[:255])).any()


def test_low_nibble_comes_first():
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, 0], blocks[0, 0, 15] = 0x72, 0xA1
    got = ops.mxfp4_dequantize(blocks, np.full((1, 1), 128, np.uint8))
    assert got[0, [0, 1, 30, 31]].tolist() == [2.0, 12.0, 1.0, -2.0]


WRONG = {
    "nibbles swapped": lambda b, s: decode_mxfp4(b >> 4 | b << 4, s),
    "nibbles of halves": lambda b, s: np.concatenate(
        [decode_mxfp4(b, s)[..., 0::2], decode_mxfp4(b, s)[..., 1::2]], axis=-1
    ),
    "scale off by one": lambda b, s: decode_mxfp4(b, s + 1),
    "sign forgotten": lambda b, s: np.abs(decode_mxfp4(b, s)),
    "scales of the next block": lambda b, s: decode_mxfp4(b, np.roll(s, 1, axis=-1)),
    "one bit wrong": lambda b, s: decode_mxfp4(b ^ (np.arange(16) == 3).astype(np.uint8), s),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_decodings_are_rejected(wrong):
    blocks, scales = random_mxfp4(np.random.default_rng(0), (4, 96))
    got = ops.mxfp4_dequantize(blocks, scales)
    assert_exact(got, decode_mxfp4(blocks, scales))
    with pytest.raises(AssertionError):
        assert_exact(got, wrong(blocks, scales))


@pytest.mark.parametrize("shape", [(32,), (0, 32), (3, 0), (5, 96), (2, 3, 64), (1, 2880)])
def test_shapes_of_any_rank(shape):
    blocks, scales = random_mxfp4(np.random.default_rng(0), shape)
    with unchanged(blocks, scales):
        assert_exact(ops.mxfp4_dequantize(blocks, scales), decode_mxfp4(blocks, scales))
    if 0 not in shape:
        values = decode_mxfp4(blocks, scales)
        again = ops.mxfp4_quantize(values)
        assert again[0].shape == blocks.shape and again[1].shape == scales.shape
        assert_exact(ops.mxfp4_dequantize(*again), values)


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ((3, 2, 16), (3, 3), "blocks and scales have shapes"),
        ((3, 2, 16), (3, 2, 1), "blocks and scales have shapes"),
        ((3, 2, 15), (3, 2), "blocks and scales have shapes"),
        ((16,), (1,), "blocks and scales have shapes"),
    ],
)
def test_shapes_that_do_not_fit(blocks, scales, message):
    with pytest.raises(ValueError, match=message):
        ops.mxfp4_dequantize(np.zeros(blocks, np.uint8), np.zeros(scales, np.uint8))


def test_dtypes_that_do_not_fit():
    blocks, scales = random_mxfp4(np.random.default_rng(0), (2, 32))
    with pytest.raises(ValueError, match="dtype is 'float16'; wanted 'float32' or 'bfloat16'"):
        ops.mxfp4_dequantize(blocks, scales, dtype="float16")
    with pytest.raises(TypeError, match="blocks has dtype int8; wanted uint8"):
        ops.mxfp4_dequantize(blocks.view(np.int8), scales)
    with pytest.raises(TypeError, match="scales has dtype float32; wanted uint8"):
        ops.mxfp4_dequantize(blocks, scales.astype(np.float32))


def e2m1_midpoints():
    """Every value halfway between two codes, and its neighbours in float32, at a scale of 1."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    middle = (values[1:] + values[:-1]) / 2
    near = np.concatenate([np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(9)), values])
    return np.concatenate([near, -near, [5.99, 6.01, 7.99, -7.99]]).astype(np.float32)


def test_rounds_to_nearest_code_ties_to_even():
    values = e2m1_midpoints()
    x = np.zeros((len(values), BLOCK), np.float32)
    x[:, 0], x[:, 1] = 4.0, values  # 4 fixes the scale at 1
    x[np.abs(values) >= 8, 1] = 0
    blocks, scales = ops.mxfp4_quantize(x)
    assert_exact(scales, np.full_like(scales, 127))
    codes = (blocks[:, 0, 0] >> 4).view(ml_dtypes.float4_e2m1fn)
    assert_exact(codes.astype(np.float32), values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-3, 1.0, 1e5, 1e37])
def test_quantize_matches_the_reference(dtype, size):
    x = (normal(np.random.default_rng(0), (50, 96)) * np.float32(size)).astype(FLOATS[dtype])
    x[7] = 0
    x[8, 3] = -0.0
    for got, want in zip(ops.mxfp4_quantize(x), reference.mxfp4_quantize(x), strict=True):
        assert_exact(got, want)
    assert_exact(ops.mxfp4_quantize(x)[1][7], np.zeros(3, np.uint8))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(arrays.arrays(np.float32, (3, BLOCK), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_quantize_of_anything_finite(x):
    for got, want in zip(ops.mxfp4_quantize(x), reference.mxfp4_quantize(x), strict=True):
        assert_exact(got, want)
    for got, want in zip(ops.int8_quantize(x), reference.int8_quantize(x), strict=True):
        assert_exact(got, want)


def test_what_is_mxfp4_already_comes_back():
    rng = np.random.default_rng(0)
    blocks, scales = random_mxfp4(rng, (200, 96), 2, 250)
    values = decode_mxfp4(blocks, scales)
    again = ops.mxfp4_quantize(values)
    assert_exact(ops.mxfp4_dequantize(*again), values)
    # The block is its own shortest description only if it holds a magnitude of 4 or 6.
    full = np.isin(np.stack([blocks & 7, blocks >> 4 & 7]), (6, 7)).any(axis=(0, -1))
    assert_exact(again[1][full], scales[full])
    assert_exact(again[0][full], blocks[full])


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_matches_the_reference_and_torch(dtype):
    x = normal(np.random.default_rng(0), (200, 2880), dtype)
    x[3, :40] = 0
    with unchanged(x):
        codes, scales = ops.int8_quantize(x)
    want_codes, want_scales = reference.int8_quantize(x)
    assert_exact(codes, want_codes)
    assert_exact(scales, want_scales)
    blocks = to_torch(x).double().reshape(200, 90, BLOCK)
    by_torch = torch.round(blocks / to_torch(scales).double()[..., None]).nan_to_num()
    assert_exact(codes, by_torch.reshape(200, 2880).to(torch.int8))
    assert np.abs(codes).max() <= 127
    assert (wide(scales) * 127 >= np.abs(wide(x)).reshape(200, 90, BLOCK).max(-1)).all()


def test_int8_scale_is_the_smallest_bfloat16_that_covers_the_block():
    # Just at, below and above 127 times a bfloat16, where rounding the quotient to float32 would hide the excess.
    scale = np.linspace(1, 2, 256, endpoint=False).astype(BF16).astype(np.float32)
    # And so small that 127 of the smallest bfloat16 cover more, or that the quotient is no float32.
    least = np.arange(256, dtype=np.uint32).view(np.float32)
    for amax in (
        scale * 127, np.nextafter(scale * 127, np.float32(0)), np.nextafter(scale * 127, np.float32(1e9)), least
    ):  # fmt: skip
        x = np.zeros((256, BLOCK), np.float32)
        x[:, 5] = -amax
        for got, want in zip(ops.int8_quantize(x), reference.int8_quantize(x), strict=True):
            assert_exact(got, want)


def test_int8_ties_to_even():
    x = np.zeros((1, BLOCK), np.float32)
    x[0, :6] = [127, 0.5, 1.5, -2.5, 3.5, -0.5]
    codes, scales = ops.int8_quantize(x)
    assert scales.tolist() == [[1.0]]
    assert codes[0, :6].tolist() == [127, 0, 2, -2, 4, 0]


@pytest.mark.parametrize("quantize", [ops.mxfp4_quantize, ops.int8_quantize])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_an_error(quantize, bad, dtype):
    x = np.ones((5, 64), FLOATS[dtype])
    x[3, 63] = bad
    with pytest.raises(ValueError, match="x holds a NaN or infinity in row 3; wanted finite numbers"):
        quantize(x)


@pytest.mark.parametrize("quantize", [ops.mxfp4_quantize, ops.int8_quantize])
def test_columns_that_make_no_blocks(quantize):
    with pytest.raises(ValueError, match=r"x has 33 columns; wanted a .*multiple of 32"):
        quantize(np.zeros((2, 33), np.float32))


@pytest.mark.parametrize("quantize", [ops.mxfp4_quantize, ops.int8_quantize])
@pytest.mark.parametrize("dtype", FLOATS)
def test_row_strides_and_kinds_of_arrays(quantize, dtype):
    x = normal(np.random.default_rng(0), (5, 64), dtype)
    want = quantize(x)
    for got, expected in zip(quantize(strided(x)), want, strict=True):
        assert_exact(got, expected)
    for got, expected in zip(quantize(to_torch(x)), want, strict=True):
        assert isinstance(got, torch.Tensor)
        assert_exact(got, expected)


def test_an_int8_matrix_rounded_the_wrong_way_is_rejected():
    x = normal(np.random.default_rng(0), (20, 96))
    codes, scales = ops.int8_quantize(x)
    blocks = x.reshape(20, 3, BLOCK) / scales.astype(np.float32)[..., None]
    for wrong in (np.trunc(blocks), np.floor(blocks), -np.rint(blocks)):
        with pytest.raises(AssertionError):
            assert_exact(codes, wrong.reshape(20, 96).astype(np.int8))


def test_first_not_finite():
    every = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    is_finite = every.view(np.uint16) & 0x7F80 != 0x7F80
    finite = np.resize(every[is_finite], 300_001)  # several threads' pieces, and no whole number of them
    for size in (0, 1, 7, 300_001):
        assert _core.first_not_finite(finite[:size]) == -1
    for value in every[~is_finite][::17]:
        for places in ([0], [300_000], [65_535], [65_536, 65_537], [200_000, 299_999, 70_000]):
            x = finite.copy()
            x[places] = value
            assert _core.first_not_finite(x) == min(places)
    for wrong, says in (
        (np.zeros(4, np.float32), "x has dtype float32; wanted bfloat16"),
        (finite.reshape(1, -1), r"x has shape \(1, 300001\); wanted \(n\)"),
        (finite[::2], "contiguous"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            _core.first_not_finite(wrong)
