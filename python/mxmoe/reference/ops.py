"""The ops in float64 NumPy, each written from its formula.

Inputs may have any floating-point dtype, including `ml_dtypes.bfloat16`; they are widened exactly and results
are float64. `out=` takes an array of any dtype, which is filled and returned. Arguments that only steer
speed or rounding of the kernels (`activations`, `dtype`) are accepted and change nothing.

Sources: the gpt-oss model card (arXiv 2508.10925); YaRN (arXiv 2309.00071); the OCP Microscaling Formats (MX)
specification v1.0, sections 5 and 6.3.

The file is long because every op states its contract, as in `mxmoe.ops`, whose signatures it mirrors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "embedding",
    "expert_offsets",
    "expert_routing",
    "int8_quantize",
    "kv_cache_write",
    "linear",
    "linear_group",
    "mxfp4_dequantize",
    "mxfp4_moe",
    "mxfp4_quantize",
    "rmsnorm",
    "rope",
    "rope_cos_sin",
    "rope_inv_freq",
    "sink_attention",
    "swiglu",
]

Array: TypeAlias = NDArray[Any]
Float: TypeAlias = NDArray[np.float64]

# Magnitudes of e2m1 (1 sign, 2 exponent, 1 mantissa bit) in the order of their codes.
E2M1_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_VALUES = np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES])
E8M0_BIAS = 127
E8M0_NAN = 255
BLOCK = 32
# Exponent of the largest e2m1 magnitude, 6 = 1.5 * 2^2.
E2M1_EMAX = 2
# Rows of a large dense matrix that are widened to float64 at a time (the published lm_head would take 4.6
# GB).
_ROWS = 4096


def _f64(x: ArrayLike) -> Float:
    return np.asarray(x).astype(np.float64)


def _finish(result: Array, residual: ArrayLike | None = None, out: Array | None = None) -> Array:
    if residual is not None:
        result = _f64(residual) + result
    if out is None:
        return result
    out[...] = result.astype(out.dtype)
    return out


def embedding(token_ids: ArrayLike, weight: Array, *, out: Array | None = None) -> Array:
    """Look up rows: ``out[t] = weight[token_ids[t]]``.

    Parameters
    ----------
    token_ids : (T,) int
    weight : (V, H) float

    Returns
    -------
    (T, H) float64
    """
    return _finish(_f64(weight[np.asarray(token_ids)]), out=out)


def rmsnorm(x: ArrayLike, weight: ArrayLike, eps: float = 1e-5, *, out: Array | None = None) -> Array:
    """Root-mean-square normalisation: ``x / sqrt(mean(x^2) + eps) * weight`` over the last axis.

    Parameters
    ----------
    x : (T, H) float
    weight : (H,) float
    eps : float

    Returns
    -------
    (T, H) float64
    """
    x = _f64(x)
    return _finish(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * _f64(weight), out=out)


def rope_inv_freq(
    head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_max_position_embeddings: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = False,
) -> tuple[Float, float]:
    """Angular frequencies of the rotary embedding, stretched by YaRN's "NTK by parts".

    Dimension pair i turns by ``theta^(-2i/D)`` a token. Pairs that turn more than `beta_fast` times over the
    original context are kept, pairs that turn less than `beta_slow` times are slowed down by `factor`, and
    those between are blended linearly in i. `truncate` rounds the blend's ends outwards to whole pairs.

    Returns
    -------
    inv_freq : (head_dim / 2,) float64
        Radians a token.
    attention_scaling : float
        Multiplies cosine and sine: ``0.1 ln(factor) + 1``, or 1 without stretching.
    """
    inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if factor <= 1.0:
        return inv_freq, 1.0

    def pair_that_turns(rotations: float) -> float:
        wavelength = original_max_position_embeddings / (2 * math.pi * rotations)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the published blend at coinciding ends: a step
    slowed = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return inv_freq * (1 - slowed) + inv_freq / factor * slowed, 0.1 * math.log(factor) + 1.0


def rope_cos_sin(positions: ArrayLike, inv_freq: ArrayLike, scaling: float = 1.0) -> tuple[Float, Float]:
    """Cosine and sine of every position's angles, times `scaling`.

    Parameters
    ----------
    positions : (T,) int
    inv_freq : (D / 2,) float
    scaling : float

    Returns
    -------
    cos, sin : (T, D / 2) float64
    """
    angles = np.outer(_f64(positions), _f64(inv_freq))
    return np.cos(angles) * scaling, np.sin(angles) * scaling


def rope(x: ArrayLike, cos: ArrayLike, sin: ArrayLike, *, out: Array | None = None) -> Array:
    """Rotate the half-split pairs ``(x[i], x[i + D/2])`` of every head.

    Parameters
    ----------
    x : (T, heads, D) float
    cos, sin : (T, D / 2) float

    Returns
    -------
    (T, heads, D) float64
    """
    first, second = np.split(_f64(x), 2, axis=-1)
    c, s = _f64(cos)[:, None, :], _f64(sin)[:, None, :]
    return _finish(np.concatenate([first * c - second * s, second * c + first * s], axis=-1), out=out)


def linear(
    x: ArrayLike,
    weight: Array,
    bias: ArrayLike | None = None,
    *,
    scales: Array | None = None,
    activations: str = "float32",
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Dense layer: ``residual + x @ weight.T + bias``.

    Parameters
    ----------
    x : (T, K) float
    weight : (N, K) bfloat16, float32 or int8
    bias : (N,) float, optional
    scales : (N, K / 32) float, optional
        With an int8 weight: element ``[n, k]`` is ``weight[n, k] * scales[n, k // 32]``.
    residual : (T, N) float, optional

    Returns
    -------
    (T, N) float64
    """
    x = _f64(x)
    result = np.empty((x.shape[0], weight.shape[0]))
    for start in range(0, weight.shape[0], _ROWS):
        rows = _f64(weight[start : start + _ROWS])
        if scales is not None:
            rows *= np.repeat(_f64(scales[start : start + _ROWS]), BLOCK, axis=1)
        result[:, start : start + _ROWS] = x @ rows.T
    if bias is not None:
        result += _f64(bias)
    return _finish(result, residual, out)


