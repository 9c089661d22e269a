"""The model's layers, one line an op. They read like the model card; shapes stand in the comments.

T new tokens of all sequences of a step; H hidden_size, Hq and Hkv query and key/value heads, D head_dim, E experts,
k experts per token. Arithmetic lives in the ops, `mxmoe.ops` or `mxmoe.reference.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mxmoe.kv_cache import KVCache, Pages

__all__ = ["Attention", "DecoderLayer", "Embedding", "Experts", "Linear", "MoE", "RMSNorm", "Step"]

Array = Any  # an array of the ops' kind
Ops = Any  # a module with the functions of mxmoe.ops


class Tap(Protocol):
    """Shows a named value to whoever watches it; returns the value to go on with."""

    def __call__(self, site: str, value: Array) -> Array: ...

    def wants(self, site: str) -> bool:
        """Whether anybody watches `site`."""
        ...


@dataclass(frozen=True)
class Step:
    """What all layers share while some new tokens pass through them.

    Attributes
    ----------
    cos, sin : (T, D / 2) float32
    cu_seqlens : (num_sequences + 1,) int32
    seq_lens : (num_sequences,) int32
    pages : dict
        Places in the cache by kind of layer.
    cache : KVCache
    tap : Tap
    """

    cos: Array
    sin: Array
    cu_seqlens: Array
    seq_lens: Array
    pages: dict[str, Pages]
    cache: KVCache
    tap: Tap


@dataclass
class Embedding:
    """Token ids to the residual stream. `weight` (vocab_size, H) bfloat16."""

    ops: Ops
    weight: Array

    def __call__(self, token_ids: Array) -> Array:
        """(T,) int -> (T, H)."""
        return self.ops.embedding(token_ids, self.weight)


@dataclass
class RMSNorm:
    """Root mean square normalisation. `weight` (H,) bfloat16."""

    ops: Ops
    weight: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        """(T, H) -> (T, H)."""
        return self.ops.rmsnorm(x, self.weight, self.eps)


@dataclass
class Linear:
    """A dense layer. `weight` (out, in) bfloat16, or int8 with `scales` (out, in / 32) bfloat16; `bias` (out,)."""

    ops: Ops
    weight: Array
    bias: Array | None
    scales: Array | None
    activations: str

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """(T, in) -> (T, out), on top of `residual` (T, out)."""
        kwargs = {"scales": self.scales, "activations": self.activations, "residual": residual}
        return self.ops.linear(x, self.weight, self.bias, **kwargs)

    @property
    def dtype(self) -> str:
        """What the weight is held in."""
        return "bf16" if self.scales is None else "int8"

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        return sum(a.nbytes for a in (self.weight, self.scales, self.bias) if a is not None)


@dataclass
class Attention:
    """Grouped-query attention with rotary embedding and sinks. `sinks` (Hq,) bfloat16; `window` in keys or None."""

    ops: Ops
    index: int
    kind: str
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    sinks: Array
    head_dim: int
    sm_scale: float
    window: int | None

    @property
    def projections(self) -> tuple[Linear, Linear, Linear, Linear]:
        """The dense layers: q, k, v, o."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def __call__(self, x: Array, residual: Array, step: Step) -> Array:
        """(T, H) -> (T, H), on top of `residual`; keys and values of the new tokens go into the cache."""
        ops, tap, site = self.ops, step.tap, f"layers.{self.index}."
        q = self.q_proj(x).reshape(len(x), -1, self.head_dim)  # (T, Hq, D)
        k = self.k_proj(x).reshape(len(x), -1, self.head_dim)  # (T, Hkv, D)
        v = self.v_proj(x).reshape(len(x), -1, self.head_dim)  # (T, Hkv, D)
        q = tap(site + "queries", ops.rope(q, step.cos, step.sin, out=q))
        k = tap(site + "keys", ops.rope(k, step.cos, step.sin, out=k))
        v = tap(site + "values", v)
        held, pages = step.cache.layers[self.index], step.pages[self.kind]
        scales = {"k_scales": held.k_scales, "v_scales": held.v_scales}
        ops.kv_cache_write(k, v, held.k, held.v, pages.slots, **scales)
        wanted = tap.wants(site + "sink_share")
        share = np.empty(q.shape[:2], q.dtype) if wanted else None  # (T, Hq)
        y = ops.sink_attention(
            q,
            held.k,
            held.v,
            self.sinks,
            block_table=pages.block_table,
            cu_seqlens=step.cu_seqlens,
            seq_lens=step.seq_lens,
            sm_scale=self.sm_scale,
            sliding_window=self.window,
            sink_share=share,
            **scales,
        )  # (T, Hq, D)
        if share is not None:
            tap(site + "sink_share", share)
        y = tap(site + "attention", y)
        return self.o_proj(y.reshape(len(x), -1), residual)


@dataclass
class Experts:
    """The experts' weights in MXFP4, shapes as in `mxmoe.ops.mxfp4_moe`."""

    ops: Ops
    gate_up_blocks: Array
    gate_up_scales: Array
    gate_up_bias: Array
    down_blocks: Array
    down_scales: Array
    down_bias: Array
    activations: str
    swiglu_alpha: float
    swiglu_limit: float

    @property
    def packed_nbytes(self) -> int:
        """Bytes of blocks and scales."""
        packed = (self.gate_up_blocks, self.gate_up_scales, self.down_blocks, self.down_scales)
        return sum(a.nbytes for a in packed)

    def __call__(self, x: Array, topk_ids: Array, topk_weights: Array, residual: Array) -> Array:
        """(T, H), (T, k), (T, k) -> (T, H), on top of `residual`."""
        return self.ops.mxfp4_moe(
            x,
            topk_ids,
            topk_weights,
            self.gate_up_blocks,
            self.gate_up_scales,
            self.gate_up_bias,
            self.down_blocks,
            self.down_scales,
            self.down_bias,
            activations=self.activations,
            swiglu_alpha=self.swiglu_alpha,
            swiglu_limit=self.swiglu_limit,
            residual=residual,
        )


@dataclass
class MoE:
    """Router and experts."""

    ops: Ops
    index: int
    router: Linear
    experts: Experts
    experts_per_token: int

    def __call__(self, x: Array, residual: Array, step: Step) -> Array:
        """(T, H) -> (T, H), on top of `residual`."""
        tap, site = step.tap, f"layers.{self.index}."
        logits = tap(site + "router_logits", self.router(x))  # (T, E)
        ids, weights = self.ops.expert_routing(logits, self.experts_per_token)  # (T, k), (T, k)
        ids, weights = tap(site + "topk_ids", ids), tap(site + "topk_weights", weights)
        return self.experts(x, ids, weights, residual)


@dataclass
class DecoderLayer:
    """Attention, then experts, each on a normalised copy of the residual stream and added to it."""

    index: int
    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MoE

    def __call__(self, x: Array, step: Step) -> Array:
        """(T, H) -> (T, H)."""
        x = self.self_attn(self.input_layernorm(x), x, step)
        x = step.tap(f"layers.{self.index}.attention_residual", x)
        x = self.mlp(self.post_attention_layernorm(x), x, step)
        return step.tap(f"layers.{self.index}.residual", x)
