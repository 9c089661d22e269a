"""The oracle against formulas written a second time, in torch and in plain Python loops."""

from __future__ import annotations

import inspect
import math

import ml_dtypes
import numpy as np
import pytest

from compare import assert_exact
from mxmoe import ops as fast
from mxmoe.reference import ops
from reference_cases import BF16, normal, random_mxfp4, same, t64, torch

# Embedding, normalisation, rotation, dense layers


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_embedding(tokens, dtype):
    weight = normal(11, 32, dtype=dtype)
    ids = np.random.default_rng(1).integers(0, 11, tokens)
    assert_exact(ops.embedding(ids, weight), weight.astype(np.float64)[ids])


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("hidden", [1, 32, 2880])
def test_rmsnorm(tokens, hidden):
    x, weight = normal(tokens, hidden, dtype=np.float32), normal(hidden, seed=1, dtype=BF16)
    want = torch.nn.functional.rms_norm(t64(x), (hidden,), t64(weight), 1e-5)
    same(ops.rmsnorm(x, weight, 1e-5), want)


def test_rmsnorm_keeps_eps_inside_the_root():
    same(ops.rmsnorm(np.zeros((1, 4)), np.ones(4), 1e-5), np.zeros((1, 4)))
    same(ops.rmsnorm(np.full((1, 4), 3e-3), np.ones(4), 1e-5), np.full((1, 4), 3e-3 / math.sqrt(1.9e-5)))


def openai_yarn(head_dim, theta, factor, original, fast, slow):
    """YaRN as OpenAI's own code has it, pair by pair."""
    half = head_dim // 2
    low = half * math.log(original / (fast * 2 * math.pi)) / math.log(theta)
    high = half * math.log(original / (slow * 2 * math.pi)) / math.log(theta)
    result = []
    for i in range(half):
        kept = 1 / theta ** (2 * i / head_dim)
        mask = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(kept / factor * (1 - mask) + kept * mask)
    return np.array(result), 0.1 * math.log(factor) + 1


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("factor", [2.0, 32.0])
def test_rope_inv_freq_is_openais(head_dim, factor):
    got, scaling = ops.rope_inv_freq(head_dim, 150000.0, factor=factor)
    want, want_scaling = openai_yarn(head_dim, 150000.0, factor, 4096, 32.0, 1.0)
    same(got, want)
    assert scaling == want_scaling


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
@pytest.mark.parametrize(("head_dim", "theta", "original"), [(64, 150000.0, 4096), (16, 10000.0, 64), (32, 1e6, 17)])
def test_rope_inv_freq_is_transformers(truncate, factor, head_dim, theta, original):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": truncate,
    }
    config = transformers.GptOssConfig(head_dim=head_dim, rope_parameters=parameters)
    want, want_scaling = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    options = {"factor": factor, "original_max_position_embeddings": original, "truncate": truncate}
    got, scaling = ops.rope_inv_freq(head_dim, theta, **options)
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
    assert scaling == pytest.approx(want_scaling, abs=1e-12)


def test_rope_without_stretching_is_plain():
    got, scaling = ops.rope_inv_freq(8, 10000.0)
    same(got, [1.0, 0.1, 0.01, 0.001])
    assert scaling == 1.0


def test_rope_turns_half_split_pairs():
    x = normal(5, 3, 8)
    inv_freq, scaling = ops.rope_inv_freq(8, 10000.0, factor=4.0, original_max_position_embeddings=64)
    positions = np.array([0, 1, 7, 100, 131071])
    cos, sin = ops.rope_cos_sin(positions, inv_freq, scaling)
    got = ops.rope(x, cos, sin)
    pairs = torch.complex(t64(x)[..., :4], t64(x)[..., 4:])
    turn = torch.polar(
        torch.full((5, 1, 4), scaling, dtype=torch.float64), t64(np.outer(positions, inv_freq))[:, None]
    )
    turned = pairs * turn
    same(got, torch.cat([turned.real, turned.imag], dim=-1))
    same(ops.rope(x, *ops.rope_cos_sin(np.zeros(5, int), inv_freq)), x)


