"""One transformer layer of gpt-oss's kind on NumPy arrays alone, checked against plain NumPy in float64.

Run: python examples/numpy_only.py
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np

from mxmoe import ops

NUM_TOKENS, HIDDEN_SIZE, INTERMEDIATE_SIZE = 7, 64, 96
NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SLIDING_WINDOW = 4, 2, 16, 4
BLOCK_SIZE, NUM_BLOCKS = 4, 2

rng = np.random.default_rng(0)


def random_weight(*shape):
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def attention(x, qkv_weight, sinks):
    """Attention over a sequence that begins here, through mxmoe."""
    qkv = ops.linear(x, qkv_weight, activations="float32")
    qkv = qkv.reshape(NUM_TOKENS, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
    q, k, v = np.split(qkv, [NUM_HEADS, NUM_HEADS + NUM_KV_HEADS], axis=1)

    inv_freq, scaling = ops.rope_inv_freq(HEAD_DIM, 150000.0, factor=32.0)
    cos, sin = ops.rope_cos_sin(np.arange(NUM_TOKENS), inv_freq, scaling)
    q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)

    # A paged cache: the sequence's places 0-3 lie in block 1, places 4-7 in block 0.
    cache = np.zeros((2, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.float32)
    block_table = np.array([[1, 0]], np.int32)
    places = np.arange(NUM_TOKENS)
    slots = block_table[0, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
    ops.kv_cache_write(k, v, cache[0], cache[1], slots)
    y = ops.sink_attention(
        q,
        cache[0],
        cache[1],
        sinks,
        block_table=block_table,
        cu_seqlens=np.array([0, NUM_TOKENS], np.int32),
        seq_lens=np.array([NUM_TOKENS], np.int32),
        sm_scale=HEAD_DIM**-0.5,
        sliding_window=SLIDING_WINDOW,
    )
    return y, (q, k, v)


def plain_attention(q, k, v, sinks):
    """The same in NumPy: softmax with one more logit, the sink, that has no value."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    k, v = (a.repeat(NUM_HEADS // NUM_KV_HEADS, axis=1) for a in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * HEAD_DIM**-0.5
    distance = np.arange(NUM_TOKENS)[:, None] - np.arange(NUM_TOKENS)
    scores[:, (distance < 0) | (distance >= SLIDING_WINDOW)] = -np.inf
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(sinks.astype(np.float64))[:, None, None]
    return np.einsum("hij,jhd->ihd", weights, v)


def decode(blocks, scales):
    """MXFP4 to float64, by ml_dtypes: two codes a byte, the low one first; one power of two for 32 of them."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return (values * factors[..., None]).reshape(*scales.shape[:-1], -1)


def plain_moe(x, router_logits, gate_up, gate_up_bias, down, down_bias):
    """The mixture in NumPy, token by token."""
    y = x.astype(np.float64)
    for token, logits in enumerate(router_logits.astype(np.float64)):
        chosen = np.argsort(-logits)[:EXPERTS_PER_TOKEN]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for expert, share in zip(chosen, shares, strict=True):
            g = gate_up[expert] @ x[token] + gate_up_bias[expert]
            gate, up = np.minimum(g[0::2], 7.0), np.clip(g[1::2], -7.0, 7.0)
            activated = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            y[token] += share * (down[expert] @ activated + down_bias[expert])
    return y


def check(what, got, want, tolerance):
    error = np.abs(got - want).max() / np.abs(want).max()
    ok = bool(error < tolerance)
    print(f"{what:28} largest error {error:.1e}  {'ok' if ok else 'WRONG'}")
    return ok


def main():
    x = rng.standard_normal((NUM_TOKENS, HIDDEN_SIZE), np.float32)
    qkv_weight = random_weight((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, HIDDEN_SIZE).astype(ml_dtypes.bfloat16)
    sinks = rng.standard_normal(NUM_HEADS, np.float32)
    y, qkv = attention(ops.rmsnorm(x, np.ones(HIDDEN_SIZE, np.float32)), qkv_weight, sinks)
    ok = check("attention", y, plain_attention(*qkv, sinks), 1e-5)

    gate_up = ops.mxfp4_quantize(random_weight(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE))
    down = ops.mxfp4_quantize(random_weight(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE))
    gate_up_bias, down_bias = (
        random_weight(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE),
        random_weight(NUM_EXPERTS, HIDDEN_SIZE),
    )
    router_logits = rng.standard_normal((NUM_TOKENS, NUM_EXPERTS), np.float32)
    want = plain_moe(x, router_logits, decode(*gate_up), gate_up_bias, decode(*down), down_bias)
    topk_ids, topk_weights = ops.expert_routing(router_logits, EXPERTS_PER_TOKEN)
    # What activations are rounded to: nothing, bfloat16, or int8 by blocks of 32.
    for activations, tolerance in (("float32", 1e-5), ("bf16", 1e-2), ("int8", 2e-2)):
        y = ops.mxfp4_moe(
            x, topk_ids, topk_weights, *gate_up, gate_up_bias, *down, down_bias, activations=activations, residual=x
        )
        ok = check(f"mixture of experts, {activations}", y, want, tolerance) and ok
    print("ok" if ok else "FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