def linear_group(
    x: ArrayLike,
    layers: Sequence[tuple[Array, Array | None, Array | None]],
    *,
    activations: str = "float32",
    out: Array | None = None,
) -> Array:
    """Dense layers of the same input, side by side.

    Parameters
    ----------
    x : (T, K) float
    layers : sequence of (weight, scales, bias)
        As in `linear`.

    Returns
    -------
    (T, sum of N) float64
    """
    results = [linear(x, weight, bias, scales=scales) for weight, scales, bias in layers]
    return _finish(np.concatenate(results, axis=1), None, out)


def expert_routing(router_logits: ArrayLike, experts_per_token: int) -> tuple[NDArray[np.int32], Float]:
    """Choose the experts with the largest logits and weigh them by a softmax over the chosen.

    Parameters
    ----------
    router_logits : (T, E) float
    experts_per_token : int

    Returns
    -------
    topk_ids : (T, k) int32
        In descending order of logit; among equal logits the lower expert comes first.
    topk_weights : (T, k) float64
        Rows sum to 1.
    """
    logits = _f64(router_logits)
    # A stable sort of the negated logits keeps equal ones in order of expert.
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :experts_per_token]
    chosen = np.take_along_axis(logits, ids, axis=1)
    return ids.astype(np.int32), _softmax(chosen)


