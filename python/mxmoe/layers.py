"""The model's layers, one line an op. They read like the model card; shapes stand in the comments.

T new tokens of all sequences of a step; H hidden_size, Hq and Hkv query and key/value heads, D head_dim, E experts,
k experts per token. Arithmetic lives in the ops, `mxmoe.ops` or `mxmoe.reference.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mxmoe import cuda
from mxmoe.devices import HOST, Device
from mxmoe.kv_cache import KVCache, Pages
from mxmoe.packing import (
    PANEL_ROWS,
    can_pack,
    pack_linear,
    pack_mxfp4,
    unpack_linear,
    unpack_mxfp4,
)

__all__ = [
    "Attention",
    "DecoderLayer",
    "Embedding",
    "ExpertMatrix",
    "Experts",
    "Linear",
    "LowRank",
    "MoE",
    "RMSNorm",
    "Step",
    "Watched",
    "is_plain",
]

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
    device : Device
        Where all of it is.
    """

    cos: Array
    sin: Array
    cu_seqlens: Array
    seq_lens: Array
    pages: dict[str, Pages]
    cache: KVCache
    tap: Tap
    device: Device


class Watched:
    """Counts the changes made to layers, all models' together, for whoever has recorded what they do.

    Attributes
    ----------
    changes : int
        Assignments to any layer's attributes so far.
    """

    changes = 0

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        Watched.changes += 1


def is_plain(part: object, kind: type, ops: Ops) -> bool:
    """Whether a part of a model is what it was made as, on these ops, so that others may stand for its calls."""
    return type(part) is kind and getattr(part, "ops", None) is ops


@dataclass
class Embedding(Watched):
    """Token ids to the residual stream. `weight` (vocab_size, H) bfloat16."""

    ops: Ops
    weight: Array

    def __call__(self, token_ids: Array) -> Array:
        """(T,) int -> (T, H)."""
        return self.ops.embedding(token_ids, self.weight)


@dataclass
class RMSNorm(Watched):
    """Root mean square normalisation. `weight` (H,) bfloat16."""

    ops: Ops
    weight: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        """(T, H) -> (T, H)."""
        return self.ops.rmsnorm(x, self.weight, self.eps)


@dataclass
class LowRank(Watched):
    """An adapter's side branch: the product of a wide and a narrow matrix, beside a layer that stays as it is.

    Attributes
    ----------
    a : tuple of (r, in) bfloat16
    b : tuple of (out, r) bfloat16
        The scale is part of them. More than one sum to a matrix that bfloat16 does not hold.
    activations : str
    """

    ops: Ops
    a: tuple[Array, ...]
    b: tuple[Array, ...]
    activations: str

    def __call__(self, x: Array, y: Array) -> Array:
        """(T, in), (T, out) -> `y`, to which the branch has been added."""
        narrow = None
        for a in self.a:
            narrow = self.ops.linear(x, a, activations=self.activations, residual=narrow)  # (T, r)
        for b in self.b:
            self.ops.linear(narrow, b, activations=self.activations, residual=y, out=y)
        return y

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(part.nbytes for part in (*self.a, *self.b))


