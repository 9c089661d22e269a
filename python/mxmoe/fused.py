"""A layer of few tokens on a GPU in as few launches as there are.

The ops here give the bits of those that `mxmoe.layers` calls one by one. They are for steps that nobody watches;
where one does not fit, because a part has an adapter, other activations or another class, the layer's own runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mxmoe import cuda
from mxmoe.kv_cache import KVCache, LayerCache
from mxmoe.layers import Attention, DecoderLayer, Linear, MoE, RMSNorm, Step, is_plain

__all__ = ["Where", "run_layer", "ways"]

Array = Any  # on the GPU

# Past this many sequences a step's products are no longer bound by memory alone, and fusing what stands around them
# gains nothing.
_MOST_FUSED = 32


@dataclass(frozen=True)
class Where:
    """Where a step's new tokens stand: positions (S,) int64, and cosine and sine of all positions, float32."""

    positions: Array
    rope: tuple[Array, Array]


def _attention(layer: DecoderLayer, x: Array, step: Step, where: Where) -> Array:
    """(S, H) -> (S, H)."""
    attn, norm, held = layer.self_attn, layer.input_layernorm, step.cache.layers[layer.index]
    q, k, v = ((part.held[0], part.bias) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    pages, rope = step.pages[attn.kind], (*where.rope, where.positions)
    q = cuda.rmsnorm_qkv_rope(x, norm.weight, norm.eps, q, k, v, *rope, pages.slots, held.k, held.v)  # (S, Hq, D)
    y = cuda.sink_attention(
        q,
        held.k,
        held.v,
        attn.sinks,
        block_table=pages.block_table,
        cu_seqlens=step.cu_seqlens,
        seq_lens=step.seq_lens,
        sm_scale=attn.sm_scale,
        sliding_window=attn.window,
        activations=attn.activations,
    )  # (S, Hq, D)
    return attn.o_proj(y.reshape(len(x), -1), x)


def _experts(layer: DecoderLayer, x: Array) -> Array:
    """(S, H) -> (S, H)."""
    norm, router, experts = layer.post_attention_layernorm, layer.mlp.router, layer.mlp.experts
    rounded = experts.activations == "bf16" and experts.adapter is None  # before anything else is made of it
    h, _, ids, weights = cuda.rmsnorm_routing(
        x,
        norm.weight,
        norm.eps,
        router.weight,
        router.bias,
        layer.mlp.experts_per_token,
        h_dtype="bfloat16" if rounded else "float32",
    )  # (S, H), (S, E), (S, k), (S, k)
    return experts(h, ids, weights, x)


def _takes(array: Any, dtype: str) -> bool:
    return isinstance(array, cuda.extension().DeviceArray) and array.dtype == dtype


def _fuses_attention(layer: DecoderLayer, held: LayerCache) -> bool:
    attn, norm = layer.self_attn, layer.input_layernorm
    if not (is_plain(attn, Attention, cuda) and is_plain(norm, RMSNorm, cuda)):
        return False
    layers = (attn.q_proj, attn.k_proj, attn.v_proj)
    if not all(is_plain(p, Linear, cuda) and p.adapter is None and p.activations == "bf16" for p in layers):
        return False
    if not all(_takes(p.held[0], "bfloat16") and p.held[0].data_ptr % 16 == 0 for p in layers):
        return False
    # A cache of float32 takes queries as they are, one of bfloat16 rounds them only for activations that are rounded.
    fits = held.k_scales is None and (held.k.dtype == "float32" or attn.activations == "bf16")
    return fits and _takes(norm.weight, "bfloat16") and norm.weight.shape[0] % 8 == 0 and attn.head_dim % 16 == 0


def _fuses_routing(layer: DecoderLayer) -> bool:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    if not (is_plain(mlp, MoE, cuda) and is_plain(norm, RMSNorm, cuda) and is_plain(mlp.router, Linear, cuda)):
        return False
    router = mlp.router
    fits = router.adapter is None and router.activations == "float32" and norm.weight.shape[0] <= 8192
    arrays = (norm.weight, router.held[0], router.bias)
    return fits and all(_takes(a, "bfloat16") for a in arrays) and router.out_features <= 1024


def ways(layers: Sequence[DecoderLayer], cache: KVCache, num_sequences: int) -> list[tuple[bool, bool]]:
    """Which layers' attention and routing go by the fused ops."""
    few = num_sequences <= _MOST_FUSED
    return [
        (few and _fuses_attention(layer, cache.layers[layer.index]), few and _fuses_routing(layer))
        if type(layer) is DecoderLayer
        else (False, False)
        for layer in layers
    ]


def run_layer(layer: DecoderLayer, x: Array, step: Step, where: Where, fused: tuple[bool, bool]) -> Array:
    """(S, H) -> (S, H)."""
    if not any(fused):
        return layer(x, step)
    attention, routing = fused
    x = _attention(layer, x, step, where) if attention else layer.self_attn(layer.input_layernorm(x), x, step)
    return _experts(layer, x) if routing else layer.mlp(layer.post_attention_layernorm(x), x, step)
