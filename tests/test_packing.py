"""Packed weights: the layout, the way back, and the same bits from every kernel."""

import mmap

import ml_dtypes
import numpy as np
import pytest

from mxmoe import _core, ops, packing
from mxmoe.layers import ExpertMatrix, Linear
from mxmoe.memory import empty, zeros
from op_helpers import FLOATS, normal

MODES = ("float32", "bf16", "int8")
TOKENS = (1, 2, 5, 6, 7, 12, 40, 100)


def mxfp4(rng, *shape):
    *lead, rows, k = shape
    blocks = rng.integers(0, 256, (*lead, rows, k // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(118, 130, (*lead, rows, k // 32), dtype=np.uint8)


def dense(rng, rows, k, dtype):
    if dtype == "bfloat16":
        return normal(rng, (rows, k), dtype), None
    return rng.integers(-128, 128, (rows, k), dtype=np.int8), normal(rng, (rows, k // 32), "bfloat16")


def identical(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# The layout, written down a second time in NumPy


def test_the_layout_of_mxfp4():
    blocks, scales = mxfp4(np.random.default_rng(0), 2, 48, 96)
    packed, packed_scales = packing.pack_mxfp4(blocks, scales)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(
        2, 3, 16, 3, 4, 8
    )  # expert panel row block dword code
    order = codes[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    want = (order[..., ::2] | order[..., 1::2] << 4).transpose(0, 1, 3, 4, 2, 5).reshape(2, 3, 3, 256)
    assert identical(packed, np.ascontiguousarray(want))
    want_scales = scales.reshape(2, 3, 16, 3).transpose(0, 1, 3, 2)
    assert identical(packed_scales, np.ascontiguousarray(want_scales))


def test_the_layout_of_int8():
    weight, scales = dense(np.random.default_rng(1), 32, 64, "int8")
    packed, packed_scales = packing.pack_linear(weight, scales)
    raised = (weight.astype(np.int16) + 128).astype(np.uint8)
    want = raised.reshape(2, 16, 2, 8, 4).transpose(0, 2, 3, 1, 4).reshape(2, 2, 512)
    assert identical(packed, np.ascontiguousarray(want))
    assert identical(packed_scales, np.ascontiguousarray(scales.reshape(2, 16, 2).transpose(0, 2, 1)))


def test_the_layout_of_bf16():
    weight, _ = dense(np.random.default_rng(2), 32, 64, "bfloat16")
    packed, packed_scales = packing.pack_linear(weight)
    want = weight.reshape(2, 16, 2, 16, 2).transpose(0, 2, 3, 1, 4).reshape(2, 2, 512)
    assert identical(packed, np.ascontiguousarray(want))
    assert packed_scales is None


@pytest.mark.parametrize("shape", [(16, 32), (32, 2880), (3, 5, 16, 96), (2, 5760, 64)])
def test_mxfp4_there_and_back(shape):
    blocks, scales = mxfp4(np.random.default_rng(3), *shape)
    packed, packed_scales = packing.pack_mxfp4(blocks, scales)
    again, scales_again = packing.unpack_mxfp4(packed, packed_scales)
    assert packed.nbytes == blocks.nbytes and packed_scales.nbytes == scales.nbytes
    assert identical(again, blocks) and identical(scales_again, scales)


def apart(*arrays):
    """Copies that share no buffer."""
    return tuple(np.ascontiguousarray(a) for a in arrays)


def test_scales_lie_behind_their_blocks():
    rng = np.random.default_rng(10)
    mxfp4_parts = packing.pack_mxfp4(*mxfp4(rng, 2, 48, 96))
    int8_parts = packing.pack_linear(*dense(rng, 32, 96, "int8"))
    for values, scales in (mxfp4_parts, int8_parts):
        step = values.shape[-1] + scales.shape[-1] * scales.itemsize
        assert values.strides[-2] == scales.strides[-2] == step
        assert scales.ctypes.data - values.ctypes.data == values.shape[-1]
        assert values.strides[-3] == scales.strides[-3] == step * values.shape[-2]


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="asks for huge pages on Linux alone")
def test_large_panels_begin_with_a_huge_page():
    rng = np.random.default_rng(12)
    for shape in ((1, 1024, 2048), (3, 528, 5120)):
        assert packing.pack_mxfp4(*mxfp4(rng, *shape))[0].ctypes.data % (2 << 20) == 0
    for dtype in ("bfloat16", "int8"):
        packed, _ = packing.pack_linear(*dense(rng, 1024, 2048, dtype))
        assert packed.ctypes.data % (2 << 20) == 0
        assert packed.flags.writeable


def test_memory_that_is_not_there():
    with pytest.raises(MemoryError, match="weights of 1125899906842624 bytes find no room"):
        empty((1 << 50,))
    with pytest.raises(MemoryError, match=r"keys of \d+ bytes find no room"):
        zeros([((3,), np.int8), ((1 << 50,), np.float32)], "keys")


@pytest.mark.parametrize("large", [0, 3 << 20])
def test_arrays_in_one_piece_of_memory(large):
    wanted = [
        ((3, 5), np.int8),
        ((7,), np.float32),
        ((large,), np.uint8),
        ((0, 4), np.float64),
        ((2, 3), FLOATS["bfloat16"]),
    ]
    arrays = zeros(wanted, "arrays")
    assert [(a.shape, a.dtype) for a in arrays] == [(shape, np.dtype(dtype)) for shape, dtype in wanted]
    for i, array in enumerate(arrays):
        assert not array.any() and array.flags.c_contiguous and array.flags.writeable
        assert (array.ctypes.data - arrays[0].ctypes.data) % 64 == 0
        array[...] = i + 1
    assert all((array == i + 1).all() for i, array in enumerate(arrays))
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        assert arrays[0].ctypes.data % (2 << 20) == 0


def test_panels_may_be_packed_wherever_they_do_not_share_bytes():
    rng = np.random.default_rng(11)
    blocks, scales = mxfp4(rng, 32, 96)
    want = packing.pack_mxfp4(blocks, scales)
    for begin, step in ((256, 272), (300, 400), (272, 288)):  # where scales begin, and from block to block
        room = np.zeros((2, 3, step), np.uint8)
        packed, packed_scales = room[..., :256], room[..., begin : begin + 16]
        _core.pack_mxfp4(blocks, scales, packed, packed_scales)
        assert identical(packed, want[0]) and identical(packed_scales, want[1])
        again = np.empty_like(blocks), np.empty_like(scales)
        _core.unpack_mxfp4(packed, packed_scales, *again)
        assert identical(again[0], blocks) and identical(again[1], scales)
    room = np.zeros(2 * 3 * 272 + 64, np.uint8)
    values = np.lib.stride_tricks.as_strided(room, (2, 3, 256), (3 * 272, 272, 1))
    for begin in (0, 255, 257):  # in the block's own bytes, and in the next block's
        overlapping = np.lib.stride_tricks.as_strided(room[begin:], (2, 3, 16), (3 * 272, 272, 1))
        with pytest.raises(ValueError, match="packed shares memory with packed_scales"):
            _core.pack_mxfp4(blocks, scales, values, overlapping)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(16, 32), (48, 2880), (160, 96)])
def test_dense_there_and_back(shape, dtype):
    weight, scales = dense(np.random.default_rng(4), *shape, dtype)
    again, scales_again = packing.unpack_linear(*packing.pack_linear(weight, scales))
    assert identical(again, weight)
    assert scales is None if scales_again is None else identical(scales_again, scales)


# The same bits


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("shape", [(16, 32), (32, 96), (80, 2880), (368, 160)])
def test_linear_gives_the_same_bits(isa, shape, x_dtype, dtype, activations):
    rng = np.random.default_rng(5)
    weight, scales = dense(rng, *shape, dtype)
    packed, packed_scales = packing.pack_linear(weight, scales)
    bias = normal(rng, (shape[0],), "bfloat16")
    for tokens in TOKENS:
        x, residual = normal(rng, (tokens, shape[1]), x_dtype), normal(rng, (tokens, shape[0]))
        want = ops.linear(x, weight, bias, scales=scales, activations=activations, residual=residual)
        got = ops.linear(x, packed, bias, scales=packed_scales, activations=activations, residual=residual)
        assert identical(got, want), tokens
        if scales is not None:
            copies = apart(packed, packed_scales)
            got = ops.linear(x, copies[0], bias, scales=copies[1], activations=activations, residual=residual)
            assert identical(got, want), tokens


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("sizes", [(32, 32), (96, 64), (64, 352)])
def test_mxfp4_moe_gives_the_same_bits(isa, sizes, activations):
    hidden, inner = sizes
    for tokens in TOKENS:
        rng = np.random.default_rng(tokens)
        weights = moe_weights(rng, hidden, inner)
        x = normal(rng, (tokens, hidden))
        ids = np.argsort(rng.random((tokens, 4)), axis=1)[:, :2].astype(np.int32)
        shares = rng.random((tokens, 2), dtype=np.float32)
        want = ops.mxfp4_moe(x, ids, shares, **weights, activations=activations)
        packed = dict(weights)
        for name in ("gate_up", "down"):
            packed |= packed_matrix(name, weights)
        assert identical(ops.mxfp4_moe(x, ids, shares, **packed, activations=activations), want), tokens
        parts = {name: a for name, a in packed.items() if name.endswith(("blocks", "scales"))}
        copies = dict(zip(parts, apart(*parts.values()), strict=True))
        assert identical(ops.mxfp4_moe(x, ids, shares, **(packed | copies), activations=activations), want), tokens


def moe_weights(rng, hidden, inner, experts=4):
    weights = {}
    for name, rows, k in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = mxfp4(rng, experts, rows, k)
        weights[f"{name}_bias"] = normal(rng, (experts, rows), "bfloat16")
    return weights


def packed_matrix(name, weights):
    blocks, scales = packing.pack_mxfp4(weights[f"{name}_blocks"], weights[f"{name}_scales"])
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


@pytest.mark.parametrize("byte", [0, 1, 2, 127, 252, 254])
@pytest.mark.parametrize("activations", MODES)
def test_every_scale_gives_the_same_bits(isa, byte, activations):
    """The smallest scale is subnormal, the largest products overflow."""
    rng = np.random.default_rng(byte)
    weights = moe_weights(rng, 32, 32)
    for name in ("gate_up_scales", "down_scales"):
        weights[name][:, ::3] = byte
    x, ids = normal(rng, (9, 32)), rng.integers(0, 4, (9, 1)).astype(np.int32)
    shares = np.ones((9, 1), np.float32)
    packed = weights | packed_matrix("gate_up", weights) | packed_matrix("down", weights)
    want = ops.mxfp4_moe(x, ids, shares, **weights, activations=activations)
    assert identical(ops.mxfp4_moe(x, ids, shares, **packed, activations=activations), want)


@pytest.mark.parametrize(
    "gate_up, down, magnitudes",
    [
        ((107, 148), (107, 148), (-2, 2)),
        ((127, 128), (107, 108), (-34, -30)),
        ((127, 128), (1, 20), (-8, -4)),
        ((147, 148), (127, 128), (31.6, 32)),
        ((230, 253), (127, 128), (-2, 2)),
        ((0, 255), (0, 255), (-44, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("activations", MODES)
def test_any_magnitude_gives_the_same_bits(isa, gate_up, down, magnitudes, activations):
    """Many tokens of packed weights may have the scales in their weights, where that can change nothing."""
    rng = np.random.default_rng(7)
    weights = moe_weights(rng, 96, 64, experts=2)
    weights["gate_up_scales"][:] = rng.integers(*gate_up, weights["gate_up_scales"].shape)
    weights["down_scales"][:] = rng.integers(*down, weights["down_scales"].shape)
    for name in ("gate_up_bias", "down_bias"):
        weights[name][:] = 0
    x = normal(rng, (40, 96)) * np.float32(10) ** rng.uniform(*magnitudes, (40, 1)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    x[20:] = normal(rng, (20, 96))
    ids, shares = np.arange(2, dtype=np.int32).repeat(20)[:, None], np.ones((40, 1), np.float32)
    packed = weights | packed_matrix("gate_up", weights) | packed_matrix("down", weights)
    with np.errstate(over="ignore", invalid="ignore"):
        want = ops.mxfp4_moe(x, ids, shares, **weights, activations=activations)
        got = ops.mxfp4_moe(x, ids, shares, **packed, activations=activations)
        alone = ops.mxfp4_moe(x[7:8], ids[7:8], shares[7:8], **packed, activations=activations)
    for y in (want, got, alone):
        y[np.isnan(y)] = np.nan  # whichever it is
    assert identical(got, want)
    assert identical(alone, want[7:8])


def same_bits_packed(weights, x, activations, **options):
    """Twenty tokens to each of two experts, weights as stored and packed, and one of the tokens alone."""
    ids, shares = np.arange(2, dtype=np.int32).repeat(20)[:, None], np.ones((40, 1), np.float32)
    packed = weights | packed_matrix("gate_up", weights) | packed_matrix("down", weights)
    options |= {"activations": activations}
    want = ops.mxfp4_moe(x, ids, shares, **weights, **options)
    assert identical(ops.mxfp4_moe(x, ids, shares, **packed, **options), want)
    assert identical(ops.mxfp4_moe(x[7:8], ids[7:8], shares[7:8], **packed, **options), want[7:8])
    return want


@pytest.mark.parametrize("base", [104, 107, 124, 144, 146])
@pytest.mark.parametrize("activations", MODES)
def test_scales_near_each_other_give_the_same_bits(isa, base, activations):
    """Integers can have scales within three binades in them; here all do but those of one row in the middle of K."""
    rng = np.random.default_rng(base)
    weights = moe_weights(rng, 1120, 64, experts=2)
    for name in ("gate_up", "down"):
        weights[f"{name}_scales"][:] = base + rng.integers(0, 4, weights[f"{name}_scales"].shape)
        weights[f"{name}_bias"][:] = 0
    weights["gate_up_scales"][1, 36, 16:18] = base, base + 4
    x = normal(rng, (40, 1120))
    x[:, 320:352] = 0
    x[20:] *= np.float32(2.0**-40)
    want = same_bits_packed(weights, x, activations, swiglu_limit=1e30)
    assert np.isfinite(want).all() and len(np.unique(want)) > want.size / 2


@pytest.mark.parametrize("activations", MODES)
def test_sums_too_small_for_larger_scales_stay_as_they_are(isa, activations):
    """Zeros under scales of 2^20 behind products of about 2^-115, which 2^-20 times that cannot hold."""
    rng = np.random.default_rng(0)
    weights = moe_weights(rng, 32, 1120, experts=2)
    weights["gate_up_blocks"][:] = 0
    wanted = np.zeros((2, 1120, 2), np.float32)  # of a gate of x and an up of 0, x / 2 with an alpha of 0
    wanted[:, :512, 0] = normal(rng, (2, 512)) * np.float32(2.0**-19)
    weights["gate_up_bias"] = wanted.reshape(2, 2240)
    weights["down_bias"] = np.zeros((2, 32), np.float32)
    weights["down_scales"][:, :, :16] = 27
    weights["down_scales"][:, :, 16:] = 147
    want = same_bits_packed(weights, normal(rng, (40, 32)), activations, swiglu_alpha=0.0)
    assert 2.0**-120 < np.median(np.abs(want)) < 2.0**-110


# Layers that hold packed weights


def test_a_packed_layer_shows_what_it_was_given():
    rng = np.random.default_rng(6)
    for dtype in ("bfloat16", "int8"):
        weight, scales = dense(rng, 32, 64, dtype)
        layer = Linear(ops, weight, None, scales, "bf16", packed=True)
        assert layer.packed
        assert identical(layer.weight, weight)
        assert (layer.scales is None) if scales is None else identical(layer.scales, scales)
        with pytest.raises(ValueError, match="read-only"):
            layer.weight[0, 0] = 1
        x = normal(rng, (3, 64))
        other, other_scales = dense(rng, 32, 64, dtype)
        layer.replace(other, other_scales)
        assert identical(layer(x), ops.linear(x, other, scales=other_scales))
        layer.weight = weight
        assert identical(layer(x), ops.linear(x, weight, scales=other_scales))


def test_a_weight_without_whole_panels_stays_as_it_is():
    rng = np.random.default_rng(7)
    for rows, k in ((17, 64), (32, 48)):
        weight = normal(rng, (rows, k), "bfloat16")
        layer = Linear(ops, weight, None, None, "bf16", packed=True)
        assert not layer.packed
        assert layer.weight is weight


def test_a_packed_expert_matrix_can_be_replaced_in_parts():
    rng = np.random.default_rng(8)
    blocks, scales = mxfp4(rng, 3, 32, 64)
    matrix = ExpertMatrix(blocks, scales, packed=True)
    other, _ = mxfp4(rng, 3, 32, 64)
    matrix.replace(blocks=other)
    assert identical(matrix.stored()[0], other) and identical(matrix.stored()[1], scales)
    matrix.replace(scales=scales + 1)
    assert identical(matrix.stored()[0], other) and identical(matrix.stored()[1], scales + 1)


# What is refused


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ((2, 17, 3, 16), (2, 17, 3), "34 rows; wanted a multiple of 16"),
        ((16, 3, 15), (16, 3), "blocks"),
        ((16, 3, 16), (16, 4), "scales"),
        ((16, 16), (16,), "blocks"),
    ],
)
def test_mxfp4_of_a_wrong_shape(blocks, scales, message):
    with pytest.raises(ValueError, match=message):
        packing.pack_mxfp4(np.zeros(blocks, np.uint8), np.zeros(scales, np.uint8))


def test_mxfp4_of_a_wrong_dtype():
    with pytest.raises(TypeError, match="blocks has dtype int8"):
        packing.pack_mxfp4(np.zeros((16, 1, 16), np.int8), np.zeros((16, 1), np.uint8))


@pytest.mark.parametrize(
    ("weight", "scales", "error", "message"),
    [
        (np.zeros((16, 33), ml_dtypes.bfloat16), None, ValueError, "K = 33; wanted a multiple of 32"),
        (np.zeros((15, 32), ml_dtypes.bfloat16), None, ValueError, "15 rows"),
        (np.zeros((16, 32), np.float32), None, TypeError, "weight has dtype float32"),
        (np.zeros((16, 32), np.int8), None, (TypeError, ValueError), "packed|scales"),
        (np.zeros((16, 32), np.int8), np.zeros((16, 2), ml_dtypes.bfloat16), ValueError, "scales"),
        (np.zeros((16, 32), np.int8), np.zeros((16, 1), np.float32), TypeError, "scales has dtype float32"),
        (np.zeros((1, 16, 32), ml_dtypes.bfloat16), None, ValueError, "weight has shape"),
    ],
)
def test_dense_weights_that_do_not_fit(weight, scales, error, message):
    with pytest.raises(error, match=message):
        packing.pack_linear(weight, scales)


def test_ops_refuse_packed_weights_of_another_size():
    rng = np.random.default_rng(9)
    packed, _ = packing.pack_linear(normal(rng, (32, 64), "bfloat16"))
    with pytest.raises(ValueError, match="weight has shape"):
        ops.linear(normal(rng, (2, 96)), packed)
    case = moe_weights(rng, 32, 32)
    mixed = case | packed_matrix("gate_up", case)
    with pytest.raises(ValueError, match="down_blocks has shape"):
        ops.mxfp4_moe(normal(rng, (1, 32)), np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), **mixed)