class Linear(Watched):
    """A dense layer.

    Parameters
    ----------
    weight : (out, in) bfloat16 or int8
    bias : (out,) bfloat16 or float32, or None
    scales : (out, in / 32) bfloat16, or None
        With int8 weights.
    activations : str
    packed : bool
        Hold weight and scales by panels, the way the kernels read them fastest.

    Attributes
    ----------
    adapter : LowRank or None
        Added to what the layer gives. Assign to change it.
    """

    def __init__(
        self,
        ops: Ops,
        weight: Array,
        bias: Array | None,
        scales: Array | None,
        activations: str,
        packed: bool = False,
    ) -> None:
        self.ops, self.bias, self.activations = ops, bias, activations
        self.adapter: LowRank | None = None
        self.packed = packed and can_pack(*weight.shape)
        self._held: tuple[Array, Array | None] = (weight, scales)
        if self.packed:
            self._held = pack_linear(weight, scales)

    def __call__(self, x: Array, residual: Array | None = None, out: Array | None = None) -> Array:
        """(T, in) -> (T, out), on top of `residual` (T, out)."""
        weight, scales = self._held
        kwargs = {"scales": scales, "activations": self.activations, "residual": residual, "out": out}
        y = self.ops.linear(x, weight, self.bias, **kwargs)
        return y if self.adapter is None else self.adapter(x, y)

    @property
    def held(self) -> tuple[Array, Array | None, Array | None]:
        """Weight, scales and bias as the ops take them."""
        return *self._held, self.bias

    def _stored(self) -> tuple[Array, Array | None]:
        if not self.packed:
            return self._held
        weight, scales = unpack_linear(*self._held)
        for copy in (weight, scales):
            if copy is not None:
                copy.flags.writeable = False  # a change in place would be lost
        return weight, scales

    def replace(self, weight: Array, scales: Array | None = None) -> None:
        """Hold another weight, and the scales that go with it when it is int8."""
        fits = self.packed and np.ndim(weight) == 2 and can_pack(*weight.shape)
        self._held = pack_linear(weight, scales) if fits else (weight, scales)
        self.packed = fits

    @property
    def weight(self) -> Array:
        """(out, in) bfloat16 or int8; a read-only copy when held packed. Assign to replace it."""
        return self._stored()[0]

    @weight.setter
    def weight(self, weight: Array) -> None:
        self.replace(weight, self._stored()[1])

    @property
    def scales(self) -> Array | None:
        """(out, in / 32) bfloat16 with int8 weights, else None. Assign to replace them."""
        return self._stored()[1]

    @scales.setter
    def scales(self, scales: Array | None) -> None:
        self.replace(self._stored()[0], scales)

    @property
    def out_features(self) -> int:
        """Columns of what the layer gives."""
        rows: int = self._held[0].shape[0]
        return rows * PANEL_ROWS if self.packed else rows

    @property
    def dtype(self) -> str:
        """What the weight is held in."""
        return "bf16" if self._held[1] is None else "int8"

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias, without an adapter."""
        return sum(a.nbytes for a in (*self._held, self.bias) if a is not None)


def side_by_side(x: Array, layers: tuple[Linear, ...], device: Device = HOST) -> Array:
    """(T, in) -> (T, sum of out): dense layers of the same input, in one op where they round it alike."""
    first = layers[0]
    alike = all(layer.activations == first.activations for layer in layers)
    if alike:
        y = first.ops.linear_group(x, [layer.held for layer in layers], activations=first.activations)
    else:
        y = device.empty((len(x), sum(layer.out_features for layer in layers)), x.dtype)
    end = 0
    for layer in layers:
        begin, end = end, end + layer.out_features
        if not alike:
            layer(x, out=y[:, begin:end])
        elif layer.adapter is not None:
            layer.adapter(x, y[:, begin:end])
    return y


@dataclass
class Attention(Watched):
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
    activations: str

    @property
    def projections(self) -> tuple[Linear, Linear, Linear, Linear]:
        """The dense layers: q, k, v, o."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def __call__(self, x: Array, residual: Array, step: Step) -> Array:
        """(T, H) -> (T, H), on top of `residual`; keys and values of the new tokens go into the cache."""
        ops, tap, site = self.ops, step.tap, f"layers.{self.index}."
        qkv = side_by_side(x, (self.q_proj, self.k_proj, self.v_proj), step.device)
        qkv = qkv.reshape(len(x), -1, self.head_dim)  # (T, Hq + 2 Hkv, D)
        heads, groups = self.sinks.shape[0], (qkv.shape[1] - self.sinks.shape[0]) // 2
        qk = qkv[:, : heads + groups]
        ops.rope(qk, step.cos, step.sin, out=qk)
        q = tap(site + "queries", qkv[:, :heads])  # (T, Hq, D)
        k = tap(site + "keys", qkv[:, heads : heads + groups])  # (T, Hkv, D)
        v = tap(site + "values", qkv[:, heads + groups :])  # (T, Hkv, D)
        held, pages = step.cache.layers[self.index], step.pages[self.kind]
        scales = {"k_scales": held.k_scales, "v_scales": held.v_scales}
        ops.kv_cache_write(k, v, held.k, held.v, pages.slots, **scales)
        wanted = tap.wants(site + "sink_share")
        share = step.device.empty(q.shape[:2], q.dtype) if wanted else None  # (T, Hq)
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
            activations=self.activations,
            sink_share=share,
            **scales,
        )  # (T, Hq, D)
        if share is not None:
            tap(site + "sink_share", share)
        y = tap(site + "attention", y)
        return self.o_proj(y.reshape(len(x), -1), residual)