def test_rope_depends_on_relative_position_only():
    q, k = normal(1, 1, 64), normal(1, 1, 64, seed=1)
    inv_freq, scaling = ops.rope_inv_freq(64, 150000.0, factor=32.0)

    def score(i, j):
        turned = [ops.rope(x, *ops.rope_cos_sin([p], inv_freq, scaling)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(1009, 1004), rel=1e-9)
    assert score(9, 4) != pytest.approx(score(4, 9), rel=1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (33, 64), (5000, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(tokens, n, k, bias):
    x, weight = normal(tokens, k, dtype=np.float32), normal(n, k, seed=1, dtype=BF16)
    b = normal(n, seed=2, dtype=BF16) if bias else None
    residual = normal(tokens, n, seed=3, dtype=np.float32)
    want = torch.nn.functional.linear(t64(x), t64(weight), t64(b) if bias else None)
    same(ops.linear(x, weight, b), want)
    same(ops.linear(x, weight, b, residual=residual, activations="int8"), want + t64(residual))


def test_linear_with_int8_weights():
    x, weight = normal(3, 96), normal(40, 96, seed=1, dtype=np.float32)
    codes, scales = ops.int8_quantize(weight)
    decoded = t64(codes).reshape(40, 3, 32) * t64(scales)[..., None]
    same(ops.linear(x, codes, scales=scales), t64(x) @ decoded.reshape(40, 96).T)


def test_results_go_to_out():
    x, weight = normal(3, 32, dtype=np.float32), normal(32, seed=1, dtype=np.float32)
    for dtype in (np.float32, np.float64, BF16):
        out = np.full((3, 32), np.nan, dtype)
        assert ops.rmsnorm(x, weight, 1e-5, out=out) is out
        assert_exact(out, ops.rmsnorm(x, weight, 1e-5).astype(dtype))
    stream = x.copy()
    ops.linear(x, normal(32, 32), residual=stream, out=stream)
    assert_exact(stream, ops.linear(x, normal(32, 32), residual=x).astype(np.float32))


# Routing


@pytest.mark.parametrize("experts", [5, 32, 128])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_routing(experts, k, tokens):
    logits = normal(tokens, experts, dtype=np.float32)
    ids, weights = ops.expert_routing(logits, k)
    want = torch.topk(t64(logits), k, dim=-1)
    assert_exact(ids, want.indices.numpy().astype(np.int32))
    same(weights, torch.softmax(want.values, dim=-1))


def test_routing_breaks_ties_to_the_lower_expert():
    ids, weights = ops.expert_routing([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, -0.0, 0.0, 0.0]], 4)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    same(weights[1], np.full(4, 0.25))


def test_routing_survives_large_logits():
    _, weights = ops.expert_routing([[1e30, -1e30, 1e4, 1e4 - 1]], 2)
    assert weights.tolist() == [[1.0, 0.0]]


def test_expert_offsets():
    ids = np.array([[3, 0], [0, 1], [3, 0]])
    offsets, order = ops.expert_offsets(ids, 5)
    assert offsets.tolist() == [0, 3, 4, 4, 6, 6]
    assert order.tolist() == [1, 2, 5, 3, 0, 4]
    assert (offsets.dtype, order.dtype) == (np.int32, np.int32)
    offsets, order = ops.expert_offsets(np.empty((0, 4), int), 3)
    assert (offsets.tolist(), order.tolist()) == ([0, 0, 0, 0], [])


# Number formats


def test_mxfp4_decodes_every_code_at_every_scale():
    scales = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    codes = np.arange(256, dtype=np.uint8)  # a byte holds two codes: all pairs
    blocks = np.broadcast_to(codes.reshape(1, 16, 16), (256, 16, 16)).copy()
    got = ops.mxfp4_dequantize(blocks, np.repeat(scales, 16, axis=1))
    low = (codes & 15).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    high = (codes >> 4).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scale = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert_exact(got, np.stack([low, high], axis=-1).reshape(1, -1) * scale)
    assert np.isnan(got[255]).all()
    assert not np.isnan(got[:255]).any()


def test_mxfp4_nibbles_are_low_then_high():
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, 3] = 0x2F  # low nibble 15 is -6, high nibble 2 is 1
    got = ops.mxfp4_dequantize(blocks, np.full((1, 1), 128, np.uint8))
    assert (got[0, 6], got[0, 7]) == (-12.0, 2.0)
    assert np.count_nonzero(got) == 2


def slow_mxfp4(block):
    """One block by the letter of the specification."""
    amax = max(abs(v) for v in block)
    shared = -127
    if amax > 0:
        shared = 0
        while 2.0 ** (shared + 1) <= amax:
            shared += 1
        while 2.0**shared > amax:
            shared -= 1
        shared = min(max(shared - 2, -127), 127)
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = []
    for v in block:
        x = abs(v) / 2.0**shared
        near = min(abs(x - g) for g in grid)
        code = min((c for c in range(8) if abs(x - grid[c]) == near), key=lambda c: c % 2)
        codes.append(code + 8 * (math.copysign(1.0, v) < 0))
    return codes, shared + 127


BLOCKS = {
    "normal": normal(32),
    "large": normal(32) * 1e30,
    "tiny": normal(32) * 1e-37,
    "subnormal": normal(32) * 1e-41,
    "zeros": np.zeros(32),
    "negative zeros": -np.zeros(32),
    "one value": np.eye(32)[5] * 0.3,
    "powers of two": 2.0 ** np.arange(-20, 12),
    "ties": np.array([4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -0.25, -5, -7.9] + [0.0] * 20),
    "just below a power": np.full(32, np.nextafter(4.0, 0)),
    "the largest bf16": np.full(32, 3.3895e38),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_mxfp4_encodes_by_the_specification(block):
    blocks, scales = ops.mxfp4_quantize(block)
    codes, scale = slow_mxfp4(block.tolist())
    assert scales.tolist() == [scale]
    assert [code for byte in blocks[0] for code in (byte & 15, byte >> 4)] == codes


def test_mxfp4_comes_back_by_value():
    blocks, scales = random_mxfp4(4, 16, 96, low=0, high=255)
    values = ops.mxfp4_dequantize(blocks, scales)
    again = ops.mxfp4_dequantize(*ops.mxfp4_quantize(values))
    assert_exact(again, values)
    assert_exact(np.signbit(again), np.signbit(values))


def test_int8_scale_is_the_smallest_bfloat16_that_covers():
    x = normal(64, 96, dtype=np.float32) * np.exp2(np.arange(-30, 34, dtype=np.float32))[:, None]
    x[3] = 0
    codes, scales = ops.int8_quantize(x)
    assert (codes.dtype, scales.dtype) == (np.int8, BF16)
    blocks = x.reshape(64, 3, 32).astype(np.float64)
    amax = np.abs(blocks).max(-1)
    wide = scales.astype(np.float64)
    below = (scales.view(np.uint16) - np.uint16(1)).view(BF16).astype(np.float64)
    assert (wide * 127 >= amax).all()
    assert ((below * 127 < amax) | (amax == 0)).all()
    assert np.abs(codes.astype(int)).max() <= 127
    error = np.abs(codes.reshape(64, 3, 32) * wide[..., None] - blocks)
    assert (error <= wide[..., None] / 2 * (1 + 1e-12)).all()
    assert (codes[3] == 0).all() and (wide[3] == 0).all()


def test_int8_rounds_ties_to_even():
    x = np.zeros((1, 32))
    x[0, :5] = [127.0, 0.5, 1.5, 2.5, -0.5]
    codes, scales = ops.int8_quantize(x)
    assert scales.astype(float).tolist() == [[1.0]]
    assert codes[0, :5].tolist() == [127, 0, 2, 2, 0]


@pytest.mark.parametrize("encode", [ops.mxfp4_quantize, ops.int8_quantize])
@pytest.mark.parametrize("wrong", [normal(2, 33), np.full((1, 32), np.nan), np.full((1, 32), -np.inf)])
def test_encoders_refuse(encode, wrong):
    with pytest.raises(ValueError, match="expected"):
        encode(wrong)


# Experts


def test_swiglu_clamps_gate_above_and_linear_on_both_sides():
    gate = np.array([-20.0, -1.0, 0.0, 2.0, 7.0, 9.0])
    lin = np.array([-9.0, -7.0, 0.0, 1.0, 7.0, 8.0])
    g = np.stack([gate, lin], axis=-1).reshape(1, 12)
    want = [
        min(a, 7.0) / (1 + math.exp(-1.702 * min(a, 7.0))) * (min(max(b, -7.0), 7.0) + 1)
        for a, b in zip(gate, lin, strict=True)
    ]
    same(ops.swiglu(g), [want])
    assert np.isfinite(ops.swiglu(np.full((1, 2), -1e308))).all()


def moe_inputs(tokens, experts, k, hidden, inner, seed=0):
    x = normal(tokens, hidden, seed=seed, dtype=np.float32)
    ids, weights = ops.expert_routing(normal(tokens, experts, seed=seed + 1), k)
    gate_up = random_mxfp4(experts, 2 * inner, hidden, seed=seed + 2)
    down = random_mxfp4(experts, hidden, inner, seed=seed + 3)
    gate_up_bias = normal(experts, 2 * inner, seed=seed + 4, dtype=BF16)
    down_bias = normal(experts, hidden, seed=seed + 5, dtype=BF16)
    return x, ids, weights, [*gate_up, gate_up_bias, *down, down_bias]


def torch_moe(x, ids, weights, w, alpha=1.702, limit=7.0):
    """Token by token, as the model card has it."""
    w1, w2 = t64(ops.mxfp4_dequantize(w[0], w[1])), t64(ops.mxfp4_dequantize(w[3], w[4]))
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for j, e in enumerate(ids[t].tolist()):
            g = w1[e] @ t64(x[t]) + t64(w[2][e])
            gate, lin = g[0::2].clamp(max=limit), g[1::2].clamp(-limit, limit)
            a = gate * torch.sigmoid(alpha * gate) * (lin + 1)
            out[t] += float(weights[t, j]) * (w2[e] @ a + t64(w[5][e]))
    return out


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 2), (32, 4)])
@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (96, 64)])
def test_moe(experts, k, tokens, hidden, inner):
    x, ids, weights, w = moe_inputs(tokens, experts, k, hidden, inner)
    want = torch_moe(x, ids, weights, w)
    same(ops.mxfp4_moe(x, ids, weights, *w), want)
    same(ops.mxfp4_moe(x, ids, weights, *w, residual=x, activations="bf16"), want + t64(x))


