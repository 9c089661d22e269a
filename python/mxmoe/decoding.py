"""Decoding on a GPU: steps of one new token a sequence, recorded once as a graph and then replayed.

Token ids, positions, lengths and block tables stay on the GPU from step to step; the host sends only what it knows
better: other sequences, other tokens than those chosen, new blocks of the cache. Who means to go on with the tokens
that a step chooses lets the next step be launched before they are read: the GPU then never waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mxmoe import cuda
from mxmoe.fused import Where, run_layer, ways
from mxmoe.inspection import Taps
from mxmoe.kv_cache import KVCache, Pages
from mxmoe.layers import Step, Watched
from mxmoe.sampling import Sampler

if TYPE_CHECKING:
    from mxmoe.model import Transformer

__all__ = ["Decoder", "draw"]

Array = Any  # on the GPU
HostArray = NDArray[Any]

# Attention's launch is sized by the longest sequence there may be: for a power of two of the blocks that are needed,
# so that a long cache costs short sequences nothing. 4 blocks of 256 tokens to begin with.
_FEWEST_BLOCKS = 4


@dataclass(frozen=True)
class _Draws:
    """How the tokens of a step are drawn where the likeliest are not wanted.

    Attributes
    ----------
    params : dict of (num_sequences,) float64 or int64
        ``temperature``, ``top_p``, ``top_k``, ``min_p``.
    uniforms : (num_steps, num_sequences) float64
        The numbers of this step and of those that come after.
    """

    params: dict[str, HostArray]
    uniforms: HostArray

    @classmethod
    def of(cls, samplers: Sequence[Sampler], num_steps: int) -> _Draws:
        """Ask samplers for what they will use."""
        params = {
            name: np.array([getattr(s.params, name) for s in samplers], np.int64 if name == "top_k" else np.float64)
            for name in ("temperature", "top_p", "top_k", "min_p")
        }
        none = (0.0,) * num_steps
        return cls(params, np.array([s.peek(num_steps) if s.draws else none for s in samplers]).T)

    def next(self) -> _Draws:
        """Return those of the step after."""
        return _Draws(self.params, self.uniforms[1:])

    def same(self, other: _Draws) -> bool:
        """Whether the tokens of one step are drawn alike."""
        pairs = [(self.params[name], other.params[name]) for name in self.params]
        return all(np.array_equal(a, b) for a, b in [*pairs, (self.uniforms[0], other.uniforms[0])])


class _Draw:
    """What a recorded step that draws its tokens reads: the GPU's and pinned arrays that `_Draws` are sent to."""

    def __init__(self, num_sequences: int) -> None:
        self.params = {
            name: cuda.empty((num_sequences,), "int64" if name == "top_k" else "float64", "a decoding step")
            for name in ("temperature", "top_p", "top_k", "min_p")
        }
        self.uniforms = cuda.extension().Pinned((2, num_sequences), "float64")


def draw(logits: Array, samplers: Sequence[Sampler]) -> tuple[HostArray, HostArray]:
    """Draw from rows of logits on a GPU as samplers would; each that draws has then used up one number.

    Parameters
    ----------
    logits : (num_sequences, vocab_size) float32
    samplers : sequence of Sampler

    Returns
    -------
    token_ids, logprobs : (num_sequences,) int64, float32
    """
    draws = _Draws.of(samplers, 1)
    params = [cuda.array(values, name) for name, values in draws.params.items()]
    uniforms = cuda.array(np.repeat(draws.uniforms, 2, axis=0), "uniforms")  # whatever the position
    how = (*params, uniforms, cuda.array(np.zeros(len(samplers), np.int64), "positions"))
    ids, logprobs = cuda.sample(logits, *how)
    result = ids.numpy(), logprobs.numpy()
    _use_up(samplers)
    return result


def _use_up(samplers: Sequence[Sampler]) -> None:
    for sampler in samplers:
        if sampler.draws:
            sampler.take()


