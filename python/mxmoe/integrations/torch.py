"""The ops of `mxmoe.ops` for PyTorch: custom operators with gradients, for eager code and ``torch.compile`` alike.

The functions carry the names, parameters and results of `mxmoe.ops`, whose docstrings say what is computed and
rounded. What is added here:

- They are ``torch.library`` operators (``torch.ops.mxmoe.*``), so ``torch.compile(fullgraph=True)`` takes them as
  they are, with static and dynamic shapes, and they read and write the tensors' own memory.
- They have gradients where it is said. Those are made in float32, whatever the inputs' dtypes, and come in the dtype
  of what they belong to. Where an op rounds activations, the gradient passes straight through: it is that of the same
  op with ``activations="float32"``, and exact there. Quantised weights are frozen. There are no second derivatives.
- Activations with odd strides are made contiguous; weights, caches and outputs must be as `mxmoe.ops` wants them,
  since a copy of those would cost more than it is worth. Small integer arrays may be int32 or int64.
- `sink_attention_bhsd` is attention on ordinary (batch, heads, sequence, head_dim) tensors.

PyTorch 2.4 or newer. Tensors lie in CPU memory, or on a CUDA device for what `mxmoe.cuda` has (on torch's current
stream; gradients of experts and attention are computed on the CPU alone). They are float32 or bfloat16; float16 is a
TypeError, since no kernel computes in it and a conversion would better be seen. Other errors are those of `mxmoe.ops`
and a ValueError where a gradient is asked for that there is none of.

The file is long because every op's contract stands in its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("mxmoe.integrations.torch needs PyTorch; install it with: pip install torch") from error

if not hasattr(torch.library, "custom_op"):
    raise ImportError(f"mxmoe.integrations.torch needs PyTorch 2.4 or newer; found {torch.__version__}")

from mxmoe.integrations import _torch_attention_ops as _attention
from mxmoe.integrations import _torch_ops as _ops
from mxmoe.ops import Activations

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
    "sink_attention",
    "sink_attention_bhsd",
]


def _no_gradient(why: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{why}; wanted inputs without gradients: detach them or use torch.no_grad()")


def embedding(token_ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Look token ids up in the embedding matrix.

    Parameters
    ----------
    token_ids : Tensor, shape (num_tokens,), int32 or int64
    weight : Tensor, shape (vocab_size, hidden_size), bfloat16 or float32
        Has a gradient: dense, rows of the tokens filled.
    out : Tensor, shape (num_tokens, hidden_size), float32, optional
        Without gradients only, here and everywhere.

    Returns
    -------
    Tensor, shape (num_tokens, hidden_size), float32
    """
    if out is None:
        return _ops.embedding(token_ids, weight)
    _no_gradient("out has no gradient", weight)
    torch.ops.mxmoe.embedding_out(token_ids, weight, out)
    return out


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, out: Tensor | None = None) -> Tensor:
    """Root mean square layer normalisation by row.

    Parameters
    ----------
    x : Tensor, shape (num_tokens, hidden_size), float32 or bfloat16
        Has a gradient.
    weight : Tensor, shape (hidden_size,), float32 or bfloat16
        Has a gradient.
    eps : float
    out : Tensor, shape of `x`, float32 or bfloat16, optional

    Returns
    -------
    Tensor, shape and dtype of `x`
    """
    if out is None:
        return _ops.rmsnorm(x, weight, eps)
    _no_gradient("out has no gradient", x, weight)
    torch.ops.mxmoe.rmsnorm_out(x, weight, eps, out)
    return out


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotations at given positions.

    Parameters
    ----------
    positions : Tensor, shape (num_tokens,), int32 or int64
    inv_freq : Tensor, shape (head_dim // 2,), float64
        As of `mxmoe.ops.rope_inv_freq`, through ``torch.from_numpy``.
    scaling : float

    Returns
    -------
    cos, sin : Tensor, shape (num_tokens, head_dim // 2), float32
    """
    return _ops.rope_cos_sin(positions, inv_freq, scaling)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rotary position embedding, half-split.

    Parameters
    ----------
    x : Tensor, shape (num_tokens, num_heads, head_dim), float32 or bfloat16
        Has a gradient.
    cos, sin : Tensor, shape (num_tokens, head_dim // 2), float32
    out : Tensor, shape of `x`, float32 or bfloat16, optional

    Returns
    -------
    Tensor, shape and dtype of `x`
    """
    if out is None:
        return _ops.rope(x, cos, sin)
    _no_gradient("out has no gradient", x, cos, sin)
    torch.ops.mxmoe.rope_out(x, cos, sin, out)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activations: Activations = "bf16",
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Dense layer: ``x @ weight.T + bias + residual``.

    Parameters
    ----------
    x : Tensor, shape (num_tokens, in_features), float32 or bfloat16
        Has a gradient.
    weight : Tensor, shape (out_features, in_features), bfloat16 or int8
        Has a gradient when it is bfloat16 and as stored; may be packed, as in `mxmoe.ops.linear`.
    bias : Tensor, shape (out_features,), bfloat16 or float32, optional
        Has a gradient.
    scales : Tensor, shape (out_features, in_features // 32), bfloat16
        With int8 weights only.
    activations : {"float32", "bf16", "int8"}
    residual : Tensor, shape (num_tokens, out_features), float32, optional
        Has a gradient.
    out : Tensor, shape (num_tokens, out_features), float32, optional

    Returns
    -------
    Tensor, shape (num_tokens, out_features), float32
    """
    inputs = (x, weight, bias, scales, activations, residual)
    if out is None:
        return _ops.linear(*inputs)
    _no_gradient("out has no gradient", x, weight, bias, scales, residual)
    torch.ops.mxmoe.linear_out(*inputs, out)
    return out


def linear_group(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor | None]],
    *,
    activations: Activations = "bf16",
    out: Tensor | None = None,
) -> Tensor:
    """Several dense layers of the same input, their results side by side.

    Gives what `linear` gives for each, to the last bit, in one go; where a gradient is wanted, by `linear` itself.

    Parameters
    ----------
    x : Tensor, shape (num_tokens, in_features), float32 or bfloat16
        Has a gradient.
    layers : sequence of (weight, scales, bias)
        As in `linear`, with the same gradients; scales and bias may be None.
    activations : {"float32", "bf16", "int8"}
    out : Tensor, shape (num_tokens, sum of out_features), float32, optional

    Returns
    -------
    Tensor, shape (num_tokens, sum of out_features), float32
    """
    tensors = [x, *(t for layer in layers for t in layer)]
    if out is not None:
        _no_gradient("out has no gradient", *tensors)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return torch.cat([linear(x, w, b, scales=s, activations=activations) for w, s, b in layers], dim=1)
    weights, scales, biases = ([layer[i] for layer in layers] for i in range(3))
    if out is None:
        return _ops.linear_group(x, weights, scales, biases, activations)
    torch.ops.mxmoe.linear_group_out(x, weights, scales, biases, activations, out)
    return out


def expert_offsets(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the (token, choice) pairs by expert, stably.

    Parameters
    ----------
    topk_ids : Tensor, shape (num_tokens, experts_per_token), int32 or int64
        Within [0, num_experts).
    num_experts : int

    Returns
    -------
    expert_offsets : Tensor, shape (num_experts + 1,), int32
        Expert e owns ``order[expert_offsets[e]:expert_offsets[e + 1]]``.
    order : Tensor, shape (num_tokens * experts_per_token,), int32
        Pairs, as ``token * experts_per_token + choice``.
    """
    return _ops.expert_offsets(topk_ids, num_experts)


def expert_routing(router_logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token.

    Parameters
    ----------
    router_logits : Tensor, shape (num_tokens, num_experts), float32
        Has a gradient, through the weights.
    experts_per_token : int

    Returns
    -------
    topk_ids : Tensor, shape (num_tokens, experts_per_token), int32
    topk_weights : Tensor, shape (num_tokens, experts_per_token), float32
        Softmax over the chosen alone.
    """
    return _ops.expert_routing(router_logits, experts_per_token)


def mxfp4_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    *,
    activations: Activations = "bf16",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    first_expert: int = 0,
    foldable_scales: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mixture of experts on MXFP4 weights: two grouped products around a clamped SwiGLU.

    The backward pass decodes one expert at a time, and only for the tokens that chose it.

    Parameters
    ----------
    x : Tensor, shape (num_tokens, hidden_size), float32 or bfloat16
        Has a gradient.
    topk_ids : Tensor, shape (num_tokens, experts_per_token), int32 or int64
    topk_weights : Tensor, shape (num_tokens, experts_per_token), float32 or bfloat16
        Has a gradient.
    gate_up_blocks : Tensor, shape (num_experts, 2 * intermediate_size, hidden_size // 32, 16), uint8
    gate_up_scales : Tensor, shape (num_experts, 2 * intermediate_size, hidden_size // 32), uint8
        Blocks and scales of both matrices may also be packed.
    gate_up_bias : Tensor, shape (num_experts, 2 * intermediate_size), bfloat16 or float32
        Has a gradient.
    down_blocks : Tensor, shape (num_experts, hidden_size, intermediate_size // 32, 16), uint8
    down_scales : Tensor, shape (num_experts, hidden_size, intermediate_size // 32), uint8
    down_bias : Tensor, shape (num_experts, hidden_size), bfloat16 or float32
        Has a gradient.
    activations : {"float32", "bf16", "int8"}
    swiglu_alpha, swiglu_limit : float
    first_expert : int
    foldable_scales : bool
        Whether every scale is known to be 2 to 128, which `mxmoe.cuda.scales_are_foldable` tells, once for the same
        weights: the kernels for Hopper GPUs need it, and a wrong word gives wrong results there. Of no meaning on
        the CPU.
    residual : Tensor, shape (num_tokens, hidden_size), float32, optional
        Has a gradient.
    out : Tensor, shape (num_tokens, hidden_size), float32, optional

    Returns
    -------
    Tensor, shape (num_tokens, hidden_size), float32
    """
    weights = (gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias)
    options = (activations, swiglu_alpha, swiglu_limit, first_expert, foldable_scales)
    inputs = (x, topk_ids, topk_weights, *weights, residual, *options)
    if out is None:
        return _ops.mxfp4_moe(*inputs)
    _no_gradient("out has no gradient", x, topk_weights, gate_up_bias, down_bias, residual)
    torch.ops.mxmoe.mxfp4_moe_out(*inputs, out)
    return out


def kv_cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into a paged cache, in place. Without gradients only.

    Parameters
    ----------
    k, v : Tensor, shape (num_tokens, num_key_value_heads, head_dim), float32 or bfloat16
    k_cache, v_cache : Tensor, shape (num_blocks, num_key_value_heads, block_size, head_dim)
        float32, bfloat16 or int8; written.
    slots : Tensor, shape (num_tokens,), int32 or int64
        ``block * block_size + offset``.
    k_scales, v_scales : Tensor, shape (num_blocks, num_key_value_heads, block_size), float32
        With an int8 cache only; written.
    """
    _no_gradient("what is written into a cache has no gradient", k, v, k_cache, v_cache)
    _attention.kv_cache_write(k, v, k_cache, v_cache, slots, k_scales, v_scales)


def sink_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    *,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    sliding_window: int | None = None,
    key_starts: Tensor | None = None,
    activations: Activations = "bf16",
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    sink_share: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention with sinks, on a ragged batch over a paged cache.

    Parameters
    ----------
    q : Tensor, shape (num_tokens, num_attention_heads, head_dim), float32 or bfloat16
        Has a gradient.
    k_cache, v_cache : Tensor, shape (num_blocks, num_key_value_heads, block_size, head_dim)
        float32, bfloat16 or int8; have gradients when they are floating point.
    sinks : Tensor, shape (num_attention_heads,), float32 or bfloat16
        Has a gradient.
    block_table : Tensor, shape (num_sequences, max_blocks), int32 or int64
    cu_seqlens : Tensor, shape (num_sequences + 1,), int32 or int64
    seq_lens : Tensor, shape (num_sequences,), int32 or int64
    sm_scale : float
    sliding_window : int, optional
    key_starts : Tensor, shape (num_sequences,), int32 or int64, optional
    activations : {"float32", "bf16", "int8"}
    k_scales, v_scales : Tensor, shape (num_blocks, num_key_value_heads, block_size), float32
        With an int8 cache only.
    sink_share : Tensor, shape (num_tokens, num_attention_heads), float32, optional
        Written; without gradients only, like `out`.
    out : Tensor, shape of `q`, float32 or bfloat16, optional

    Returns
    -------
    Tensor, shape and dtype of `q`
    """
    batch = (block_table, cu_seqlens, seq_lens, key_starts, k_scales, v_scales)
    inputs = (q, k_cache, v_cache, sinks, *batch, sm_scale, sliding_window or 0, activations)
    if out is None and sink_share is None:
        return _attention.sink_attention(*inputs)
    _no_gradient("out or sink_share has no gradient", q, k_cache, v_cache, sinks)
    if out is None:
        out = q.new_empty(q.shape)
    torch.ops.mxmoe.sink_attention_out(*inputs, sink_share, out)
    return out


def sink_attention_bhsd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    key_starts: Tensor | None = None,
    key_ends: Tensor | None = None,
    activations: Activations = "bf16",
) -> Tensor:
    """Causal grouped-query attention with sinks on dense tensors, padding and whole static caches included.

    Row b's keys are ``k[b, :, key_starts[b]:key_ends[b]]``. Its queries stand at the last places before the end:
    query i at ``p = key_ends[b] - num_queries + i``, where it sees the keys j with ``key_starts[b] <= j <= p`` and,
    with a window, ``p - j < sliding_window``. Queries before the first key (left padding) see nothing and give zeros.

    Nothing of size sequence x sequence is made, forward or backward. `k` and `v` are read where they lie, each row as
    one block of a paged cache, and a row's keys counted from its own first one, so that no bit of a row depends on
    its padding or on the other rows.

    Parameters
    ----------
    q : Tensor, shape (batch, num_attention_heads, num_queries, head_dim), float32 or bfloat16
        head_dim is at most 256. Has a gradient.
    k, v : Tensor, shape (batch, num_key_value_heads, num_keys, head_dim), float32 or bfloat16
        Any strides with a contiguous last axis, as those of a transposed projection. Have gradients.
    sinks : Tensor, shape (num_attention_heads,), float32 or bfloat16
        ``-inf`` for attention without a sink. Has a gradient.
    sm_scale : float
        Multiplies the scores; usually ``head_dim ** -0.5``.
    sliding_window : int, optional
        In keys, the query's own included; None or 0 for full attention.
    key_starts, key_ends : Tensor, shape (batch,), int32 or int64, optional
        0 and num_keys without; ``0 <= key_starts <= key_ends`` and ``num_queries <= key_ends <= num_keys``.
    activations : {"float32", "bf16", "int8"}
        As in `mxmoe.ops.sink_attention`; float32 keys round nothing.

    Returns
    -------
    Tensor, shape and dtype of `q`
        A transposed view: the result lies in memory as (batch, num_queries, num_attention_heads, head_dim).
    """
    options = (sm_scale, sliding_window or 0, activations)
    return _attention.sink_attention_bhsd(q, k, v, sinks, key_starts, key_ends, *options).transpose(1, 2)


def mxfp4_dequantize(blocks: Tensor, scales: Tensor, *, dtype: Literal["float32", "bfloat16"] = "float32") -> Tensor:
    """Decode MXFP4, exactly.

    Parameters
    ----------
    blocks : Tensor, shape (..., k // 32, 16), uint8
    scales : Tensor, shape (..., k // 32), uint8
    dtype : {"float32", "bfloat16"}

    Returns
    -------
    Tensor, shape (..., k)
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; wanted 'float32' or 'bfloat16'")
    return _attention.mxfp4_dequantize(blocks, scales, dtype == "bfloat16")


def mxfp4_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to MXFP4. Without gradients only.

    Parameters
    ----------
    x : Tensor, shape (..., k), float32 or bfloat16
        Finite; k a multiple of 32.

    Returns
    -------
    blocks : Tensor, shape (..., k // 32, 16), uint8
    scales : Tensor, shape (..., k // 32), uint8
    """
    _no_gradient("quantising has no gradient", x)
    return _attention.mxfp4_quantize(x)


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to int8 with a bfloat16 scale per block of 32 columns. Without gradients only.

    Parameters
    ----------
    x : Tensor, shape (rows, k), float32 or bfloat16
        Finite; k a multiple of 32.

    Returns
    -------
    codes : Tensor, shape (rows, k), int8
    scales : Tensor, shape (rows, k // 32), bfloat16
    """
    _no_gradient("quantising has no gradient", x)
    return _attention.int8_quantize(x)
