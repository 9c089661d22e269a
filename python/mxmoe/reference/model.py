"""The whole model in float64 NumPy on one page: one sequence, no cache, plain causal attention.

Written from the model card and independent of `mxmoe.layers`, so that either can convict the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxmoe.reference import ops

if TYPE_CHECKING:
    from mxmoe.checkpoint import Checkpoint, LayerWeights
    from mxmoe.config import ModelConfig

__all__ = ["forward"]

Float = NDArray[np.float64]


def attention(q: Float, k: Float, v: Float, sinks: Float, sm_scale: float, window: int | None) -> tuple[Float, Float]:
    """Attend over one whole sequence.

    Parameters
    ----------
    q : (T, Hq, D) float64
    k, v : (T, Hkv, D) float64
    sinks : (Hq,) float64
        One more logit of each head's softmax, without a value.
    sm_scale : float
    window : int or None
        Keys a query sees, its own included; None for all.

    Returns
    -------
    attended : (T, Hq, D) float64
    sink_share : (T, Hq) float64
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) * sm_scale
    distance = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]  # of key j behind query i
    seen = (distance >= 0) & (distance < (len(q) if window is None else window))
    scores = np.where(seen, scores, -np.inf)
    top = np.maximum(scores.max(axis=-1), sinks[:, None])
    weights, sink = np.exp(scores - top[..., None]), np.exp(sinks[:, None] - top)
    total = weights.sum(axis=-1) + sink
    return np.einsum("hij,jhd->ihd", weights / total[..., None], v), (sink / total).T


def layer(x: Float, w: LayerWeights, config: ModelConfig, i: int, seen: dict[str, NDArray[Any]]) -> Float:
    """Apply layer `i` to the residual stream `x` (T, H), leaving what it computed on the way in `seen`."""
    tokens, dim = len(x), config.head_dim
    inv_freq, scaling = ops.rope_inv_freq(dim, **vars(config.rope))
    cos, sin = ops.rope_cos_sin(np.arange(tokens), inv_freq, scaling)

    h = ops.rmsnorm(x, w.input_layernorm, config.rms_norm_eps)
    q = ops.linear(h, w.q_proj_weight, w.q_proj_bias).reshape(tokens, -1, dim)
    k = ops.linear(h, w.k_proj_weight, w.k_proj_bias).reshape(tokens, -1, dim)
    v = ops.linear(h, w.v_proj_weight, w.v_proj_bias).reshape(tokens, -1, dim)
    q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
    attended, sink_share = attention(q, k, v, w.sinks.astype(float), config.sm_scale, config.window(i))
    x = x + ops.linear(attended.reshape(tokens, -1), w.o_proj_weight, w.o_proj_bias)

    h = ops.rmsnorm(x, w.post_attention_layernorm, config.rms_norm_eps)
    router_logits = ops.linear(h, w.router_weight, w.router_bias)
    topk_ids, topk_weights = ops.expert_routing(router_logits, config.experts_per_token)
    experts = (w.gate_up_blocks, w.gate_up_scales, w.gate_up_bias, w.down_blocks, w.down_scales, w.down_bias)
    alpha, limit = config.swiglu_alpha, config.swiglu_limit
    seen |= {"attention_residual": x, "sink_share": sink_share, "router_logits": router_logits}
    x = x + ops.mxfp4_moe(h, topk_ids, topk_weights, *experts, swiglu_alpha=alpha, swiglu_limit=limit)
    seen |= {"topk_ids": topk_ids, "topk_weights": topk_weights, "residual": x}
    return x


def forward(checkpoint: Checkpoint, token_ids: ArrayLike, *, capture: dict[str, NDArray[Any]] | None = None) -> Float:
    """Compute the logits of every position of one sequence.

    Parameters
    ----------
    checkpoint : Checkpoint
    token_ids : (T,) int
        At least one.
    capture : dict, optional
        Filled with ``"embedding"`` (T, H) and, for every layer i, ``"layers.i.residual"`` (T, H) after the
        layer, ``"layers.i.attention_residual"`` (T, H) between attention and experts,
        ``"layers.i.sink_share"`` (T, Hq), ``"layers.i.router_logits"`` (T, E), ``"layers.i.topk_ids"`` and
        ``"layers.i.topk_weights"`` (T, k).

    Returns
    -------
    (T, vocab_size) float64

    Raises
    ------
    ValueError
        When `token_ids` is not a non-empty vector of ids inside the vocabulary.
    """
    config, ids = checkpoint.config, np.asarray(token_ids)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids has shape {ids.shape} and dtype {ids.dtype}, expected a vector of integers")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"token_ids reach {ids.min()}..{ids.max()}, expected 0..{config.vocab_size - 1}")
    x = ops.embedding(ids, checkpoint.embed_tokens)
    found = {"embedding": x}
    for i in range(config.num_hidden_layers):
        seen: dict[str, NDArray[Any]] = {}
        x = layer(x, checkpoint.layer(i), config, i, seen)
        found |= {f"layers.{i}.{name}": value for name, value in seen.items()}
    if capture is not None:
        capture.update(found)
    return ops.linear(ops.rmsnorm(x, checkpoint.norm, config.rms_norm_eps), checkpoint.lm_head)