class ExpertMatrix(Watched):
    """One of the experts' two matrices in MXFP4, as stored or packed.

    Parameters
    ----------
    blocks, scales : (E, N, K / 32, 16) uint8, (E, N, K / 32) uint8
    packed : bool
    """

    def __init__(self, blocks: Array, scales: Array, packed: bool) -> None:
        self.packed = packed
        self.held: tuple[Array, Array] = pack_mxfp4(blocks, scales) if packed else (blocks, scales)

    def stored(self) -> tuple[Array, Array]:
        """Blocks and scales as a checkpoint has them; read-only copies when held packed."""
        if not self.packed:
            return self.held
        copies = unpack_mxfp4(*self.held)
        for copy in copies:
            copy.flags.writeable = False  # a change in place would be lost
        return copies

    def replace(self, blocks: Array | None = None, scales: Array | None = None) -> None:
        """Hold other blocks or scales."""
        stored = self.stored()
        blocks = stored[0] if blocks is None else blocks
        scales = stored[1] if scales is None else scales
        self.held = pack_mxfp4(blocks, scales) if self.packed else (blocks, scales)


class Experts(Watched):
    """The experts' weights in MXFP4, shapes as in `mxmoe.ops.mxfp4_moe`.

    The arrays named there can be looked at and assigned anew under their names; where the matrices are held packed,
    what is looked at is a read-only copy.

    Attributes
    ----------
    gate_up, down : ExpertMatrix
    gate_up_bias, down_bias : (E, 2 I), (E, H) bfloat16 or float32
    adapter : LowRank or None
        Added to what goes into the experts (the router has seen it before). Assign to change it.
    foldable_scales : bool
        What `mxmoe.cuda.scales_are_foldable` says of scales on a GPU; found out anew when others are assigned, not
        when arrays are changed in place.
    """

    def __init__(
        self,
        ops: Ops,
        gate_up: ExpertMatrix,
        gate_up_bias: Array,
        down: ExpertMatrix,
        down_bias: Array,
        activations: str,
        swiglu_alpha: float,
        swiglu_limit: float,
        foldable_scales: bool = False,
    ) -> None:
        self.ops, self.activations, self.foldable_scales = ops, activations, foldable_scales
        self.adapter: LowRank | None = None
        self.swiglu_alpha, self.swiglu_limit = swiglu_alpha, swiglu_limit
        self.gate_up, self.gate_up_bias = gate_up, gate_up_bias
        self.down, self.down_bias = down, down_bias

    @property
    def gate_up_blocks(self) -> Array:
        """(E, 2 I, H / 32, 16) uint8."""
        return self.gate_up.stored()[0]

    @gate_up_blocks.setter
    def gate_up_blocks(self, blocks: Array) -> None:
        self.gate_up.replace(blocks=blocks)

    @property
    def gate_up_scales(self) -> Array:
        """(E, 2 I, H / 32) uint8."""
        return self.gate_up.stored()[1]

    @gate_up_scales.setter
    def gate_up_scales(self, scales: Array) -> None:
        self.gate_up.replace(scales=scales)
        self._look_at_scales()

    @property
    def down_blocks(self) -> Array:
        """(E, H, I / 32, 16) uint8."""
        return self.down.stored()[0]

    @down_blocks.setter
    def down_blocks(self, blocks: Array) -> None:
        self.down.replace(blocks=blocks)

    @property
    def down_scales(self) -> Array:
        """(E, H, I / 32) uint8."""
        return self.down.stored()[1]

    @down_scales.setter
    def down_scales(self, scales: Array) -> None:
        self.down.replace(scales=scales)
        self._look_at_scales()

    def _look_at_scales(self) -> None:
        scales = self.gate_up.held[1], self.down.held[1]
        self.foldable_scales = all(map(cuda.is_on_gpu, scales)) and cuda.scales_are_foldable(*scales)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of blocks and scales."""
        return sum(a.nbytes for a in (*self.gate_up.held, *self.down.held))

    def __call__(self, x: Array, topk_ids: Array, topk_weights: Array, residual: Array) -> Array:
        """(T, H), (T, k), (T, k) -> (T, H), on top of `residual`."""
        x = x if self.adapter is None else self.adapter(x, x.copy())
        return self.ops.mxfp4_moe(
            x,
            topk_ids,
            topk_weights,
            *self.gate_up.held,
            self.gate_up_bias,
            *self.down.held,
            self.down_bias,
            activations=self.activations,
            swiglu_alpha=self.swiglu_alpha,
            swiglu_limit=self.swiglu_limit,
            foldable_scales=self.foldable_scales,
            residual=residual,
        )


@dataclass
class MoE(Watched):
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
class DecoderLayer(Watched):
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