@dataclass
class _Launched:
    """A step that has been launched: what to wait for, and where its results then are.

    Attributes
    ----------
    done : Event
    token_ids, logprobs : (2, num_sequences) int64, float32
        In pinned memory; of each sequence the row that its position's parity names.
    lengths : (num_sequences,) int32
        Before the step.
    """

    done: Any
    token_ids: HostArray
    logprobs: HostArray
    lengths: HostArray

    def result(self) -> tuple[HostArray, HostArray]:
        """Wait, and return the chosen tokens and their logprobs."""
        self.done.synchronize()
        at = self.lengths % 2, np.arange(len(self.lengths))
        return self.token_ids[at], self.logprobs[at]


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
    draws : bool
        Draw the tokens instead of taking the likeliest.

    Attributes
    ----------
    graph : Graph or None
    """

    def __init__(
        self, cache: KVCache, kinds: Sequence[str], num_blocks: int, logits: Array, pool: Any, draws: bool
    ) -> None:
        num_sequences, what, gpu = logits.shape[0], "a decoding step", cuda.extension()
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
        self._draw = _Draw(num_sequences) if draws else None
        # The tokens that a step chooses are what the next one takes if nobody says otherwise.
        self._token_ids = cuda.empty((num_sequences,), "int64", what)
        self._logprobs = cuda.empty((num_sequences,), "float32", what)
        self._results = gpu.Pinned((2, num_sequences), "int64"), gpu.Pinned((2, num_sequences), "float32")
        self._events = [gpu.Event(timing=False) for _ in range(2)]  # as many steps may be on their way
        self._has_run = False
        self.graph: Any = None
        self._known: dict[str, HostArray] = {}  # what the GPU's arrays hold

    def _send(self, name: str, values: HostArray, to: Array) -> None:
        if not np.array_equal(self._known.get(name, ()), values):
            to.set(values)
            self._known[name] = values

    def start(
        self,
        model: Transformer,
        cache: KVCache,
        rope: tuple[Array, Array],
        ids: HostArray | None,
        lengths: HostArray,
        pages: dict[str, Pages],
        draws: _Draws | None,
    ) -> _Launched:
        """Launch a step, of the tokens that the one before chose if `ids` is None.

        `lengths` are those before it; the host's `pages` have room for its tokens.
        """
        if self._draw is not None and draws is not None:
            for name, values in draws.params.items():
                self._send(name, values, self._draw.params[name])
            self._draw.uniforms.host[lengths % 2, np.arange(len(lengths))] = draws.uniforms[0]
        if ids is not None:
            self._send("token_ids", ids, self._token_ids)
        self._send("seq_lens", lengths, self._seq_lens)
        for kind, at in self._pages.items():
            table = pages[kind].block_table[:, : at.block_table.shape[1]]
            self._send(kind, np.ascontiguousarray(table), at.block_table)
        self._known.pop("token_ids", None)
        del self._known["seq_lens"]  # until the step has been launched
        if self.graph is None and self._has_run:
            with cuda.graph() as graph:
                self._run(model, cache, rope)
            self.graph = graph
        if self.graph is None:
            self._run(model, cache, rope)  # which takes all memory that it wants
        else:
            self.graph.replay()
        self._has_run = True
        self._known["seq_lens"] = lengths + np.int32(1)
        self._events.reverse()
        self._events[0].record()
        token_ids, logprobs = (copies.host for copies in self._results)
        return _Launched(self._events[0], token_ids, logprobs, lengths)

    def _run(self, model: Transformer, cache: KVCache, rope: tuple[Array, Array]) -> None:
        pages, where = self._pages, Where(self._positions, rope)
        tables = [(at.block_table, at.slots) for at in pages.values()]
        cuda.kv_cache_advance(self._seq_lens, self._positions, tables, block_size=self._block_size)
        with cuda.pooled(self._pool), cuda.overlapping():
            fused = ways(model.layers, cache, len(self.logits))
            cos, sin = None, None  # of the new tokens, where anybody wants them
            if not all(attention for attention, _ in fused):
                cos, sin = (cuda.embedding(self._positions, table) for table in rope)
            taps = Taps(model.config, (), None)
            step = Step(cos, sin, self._cu_seqlens, self._seq_lens, pages, cache, taps, cache.device)
            x = model.embed_tokens(self._token_ids)  # (S, H)
            for layer, own in zip(model.layers, fused, strict=True):
                x = run_layer(layer, x, step, where, own)
            model.head(x, taps, out=self.logits)  # (S, vocab_size)
            out, copies = (self._token_ids, self._logprobs), tuple(r.array for r in self._results)
            if self._draw is None:
                cuda.greedy_sample(self.logits, out=out, copies=(self._positions, *copies))
            else:
                how = (*self._draw.params.values(), self._draw.uniforms.array, self._positions)
                cuda.sample(self.logits, *how, out=out, copies=copies)


@dataclass
class _Ahead:
    """A step that was launched before anybody asked for it, and what must still be so for it to be taken.

    Attributes
    ----------
    ids : (num_sequences,) int64 or None
        The tokens it is of; None until they are known.
    changes : int
        Of the cache, after the step before was counted.
    writes : int
        Host arrays copied to the GPU by then: one may have been a weight.
    """

    launched: _Launched
    sequences: tuple[int, ...]
    draws: _Draws | None
    ids: HostArray | None = None
    changes: int = -1
    writes: int = -1


def _lengths(cache: KVCache, sequences: Sequence[int]) -> NDArray[np.int32]:
    return np.array([cache.lengths[s] for s in sequences], np.int32)


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
        self._recordings: dict[tuple[int, int, bool], _Recording] = {}
        self._layers: tuple[int, ...] = ()
        self._ahead: _Ahead | None = None

    @property
    def graphs(self) -> list[Any]:
        """Those that have been recorded so far."""
        return [r.graph for r in self._recordings.values() if r.graph is not None]

    def logits(self, model: Transformer, cache: KVCache, ids: HostArray, sequences: Sequence[int]) -> HostArray:
        """Run one new token of each of some sequences.

        Parameters
        ----------
        model : Transformer
        cache : KVCache
            The same every time.
        ids : (num_sequences,) int64
        sequences : sequence of int

        Returns
        -------
        (num_sequences, vocab_size) float32
        """
        lengths, ones = _lengths(cache, sequences), [1] * len(sequences)
        self._forget_if_changed(model)
        self._ahead = None
        pages = cache.reserve(sequences, ones)
        with cuda.on_stream(self._stream):
            recording = self._recording(model, cache, pages, lengths, False)
            recording.start(model, cache, self._rope, ids, lengths, pages, None)
            result: HostArray = recording.logits.numpy()
        cache.commit(sequences, ones)
        return result

    def choose(
        self,
        model: Transformer,
        cache: KVCache,
        ids: HostArray,
        sequences: Sequence[int],
        samplers: Sequence[Sampler] | None,
        ahead: bool,
    ) -> tuple[HostArray, HostArray]:
        """Run one new token of each of some sequences, and choose what follows.

        Parameters
        ----------
        model, cache, ids, sequences
            As in `logits`.
        samplers : sequence of Sampler or None
            Of each sequence; None takes the likeliest tokens.
        ahead : bool
            The next call is likely to go on with the tokens that this one returns: launch it before they are read. If
            it then does not come, or anything has changed meanwhile, nothing is left of it but time spent. What
            cannot be seen is a weight changed in place by others than `DeviceArray.set`.

        Returns
        -------
        token_ids, logprobs : (num_sequences,) int64, float32
        """
        lengths, count = _lengths(cache, sequences), len(sequences)
        self._forget_if_changed(model)
        ahead = ahead and self._has_room(cache, lengths + 1)
        draws = None if samplers is None else _Draws.of(samplers, 1 + ahead)
        launched = self._take_ahead(cache, ids, sequences, draws)
        pages = cache.reserve(sequences, [1 + ahead] * count)
        with cuda.on_stream(self._stream):
            recording = self._recording(model, cache, pages, lengths, draws is not None)
            if launched is None:
                launched = recording.start(model, cache, self._rope, ids, lengths, pages, draws)
            if ahead and self._recording(model, cache, pages, lengths + 1, draws is not None) is recording:
                after = None if draws is None else draws.next()
                then = recording.start(model, cache, self._rope, None, lengths + np.int32(1), pages, after)
                self._ahead = _Ahead(then, tuple(sequences), after)
            result = launched.result()
        cache.commit(sequences, [1] * count)
        _use_up(samplers or ())
        if self._ahead is not None:
            self._ahead.ids, self._ahead.changes = result[0], cache.changes
            self._ahead.writes = cuda.extension().host_writes()
        return result

    def _take_ahead(
        self, cache: KVCache, ids: HostArray, sequences: Sequence[int], draws: _Draws | None
    ) -> _Launched | None:
        """Return the step that has been launched already, if it is the one that is wanted; it is then forgotten."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.ids is None or ahead.sequences != tuple(sequences):
            return None
        if (draws is None) != (ahead.draws is None) or (draws and ahead.draws and not draws.same(ahead.draws)):
            return None
        same = ahead.changes == cache.changes and ahead.writes == cuda.extension().host_writes()
        return ahead.launched if same and np.array_equal(ahead.ids, ids) else None

    def _has_room(self, cache: KVCache, lengths: HostArray) -> bool:
        return cache.step_tokens >= 2 and int(lengths.max()) < cache.max_tokens

    def _recording(
        self, model: Transformer, cache: KVCache, pages: dict[str, Pages], lengths: HostArray, draws: bool
    ) -> _Recording:
        """Return the recording for sequences of such lengths."""
        room = next(iter(pages.values())).block_table.shape[1]
        needed = int(lengths.max()) // cache.block_size + 1
        num_blocks = min(room, max(_FEWEST_BLOCKS, 1 << (needed - 1).bit_length()))
        recording = self._recordings.get((len(lengths), num_blocks, draws))
        if recording is None:
            recording = _Recording(cache, list(pages), num_blocks, *self._memory(len(lengths), model), draws)
            self._recordings[len(lengths), num_blocks, draws] = recording
        return recording

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
            self._ahead = None
            self._layers = layers