def _softmax(x: Float) -> Float:
    e = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def expert_offsets(topk_ids: ArrayLike, num_experts: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Group the (token, choice) pairs by expert.

    Parameters
    ----------
    topk_ids : (T, k) int
    num_experts : int

    Returns
    -------
    offsets : (num_experts + 1,) int32
        Pairs of expert e are ``order[offsets[e]:offsets[e + 1]]``.
    order : (T * k,) int32
        Indices into the flattened pairs, sorted by expert and, within an expert, by index.
    """
    flat = np.asarray(topk_ids).reshape(-1)
    order = np.argsort(flat, kind="stable")
    offsets = np.searchsorted(flat[order], np.arange(num_experts + 1))
    return offsets.astype(np.int32), order.astype(np.int32)


def mxfp4_dequantize(blocks: Array, scales: Array, *, dtype: str = "float64") -> Float:
    """Decode MXFP4: value ``e2m1[code] * 2^(scale - 127)``.

    In byte j of a block the low nibble is value 2j, the high nibble value 2j + 1.

    Parameters
    ----------
    blocks : (..., K / 32, 16) uint8
    scales : (..., K / 32) uint8

    Returns
    -------
    (..., K) float64
        NaN where the scale byte is 255. Exact otherwise.
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    scale = np.ldexp(1.0, scales.astype(np.int32) - E8M0_BIAS)
    scale = np.where(scales == E8M0_NAN, np.nan, scale)
    values = E2M1_VALUES[codes] * scale[..., None]
    return np.asarray(values.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK))


