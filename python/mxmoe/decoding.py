"""Decoding on a GPU: steps of one new token a sequence, recorded once as a graph and then replayed.

Token ids, positions, lengths and block tables stay on the GPU from step to step; the host sends only what it knows
better: other sequences, other tokens than the likeliest, new blocks of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mxmoe import cuda
from mxmoe.inspection import Taps
from mxmoe.kv_cache import KVCache, Pages
from mxmoe.layers import Step, Watched

if TYPE_CHECKING:
    from mxmoe.model import Transformer

__all__ = ["Decoder"]

Array = Any  # on the GPU
HostArray = NDArray[Any]

# Attention's launch is sized by the longest sequence there may be: for a power of two of the blocks that are needed,
# so that a long cache costs short sequences nothing. 4 blocks of 256 tokens to begin with.
_FEWEST_BLOCKS = 4


class _Recording:
    """The decoding step of so many sequences of up to so many blocks: its arrays and, from the second on, its graph.

    Parameters
    ----------
    cache : KVCache
    kinds : sequence of str
        Of layers.
    num_blocks : int
    logits : (num_sequences, vocab_size) float32
        Takes those of every step.
    pool : Pool
        For what lies between; all recordings run one after the other, so they share it.

    Attributes
    ----------
    token_ids, logprobs : (num_sequences,) int64, float32
        The likeliest tokens after a step; the ids are what the next one takes if nobody says otherwise.
    """

    def __init__(self, cache: KVCache, kinds: Sequence[str], num_blocks: int, logits: Array, pool: Any) -> None:
        num_sequences, what = logits.shape[0], "a decoding step"
        self.logits, self._pool, self._block_size = logits, pool, cache.block_size
        self._seq_lens = cuda.empty((num_sequences,), "int32", what)
        self._positions = cuda.empty((num_sequences,), "int64", what)
        self._cu_seqlens = cuda.array(np.arange(num_sequences + 1, dtype=np.int32), what)
        self._pages = {
            kind: Pages(
                cuda.empty((num_sequences,), "int64", what), cuda.empty((num_sequences, num_blocks), "int32", what)
            )
            for kind in kinds
        }
        self.token_ids = cuda.empty((num_sequences,), "int64", what)
        self.logprobs = cuda.empty((num_sequences,), "float32", what)
        self._has_run = False
        self._graph: Any = None
        self._known: dict[str, HostArray] = {}  # what the GPU's arrays hold

    def _send(self, name: str, values: HostArray, to: Array) -> None:
        if not np.array_equal(self._known.get(name, ()), values):
            to.set(values)
            self._known[name] = values

    def run(
        self, model: Transformer, cache: KVCache, rope: tuple[Array, Array], ids: HostArray, lengths: HostArray,
        tables: dict[str, HostArray],
    ) -> None:  # fmt: skip
        """Run a step. `lengths` are those before it; `tables` have room for its tokens."""
        self._send("token_ids", ids, self.token_ids)
        self._send("seq_lens", lengths, self._seq_lens)
        for kind, table in tables.items():
            self._send(kind, table, self._pages[kind].block_table)
        del self._known["token_ids"], self._known["seq_lens"]  # until it is known how the step went
        if self._graph is None and self._has_run:
            with cuda.graph() as graph:
                self._launch(model, cache, rope)
            self._graph = graph
        if self._graph is None:
            self._launch(model, cache, rope)  # which takes all memory that it wants
        else:
            self._graph.replay()
        self._has_run = True
        self._known["seq_lens"] = lengths + np.int32(1)

    def _launch(self, model: Transformer, cache: KVCache, rope: tuple[Array, Array]) -> None:
        pages = self._pages
        with cuda.pooled(self._pool):
            tables = [(at.block_table, at.slots) for at in pages.values()]
            cuda.kv_cache_advance(self._seq_lens, self._positions, tables, block_size=self._block_size)
            cos, sin = (cuda.embedding(self._positions, table) for table in rope)
            taps = Taps(model.config, (), None)
            step = Step(cos, sin, self._cu_seqlens, self._seq_lens, pages, cache, taps, cache.device)
            model.head(model.body(self.token_ids, step), taps, out=self.logits)
            cuda.greedy_sample(self.logits, out=(self.token_ids, self.logprobs))

    def likeliest(self) -> tuple[HostArray, HostArray]:
        """Return the likeliest tokens and their logprobs."""
        ids, logprobs = self.token_ids.numpy(), self.logprobs.numpy()
        self._known["token_ids"] = ids
        return ids, logprobs


class Decoder:
    """The decoding steps of a model on one cache.

    Parameters
    ----------
    cache : KVCache
        On a GPU.
    rope : tuple of (max_tokens, head_dim / 2) float32
        Cosine and sine of every position, on the host.
    """

    def __init__(self, cache: KVCache, rope: tuple[HostArray, HostArray]) -> None:
        # A stream of its own: what other threads launch meanwhile must not be recorded.
        self._stream = cuda.extension().Stream(cuda.extension().current_stream().device)
        self._rope = (cuda.array(rope[0], "the rotary table"), cuda.array(rope[1], "the rotary table"))
        self._pool: Any = None
        self._logits: Array = None
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._layers: tuple[int, ...] = ()

    def run(
        self, model: Transformer, cache: KVCache, ids: HostArray, sequences: Sequence[int], want: str
    ) -> tuple[HostArray, ...]:
        """Run one new token of each of some sequences.

        Parameters
        ----------
        model : Transformer
        cache : KVCache
            The same every time.
        ids : (num_sequences,) int64
        sequences : sequence of int
        want : {"logits", "likeliest"}

        Returns
        -------
        logits : (num_sequences, vocab_size) float32
        or
        token_ids, logprobs : (num_sequences,) int64, float32
        """
        lengths = np.array([cache.lengths[s] for s in sequences], np.int32)
        ones = [1] * len(sequences)
        pages = cache.reserve(sequences, ones)
        self._forget_if_changed(model)
        room = next(iter(pages.values())).block_table.shape[1]
        needed = int(lengths.max()) // cache.block_size + 1
        num_blocks = min(room, max(_FEWEST_BLOCKS, 1 << (needed - 1).bit_length()))
        with cuda.on_stream(self._stream):
            recording = self._recordings.get((len(ids), num_blocks))
            if recording is None:
                recording = _Recording(cache, list(pages), num_blocks, *self._memory(len(ids), model))
                self._recordings[len(ids), num_blocks] = recording
            tables = {kind: np.ascontiguousarray(at.block_table[:, :num_blocks]) for kind, at in pages.items()}
            recording.run(model, cache, self._rope, ids, lengths, tables)
            result = recording.likeliest() if want == "likeliest" else (recording.logits.numpy(),)
        cache.commit(sequences, ones)
        return result

    def _memory(self, num_sequences: int, model: Transformer) -> tuple[Array, Any]:
        """Return the logits of so many sequences, and the pool."""
        if self._pool is None:
            self._pool = cuda.extension().Pool()
        if self._logits is None or self._logits.shape[0] < num_sequences:
            self._logits = cuda.empty((num_sequences, model.config.vocab_size), "float32", "a decoding step's logits")
        return self._logits[:num_sequences], self._pool

    def _forget_if_changed(self, model: Transformer) -> None:
        """Drop what was recorded of other layers than the model has now."""
        parts = (*model.layers, model.embed_tokens, model.norm, model.lm_head)
        layers = (Watched.changes, *map(id, parts))
        if layers != self._layers:
            self._recordings.clear()
            self._layers = layers