def test_moe_partial_sums_add_up():
    x, ids, weights, w = moe_inputs(7, 8, 4, 64, 32)
    whole = ops.mxfp4_moe(x, ids, weights, *w)
    parts = [
        ops.mxfp4_moe(x, ids, weights, *(a[first:last] for a in w), first_expert=first)
        for first, last in ((0, 3), (3, 4), (4, 8))
    ]
    same(sum(parts), whole)
    assert all(np.abs(part).max() > 0 for part in parts)


def test_moe_takes_its_constants():
    x, ids, weights, w = moe_inputs(3, 4, 2, 32, 32)
    got = ops.mxfp4_moe(x, ids, weights, *w, swiglu_alpha=1.0, swiglu_limit=0.5)
    same(got, torch_moe(x, ids, weights, w, alpha=1.0, limit=0.5))


def swapped_nibbles(w):
    return [(w[0] >> 4) | (w[0] << 4), *w[1:]]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, i, p, w: (x, i, p, swapped_nibbles(w)),
        lambda x, i, p, w: (x, (i + 1) % 5, p, w),
        lambda x, i, p, w: (x, i[:, ::-1], p, w),
        lambda x, i, p, w: (x, i, p, [*w[:2], w[2] * 0, *w[3:]]),
        lambda x, i, p, w: (x, i, p, [*w[:5], w[5] * 0]),
        lambda x, i, p, w: (x, i, p * 0 + 0.5, w),
        lambda x, i, p, w: (
            x,
            i,
            p,
            [w[0].reshape(5, 2, 32, 2, 16).swapaxes(1, 2).reshape(w[0].shape), *w[1:]],
        ),
    ],
    ids=["nibbles", "expert", "weights", "first bias", "second bias", "equal weights", "gate and linear"],
)
def test_moe_mistakes_are_seen(wrong):
    x, ids, weights, w = moe_inputs(4, 5, 2, 64, 32)
    want = torch_moe(x, ids, weights, w)
    with pytest.raises(AssertionError):
        same(ops.mxfp4_moe(*(y := wrong(x, ids, weights, w))[:3], *y[3]), want)


def test_ops_have_the_signatures_of_the_kernels():
    # `isa` and `num_threads` choose among kernels; swiglu is a part of the experts' kernels.
    assert set(fast.__all__) - {"isa", "num_threads"} == set(ops.__all__) - {"swiglu"}
    for name in set(ops.__all__) - {"swiglu"}:
        want = inspect.signature(getattr(fast, name)).parameters.values()
        got = inspect.signature(getattr(ops, name)).parameters.values()
        assert [(p.name, p.kind) for p in got] == [(p.name, p.kind) for p in want], name