def mxfp4_quantize(x: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Encode as MXFP4 by the conversion of the MX specification (section 6.3).

    The shared exponent of a block is ``floor(log2(max |x|)) - 2``, clamped to e8m0's range of -127 to 127;
    elements round to the nearest e2m1 value, ties to the even code, and saturate at 6. A block of zeros has
    no logarithm and takes the smallest exponent, scale byte 0. The sign of zero is kept.

    Parameters
    ----------
    x : (..., K) float
        K a multiple of 32; finite.

    Returns
    -------
    blocks : (..., K / 32, 16) uint8
    scales : (..., K / 32) uint8

    Raises
    ------
    ValueError
        When K is not a multiple of 32 or a value is not finite.
    """
    x = _f64(x)
    if x.shape[-1] % BLOCK:
        raise ValueError(f"x has {x.shape[-1]} columns, expected a multiple of {BLOCK}")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or infinity, expected finite values")
    x = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    amax = np.abs(x).max(axis=-1)
    # frexp gives amax = m * 2^e with m in [0.5, 1), so floor(log2(amax)) = e - 1 without rounding.
    exponent = np.where(amax > 0, np.frexp(amax)[1] - 1 - E2M1_EMAX, -E8M0_BIAS)
    scales = np.clip(exponent + E8M0_BIAS, 0, 254).astype(np.uint8)
    magnitude = np.ldexp(np.abs(x), E8M0_BIAS - scales.astype(np.int32)[..., None])
    # Code c begins at the midpoint below its value; a tie goes to the even one of its two neighbours.
    midpoints = (E2M1_MAGNITUDES[:-1] + E2M1_MAGNITUDES[1:]) / 2
    below = np.searchsorted(midpoints, magnitude, side="left")
    tie = np.isin(magnitude, midpoints)
    codes = np.where(tie & (below % 2 == 1), below + 1, below)
    codes = (codes | np.where(np.signbit(x), 8, 0)).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def int8_quantize(x: ArrayLike) -> tuple[NDArray[np.int8], Array]:
    """Encode as int8 with one bfloat16 scale for every 32 values along the last axis.

    ``scale`` is the smallest bfloat16 that is at least ``max |x| / 127``, so that no code passes 127;
    ``code`` is ``x / scale`` rounded to the nearest integer, ties to even. A block of zeros has scale 0 and
    codes 0.

    Parameters
    ----------
    x : (N, K) float
        K a multiple of 32; finite.

    Returns
    -------
    codes : (N, K) int8
    scales : (N, K / 32) bfloat16

    Raises
    ------
    ValueError
        When K is not a multiple of 32 or a value is not finite.
    """
    x = _f64(x)
    if x.shape[-1] % BLOCK:
        raise ValueError(f"x has {x.shape[-1]} columns, expected a multiple of {BLOCK}")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or infinity, expected finite values")
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    amax = np.abs(blocks).max(axis=-1)
    # Drop the low bits of the float32 quotient to go down to a bfloat16, then step up until 127 scales cover
    # amax: the product of 8 significant bits and 7 is exact, so the comparison is too.
    bits = (amax / 127).astype(np.float32).view(np.uint32) >> 16
    scale = bits.astype(np.uint16).view(ml_dtypes.bfloat16)
    up = (bits + 1).astype(np.uint16).view(ml_dtypes.bfloat16)
    scale = np.where(_f64(scale) * 127 < amax, up, scale)
    wide = _f64(scale)[..., None]
    codes = np.rint(np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide > 0))
    return codes.astype(np.int8).reshape(x.shape), scale


def swiglu(g: ArrayLike, alpha: float = 1.702, limit: float = 7.0) -> Float:
    """Clamped SwiGLU of interleaved rows: even ones gate, odd ones are linear.

    ``gate * sigmoid(alpha * gate) * (linear + 1)`` with ``gate = min(g_even, limit)`` and
    ``linear = clip(g_odd, -limit, limit)``.

    Parameters
    ----------
    g : (..., 2 I) float

    Returns
    -------
    (..., I) float64
    """
    g = _f64(g)
    gate, lin = np.minimum(g[..., 0::2], limit), np.clip(g[..., 1::2], -limit, limit)
    # sigmoid(z) = (1 + tanh(z / 2)) / 2, which does not overflow.
    return np.asarray(gate * (0.5 + 0.5 * np.tanh(0.5 * alpha * gate)) * (lin + 1.0))


def mxfp4_moe(
    x: ArrayLike,
    topk_ids: ArrayLike,
    topk_weights: ArrayLike,
    gate_up_blocks: Array,
    gate_up_scales: Array,
    gate_up_bias: Array,
    down_blocks: Array,
    down_scales: Array,
    down_bias: Array,
    *,
    activations: str = "float32",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    first_expert: int = 0,
    foldable_scales: bool = False,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Weighted sum of every token's experts.

    ``y_t = residual_t + sum_j w_tj (W2_e swiglu(W1_e x_t + b1_e) + b2_e)`` with ``e = topk_ids[t, j]``.
    Experts outside ``first_expert .. first_expert + E - 1`` are held elsewhere and contribute nothing.

    Parameters
    ----------
    x : (T, H) float
    topk_ids : (T, k) int
    topk_weights : (T, k) float
    gate_up_blocks, gate_up_scales, gate_up_bias : (E, 2I, H/32, 16) uint8, (E, 2I, H/32) uint8, (E, 2I) float
    down_blocks, down_scales, down_bias : (E, H, I/32, 16) uint8, (E, H, I/32) uint8, (E, H) float
    foldable_scales : bool
        Taken for the sake of `mxmoe.ops`; no matter here.
    residual : (T, H) float, optional

    Returns
    -------
    (T, H) float64
    """
    x, ids, weights = _f64(x), np.asarray(topk_ids), _f64(topk_weights)
    result = np.zeros_like(x)
    # Only the experts that are used are decoded: one of the published size takes 200 MB in float64.
    for expert in np.unique(ids):
        e = int(expert) - first_expert
        if not 0 <= e < gate_up_blocks.shape[0]:
            continue
        tokens, choices = np.nonzero(ids == expert)
        up = x[tokens] @ mxfp4_dequantize(gate_up_blocks[e], gate_up_scales[e]).T + _f64(gate_up_bias[e])
        hidden = swiglu(up, swiglu_alpha, swiglu_limit)
        y = hidden @ mxfp4_dequantize(down_blocks[e], down_scales[e]).T + _f64(down_bias[e])
        np.add.at(result, tokens, weights[tokens, choices, None] * y)
    return _finish(result, residual, out)


def kv_cache_write(
    k: ArrayLike,
    v: ArrayLike,
    k_cache: Array,
    v_cache: Array,
    slots: ArrayLike,
    *,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
) -> None:
    """Store new keys and values in a paged cache, in place.

    Token t goes to block ``slots[t] // block_size``, place ``slots[t] % block_size``. An int8 cache holds
    ``rint(x / scale)`` with one float32 ``scale = max |x| / 127`` for each token and head (0 for a row of
    zeros).

    Parameters
    ----------
    k, v : (T, Hkv, D) float
    k_cache, v_cache : (num_blocks, Hkv, block_size, D) float32, bfloat16 or int8
    slots : (T,) int64
    k_scales, v_scales : (num_blocks, Hkv, block_size) float32, optional
        Required by an int8 cache.
    """
    block, place = np.divmod(np.asarray(slots), k_cache.shape[2])
    for rows, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        wide = _f64(rows)
        if scales is not None:
            scale = (np.abs(wide).max(axis=-1) / 127).astype(np.float32)
            divisor = np.where(scale > 0, scale, 1).astype(np.float64)[..., None]
            wide = np.clip(np.rint(wide / divisor), -127, 127)
            scales[block, :, place] = scale
        cache[block, :, place] = wide.astype(cache.dtype)


def sink_attention(
    q: ArrayLike,
    k_cache: Array,
    v_cache: Array,
    sinks: ArrayLike,
    *,
    block_table: ArrayLike,
    cu_seqlens: ArrayLike,
    seq_lens: ArrayLike,
    sm_scale: float,
    sliding_window: int | None = None,
    key_starts: ArrayLike | None = None,
    activations: str = "float32",
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    sink_share: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Causal grouped-query attention with a learned sink in every head's softmax, over a paged cache.

    Query i of sequence b sits at position ``seq_lens[b] - n_b + i``, n_b its number of queries, and sees the
    keys j up to its own position for which ``position - j < sliding_window``. With ``s_j = sm_scale q.k_j``,
    key j has the weight ``exp(s_j) / (sum exp(s) + exp(sink))``.

    Parameters
    ----------
    q : (T, Hq, D) float
        Queries of all sequences, one after another.
    k_cache, v_cache : (num_blocks, Hkv, block_size, D) float or int8
    sinks : (Hq,) float
    block_table : (B, max_blocks) int32
        Block that holds places ``i * block_size ...`` of sequence b; only blocks with visible keys are read.
    cu_seqlens : (B + 1,) int32
        Sequence b owns the queries ``cu_seqlens[b]:cu_seqlens[b + 1]``.
    seq_lens : (B,) int32
        Keys of each sequence, the new ones included.
    sm_scale : float
    sliding_window : int, optional
        Keys a query sees, its own included; None or 0 for all.
    key_starts : (B,) int32, optional
        Place of the key at position 0; queries before it, at negative positions, give 0.
    k_scales, v_scales : (num_blocks, Hkv, block_size) float32, optional
        Scales of an int8 cache.
    sink_share : (T, Hq) array, optional
        Filled with the share of the softmax that went to the sink.

    Returns
    -------
    (T, Hq, D) float64
    """
    q, sinks = _f64(q), _f64(sinks)
    table, cu, lens = np.asarray(block_table), np.asarray(cu_seqlens), np.asarray(seq_lens)
    starts = np.zeros(len(lens), np.int64) if key_starts is None else np.asarray(key_starts)
    block_size, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    result = np.zeros(q.shape)

    def gather(cache: Array, scales: Array | None, block: Array, place: Array) -> Float:
        rows = _f64(cache[block, :, place])
        return rows if scales is None else rows * _f64(scales[block, :, place])[..., None]

    for b in range(len(lens)):
        for t in range(int(cu[b]), int(cu[b + 1])):
            position = int(lens[b]) - int(cu[b + 1]) + t
            first = max(0, position - sliding_window + 1) if sliding_window else 0
            page, place = np.divmod(int(starts[b]) + np.arange(first, position + 1), block_size)
            keys = np.repeat(gather(k_cache, k_scales, table[b, page], place), group, axis=1)
            values = np.repeat(gather(v_cache, v_scales, table[b, page], place), group, axis=1)
            scores = np.einsum("hd,jhd->hj", q[t], keys) * sm_scale
            logits = np.concatenate([scores, sinks[:, None]], axis=1)
            # Before the first key there is the sink alone, or nothing at all.
            weights = _softmax(logits) if position >= 0 else (logits > -np.inf).astype(np.float64)
            result[t] = np.einsum("hj,jhd->hd", weights[:, :-1], values)
            if sink_share is not None:
                sink_share[t] = weights[:, -1].astype(sink_share.dtype)
    return _finish(result, out=out)
