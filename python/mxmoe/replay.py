"""Decoding on the CPU: the ops of a step of one new token a sequence, recorded once and then made again.

A step streams all its weights through the caches, so that Python between two ops runs from cold memory: that costs as
much as the small ops themselves. Recorded ops follow each other without it. A step is recorded only where nobody
watches and every layer is what it was made as; in all other cases the layers are called, as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mxmoe import _core, ops
from mxmoe.inspection import Taps
from mxmoe.kv_cache import KVCache, Pages
from mxmoe.layers import (
    Attention,
    DecoderLayer,
    Embedding,
    Experts,
    Linear,
    LowRank,
    MoE,
    RMSNorm,
    Step,
    Watched,
    is_plain,
)

if TYPE_CHECKING:
    from mxmoe.model import Transformer

__all__ = ["Replay"]

Array = NDArray[Any]

# A recording keeps what lies between its ops: 2.4 MB a sequence at gpt-oss-20b's sizes.
_MOST_SEQUENCES = 16

_PARTS = (Attention, DecoderLayer, Embedding, Experts, Linear, LowRank, MoE, RMSNorm)


def _code() -> tuple[Callable[..., Any], ...]:
    """Return what layers call, which somebody may have put something else in the place of."""
    names = vars(ops)
    return (*(names[name] for name in ops.__all__), *(part.__call__ for part in _PARTS))


_OWN_CODE = _code()


def _takes_all_layers(model: Transformer) -> bool:
    """Whether every layer does nothing but call ops: that is all that is recorded."""

    def fits(layer: DecoderLayer) -> bool:
        if type(layer) is not DecoderLayer:
            return False
        attn, mlp = layer.self_attn, layer.mlp
        parts = [(layer.input_layernorm, RMSNorm), (layer.post_attention_layernorm, RMSNorm), (attn, Attention)]
        if not all(is_plain(part, kind, ops) for part, kind in [*parts, (mlp, MoE)]):
            return False
        linears = (*attn.projections, mlp.router)
        if not all(is_plain(linear, Linear, ops) for linear in linears):
            return False
        adapters = [linear.adapter for linear in linears if linear.adapter is not None]
        # An adapter of the experts begins with a copy of what goes into them, and that is no op.
        return (
            all(is_plain(adapter, LowRank, ops) for adapter in adapters)
            and is_plain(mlp.experts, Experts, ops)
            and mlp.experts.adapter is None
        )

    return is_plain(model.embed_tokens, Embedding, ops) and all(map(fits, model.layers))


class _Recorded:
    """The step of so many sequences: the arrays that it reads, and its ops."""

    def __init__(self, num_sequences: int, pages: dict[str, Pages]) -> None:
        self.num_sequences = num_sequences
        self._ids, self._positions = np.zeros(num_sequences, np.int64), np.zeros(num_sequences, np.int64)
        self._seq_lens = np.zeros(num_sequences, np.int32)
        self._cu_seqlens = np.arange(num_sequences + 1, dtype=np.int32)
        self._pages = {kind: Pages(at.slots.copy(), at.block_table.copy()) for kind, at in pages.items()}
        self._ops: _core.Recording | None = None
        self._residual: Array

    def run(self, model: Transformer, cache: KVCache, ids: Array, lengths: Array, pages: dict[str, Pages]) -> Array:
        self._ids[:], self._positions[:] = ids, lengths
        np.add(lengths, 1, out=self._seq_lens, casting="same_kind")
        for kind, own in self._pages.items():
            own.slots[:], own.block_table[:] = pages[kind].slots, pages[kind].block_table
        if self._ops is not None:
            self._ops.replay()
            return self._residual
        recording = _core.Recording()
        with recording:
            self._residual = model.body(self._ids, self._step(model, cache))
        self._ops = recording
        return self._residual

    def _step(self, model: Transformer, cache: KVCache) -> Step:
        cos, sin = ops.rope_cos_sin(self._positions, *model.rope)
        nobody = Taps(model.config, (), None)
        return Step(cos, sin, self._cu_seqlens, self._seq_lens, self._pages, cache, nobody, cache.device)


class Replay:
    """The decoding steps of a model on one cache; the last kind of step is kept."""

    def __init__(self) -> None:
        self._recorded: _Recorded | None = None
        self._seen: tuple[object, ...] = ()
        self._fits = False

    def run(
        self, model: Transformer, cache: KVCache, ids: Array, lengths: Array, pages: dict[str, Pages]
    ) -> Array | None:
        """Run one new token of each of some sequences through all layers, or return None and do nothing.

        Parameters
        ----------
        model : Transformer
            On the CPU.
        cache : KVCache
            The same every time.
        ids : (num_sequences,) int64
        lengths : (num_sequences,) int64
            Tokens that the cache holds of each.
        pages : dict of Pages
            With room for the new tokens.

        Returns
        -------
        (num_sequences, H) float32
            Residual stream; the next call writes over it.
        """
        seen = (Watched.changes, id(model.embed_tokens), *map(id, model.layers), _code())
        if seen != self._seen:
            self._recorded, self._seen = None, seen
            self._fits = seen[-1] == _OWN_CODE and _takes_all_layers(model)
        if not self._fits or len(ids) > _MOST_SEQUENCES:
            self._recorded = None
            return None
        if self._recorded is None or self._recorded.num_sequences != len(ids):
            self._recorded = _Recorded(len(ids), pages)
        return self._recorded.run(model, cache, ids, lengths, pages)
