"""The model's forward pass: layers over a cache, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxmoe import ops as kernels
from mxmoe.batch import check_bounds, check_sequences, check_token_ids
from mxmoe.config import ModelConfig
from mxmoe.decoding import Decoder, draw
from mxmoe.devices import HOST, Device, Gpu
from mxmoe.inspection import Hook, HookFunction, Taps, check_pattern, site_names
from mxmoe.kv_cache import KVCache, KVDtype, Pages
from mxmoe.layers import DecoderLayer, Embedding, Experts, Linear, RMSNorm, Step, Tap
from mxmoe.replay import Replay
from mxmoe.sampling import Sampler
from mxmoe.tokenizer import Tokenizer

__all__ = ["LoadOptions", "Transformer"]

Array = NDArray[Any]
Logits = Literal["all", "last", "none"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is held and computed; the defaults are those of `mxmoe.load`."""

    device: str = "cpu"
    dense: Literal["bf16", "int8"] = "bf16"
    kv: Literal["float32", "bf16", "int8"] = "float32"
    activations: Literal["float32", "bf16", "int8"] = "bf16"
    num_threads: int = 0
    backend: Literal["kernels", "reference"] = "kernels"
    adapter: Path | None = None


@dataclass(frozen=True)
class _Run:
    """New tokens, where each sequence's begin, which sequences of the cache they are, and the cache."""

    ids: NDArray[np.int64]
    bounds: list[int]
    sequences: list[int]
    cache: KVCache


class Transformer:
    """Embedding, layers and output head: what turns token ids into logits.

    Attributes
    ----------
    config : ModelConfig
    tokenizer : Tokenizer or None
        None without a ``tokenizer.json``.
    path : Path
        The checkpoint's folder.
    options : LoadOptions
        How it was loaded.
    embed_tokens : Embedding
    layers : list of DecoderLayer
        ``layers[i].self_attn.q_proj``, ``layers[i].mlp.router``, ``layers[i].mlp.experts`` and so on; their arrays
        can be looked at and, assigned anew, replaced.
    norm : RMSNorm
    lm_head : Linear
    rope : tuple of ndarray and float
        Rotary frequencies (head_dim / 2,) float64 and their scaling, as `mxmoe.ops.rope_inv_freq` gives them.
    """

    def __init__(
        self,
        config: ModelConfig,
        path: Path,
        options: LoadOptions,
        tokenizer: Tokenizer | None,
        embed_tokens: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        lm_head: Linear,
        device: Device,
    ) -> None:
        self.config, self.path, self.options, self.tokenizer = config, path, options, tokenizer
        self.embed_tokens, self.layers, self.norm, self.lm_head = embed_tokens, layers, norm, lm_head
        self._device = device
        self.rope: tuple[Array, float] = device.host_ops.rope_inv_freq(config.head_dim, **vars(config.rope))
        self._hooks: list[Hook] = []
        self._decoders: WeakKeyDictionary[KVCache, Decoder] = WeakKeyDictionary()
        self._replays: WeakKeyDictionary[KVCache, Replay] = WeakKeyDictionary()

    def __repr__(self) -> str:
        c, o = self.config, self.options
        device = "" if o.device == "cpu" else f"device={o.device}, "
        adapter = "" if o.adapter is None else f", adapter={o.adapter.name}"
        return (
            f"<mxmoe.{type(self).__name__} {self.path.name}: {c.num_hidden_layers} layers, {c.num_experts} experts, "
            f"{device}dense={o.dense}, kv={o.kv}, activations={o.activations}{adapter}>"
        )

    @property
    def sites(self) -> list[str]:
        """Names of all places that `forward` can capture and `hook` can change."""
        return site_names(self.config)

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """What every kind of weight is held in (``"dtype"``) and takes (``"bytes"``)."""
        layers = self.layers
        attention = [p for layer in layers for p in layer.self_attn.projections]
        experts = [layer.mlp.experts for layer in layers]
        norms = [n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        small = sum(layer.self_attn.sinks.nbytes for layer in layers)
        held = {
            "embedding": ("bf16", self.embed_tokens.weight.nbytes),
            "attention": ("+".join(sorted({p.dtype for p in attention})), sum(p.nbytes for p in attention)),
            "router": ("bf16", sum(layer.mlp.router.nbytes for layer in layers)),
            "experts": ("mxfp4", sum(e.packed_nbytes for e in experts)),
            "expert biases": ("bf16", sum(e.gate_up_bias.nbytes + e.down_bias.nbytes for e in experts)),
            "norms and sinks": ("bf16", small + sum(n.weight.nbytes for n in [*norms, self.norm])),
            "lm_head": (self.lm_head.dtype, self.lm_head.nbytes),
        }
        beside: list[Linear | Experts] = [*attention, *experts, *(layer.mlp.router for layer in layers), self.lm_head]
        if adapters := [part.adapter for part in beside if part.adapter is not None]:
            held["adapter"] = ("bf16", sum(adapter.nbytes for adapter in adapters))
        return {name: {"dtype": dtype, "bytes": int(size)} for name, (dtype, size) in held.items()}

    def new_cache(self, max_tokens: int, *, num_sequences: int = 1) -> KVCache:
        """Make an empty KV cache.

        Parameters
        ----------
        max_tokens : int
            Tokens that a sequence may reach, prompt and generated.
        num_sequences : int
            Sequences that the cache holds side by side.

        Returns
        -------
        KVCache
            In the dtype that the model was loaded with (`kv`).

        Raises
        ------
        ValueError
            `max_tokens` is below 1 or past the model's context.
        """
        return self._cache(max_tokens, num_sequences, self._device)

    def kv_cache_bytes(self, max_tokens: int, *, num_sequences: int = 1) -> int:
        """Tell what `new_cache` would take, without taking it."""
        return self._cache(max_tokens, num_sequences, HOST).nbytes

    def _cache(self, max_tokens: int, num_sequences: int, device: Device) -> KVCache:
        dtype: KVDtype = "float64" if self.options.backend == "reference" else self.options.kv
        sizes = {"num_sequences": num_sequences, "step_tokens": self._device.step_tokens}
        return KVCache(self.config, max_tokens, dtype=dtype, device=device, **sizes)

    def hook(self, name: str, fn: HookFunction) -> Hook:
        """Install a function that sees, and may replace, a value of every forward pass from now on.

        Parameters
        ----------
        name : str
            A site of `sites`, or a glob pattern of some (``"layers.*.router_logits"``).
        fn : callable
            Called as ``fn(value, context)`` with the rows of a step and a `HookContext`; returns an array of the
            same shape to go on with, or None to leave the value. It may change the value in place.

        Returns
        -------
        Hook
            Call its ``remove()``, or use it as a context manager.

        Raises
        ------
        ValueError
            The name matches no site.

        Examples
        --------
        >>> def ablate(logits, context):
        ...     logits[:, 3] = -np.inf  # expert 3 is never chosen
        >>> with model.hook("layers.*.router_logits", ablate):
        ...     text = model.complete("Once upon")
        """
        check_pattern(name, self.config, "hook")
        if not callable(fn):
            raise TypeError(f"fn is of type {type(fn).__name__}; wanted a function of (value, context)")
        hook = Hook(name, fn, self._hooks)
        self._hooks.append(hook)
        return hook

    @overload
    def forward(
        self,
        token_ids: ArrayLike,
        *,
        cache: KVCache | None = None,
        cu_seqlens: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        logits: Logits = "all",
        capture: None = None,
    ) -> Array: ...

    @overload
    def forward(
        self,
        token_ids: ArrayLike,
        *,
        cache: KVCache | None = None,
        cu_seqlens: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        logits: Logits = "all",
        capture: Sequence[str],
    ) -> tuple[Array, dict[str, Array]]: ...

    def forward(
        self,
        token_ids: ArrayLike,
        *,
        cache: KVCache | None = None,
        cu_seqlens: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        logits: Logits = "all",
        capture: Sequence[str] | None = None,
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Run new tokens through the model.

        Parameters
        ----------
        token_ids : array_like of int, shape (T,)
            New tokens of one sequence, or of several one after the other.
        cache : KVCache, optional
            Holds the tokens that came before and takes the new ones. Without it the tokens are whole sequences.
        cu_seqlens : sequence of int, optional
            Where each sequence's tokens begin, and T: ``[0, T]`` by default.
        sequences : sequence of int, optional
            Which sequences of the cache they belong to, each at most once; 0, 1, ... by default.
        logits : {"all", "last", "none"}
            Rows to compute logits for: every token, each sequence's last one, or none.
        capture : sequence of str, optional
            Sites (or glob patterns) to return the values of; see `sites` and `mxmoe.inspection.site_names`.

        Returns
        -------
        logits : ndarray, shape (T or num_sequences or 0, vocab_size), float32
        captured : dict of ndarray
            Only with `capture`: the values by site, a row for each token, copies.

        Raises
        ------
        ValueError, TypeError
            An id outside the vocabulary, offsets that do not fit, an unknown site, tokens that do not fit in the
            cache, or a cache of another model. The cache is then as before.
        """
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits is {logits!r}; wanted 'all', 'last' or 'none'")
        run = self._check(token_ids, cache, cu_seqlens, sequences)
        taps = Taps(self.config, self._hooks, capture, self._device)
        if logits != "none" and self._decodes(run, taps):
            result = self._decoder(run).logits(self, run.cache, run.ids, run.sequences)
        else:
            rows = self._run(run, taps, logits, self._device.get)
            result = np.concatenate(rows) if len(rows) > 1 else rows[0] if rows else self._no_logits()
        return result if capture is None else (result, taps.captured)

    __call__ = forward

    @property
    def chooses_on_device(self) -> bool:
        """Whether `likeliest` and `drawn` are there to be used: on a GPU."""
        return isinstance(self._device, Gpu)

    def likeliest(
        self,
        token_ids: ArrayLike,
        *,
        cache: KVCache,
        cu_seqlens: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        ahead: bool = False,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Run new tokens through a model on a GPU, and take the likeliest token after each sequence's last one.

        Logits stay on the GPU. Parameters and errors are those of `forward`; and

        Parameters
        ----------
        ahead : bool
            The next call will go on with the tokens that this one returns, most likely: the GPU then begins with
            them before they have been read here. If the call does not come, only time is lost.

        Returns
        -------
        token_ids : (num_sequences,) int64
            The lowest id among equals.
        logprobs : (num_sequences,) float32
            NaN where a logit is NaN or the largest is infinite.
        """
        run = self._check(token_ids, cache, cu_seqlens, sequences)
        taps = Taps(self.config, self._hooks, None, self._device)
        if self._decodes(run, taps):
            return self._decoder(run).choose(self, run.cache, run.ids, run.sequences, None, ahead)

        def choose(logits: Array) -> tuple[Array, Array]:
            ids, logprobs = self._device.ops.greedy_sample(logits)
            return self._device.get(ids), self._device.get(logprobs)

        chosen = self._run(run, taps, "last", choose)
        return np.concatenate([ids for ids, _ in chosen]), np.concatenate([logprobs for _, logprobs in chosen])

    def drawn(
        self,
        token_ids: ArrayLike,
        samplers: Sequence[Sampler],
        *,
        cache: KVCache,
        cu_seqlens: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        ahead: bool = False,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Run new tokens through a model on a GPU, and draw what follows each sequence's last one.

        The GPU does it in the place of samplers, with the numbers that they would use; its choice is theirs (see
        `mxmoe.cuda.sample`). Parameters, results and errors are those of `likeliest`; and

        Parameters
        ----------
        samplers : sequence of Sampler
            Of each sequence; each that draws has then used up one number.
        """
        run = self._check(token_ids, cache, cu_seqlens, sequences)
        taps = Taps(self.config, self._hooks, None, self._device)
        if self._decodes(run, taps):
            return self._decoder(run).choose(self, run.cache, run.ids, run.sequences, samplers, ahead)
        coming = iter(samplers)  # sequences end in their order
        chosen = self._run(run, taps, "last", lambda rows: draw(rows, list(itertools.islice(coming, len(rows)))))
        return np.concatenate([ids for ids, _ in chosen]), np.concatenate([logprobs for _, logprobs in chosen])

    def check_cache(self, cache: object) -> None:
        """Raise TypeError or ValueError unless `cache` is a cache of this model's configuration."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache is of type {type(cache).__name__}; wanted a KVCache, as new_cache makes it")
        if cache.config is not self.config and cache.config != self.config:
            raise ValueError("cache was made for a model of another configuration; wanted one of this model's own")
        if cache.device.name != self._device.name:
            raise ValueError(
                f"cache is on {cache.device.name!r}; wanted one on {self._device.name!r}, as the model is"
            )

    def _check(
        self,
        token_ids: ArrayLike,
        cache: KVCache | None,
        cu_seqlens: Sequence[int] | None,
        sequences: Sequence[int] | None,
    ) -> _Run:
        """Check what `forward` was given, and fill in the defaults."""
        ids = check_token_ids(token_ids, self.config.vocab_size)
        bounds = check_bounds(cu_seqlens, ids.size)
        counts = [end - begin for begin, end in itertools.pairwise(bounds)]
        if cache is None:
            cache = self.new_cache(max(counts), num_sequences=len(counts))
        self.check_cache(cache)
        which = check_sequences(sequences, len(counts))
        for sequence, count in zip(which, counts, strict=True):
            cache.check_room(sequence, count)
        return _Run(ids, bounds, which, cache)

    def _run(self, run: _Run, taps: Taps, logits: Logits, take: Callable[[Array], _T]) -> list[_T]:
        """Run new tokens step by step; what `take` makes of every step's logits on the device."""
        ids, bounds, cache = run.ids, run.bounds, run.cache
        taken = []
        with self._device.threads(self.options.num_threads):
            for begin in range(0, ids.size, cache.step_tokens):
                end = min(begin + cache.step_tokens, ids.size)
                # The part of every sequence that falls into this step.
                cut = [min(max(bound, begin), end) for bound in bounds]
                counts = [after - before for before, after in itertools.pairwise(cut)]
                numbers = [sequence for sequence, count in zip(run.sequences, counts, strict=True) if count]
                x = self._step(ids[begin:end], cache, numbers, [count for count in counts if count], taps)
                wanted = _wanted_rows(logits, bounds, begin, end)
                if len(wanted) < len(x):
                    rows = np.array(wanted, np.int64)
                    taps.positions, taps.sequences = taps.positions[rows], taps.sequences[rows]
                    if wanted:
                        x = self._device.ops.embedding(self._device.put(rows), x)  # those rows
                if wanted:
                    taken.append(take(self.head(x, taps)))
        return taken

    def _decodes(self, run: _Run, taps: Taps) -> bool:
        """Whether it is a decoding step that a GPU can replay: a token a sequence, and nobody watching."""
        return isinstance(self._device, Gpu) and taps.idle and len(run.ids) == len(run.sequences)

    def _decoder(self, run: _Run) -> Decoder:
        decoder = self._decoders.get(run.cache)
        if decoder is None:
            positions = np.arange(run.cache.max_tokens, dtype=np.int64)
            decoder = Decoder(run.cache, self._device.host_ops.rope_cos_sin(positions, *self.rope))
            self._decoders[run.cache] = decoder
        return decoder

    def _no_logits(self) -> Array:
        return np.zeros((0, self.config.vocab_size), np.float32)

    def _step(self, ids: Array, cache: KVCache, sequences: list[int], counts: list[int], taps: Taps) -> Array:
        """Run up to step_tokens new tokens through all layers; (T,) -> residual stream (T, H)."""
        held = cache.lengths
        lengths = np.array([held[s] for s in sequences], np.int64)
        pages = cache.reserve(sequences, counts)
        if taps.idle and len(ids) == len(sequences) and self._device.ops is kernels:
            residual = self._replay(cache).run(self, cache, ids, lengths, pages)
            if residual is not None:
                cache.commit(sequences, counts)
                return residual
        positions = np.concatenate(
            [np.arange(n, n + new, dtype=np.int64) for n, new in zip(lengths, counts, strict=True)]
        )
        taps.positions, taps.sequences = positions, np.repeat(np.array(sequences, np.int64), counts)
        cu_seqlens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        put, seq_lens = self._device.put, (lengths + counts).astype(np.int32)
        cos, sin = map(put, self._device.host_ops.rope_cos_sin(positions, *self.rope))
        num_blocks = -(-int(seq_lens.max()) // cache.block_size)  # what lies past them would be looked through
        places = {
            kind: Pages(put(at.slots), put(np.ascontiguousarray(at.block_table[:, :num_blocks])))
            for kind, at in pages.items()
        }
        x = self.body(put(ids), Step(cos, sin, put(cu_seqlens), put(seq_lens), places, cache, taps, self._device))
        cache.commit(sequences, counts)
        return x

    def _replay(self, cache: KVCache) -> Replay:
        replay = self._replays.get(cache)
        if replay is None:
            replay = self._replays[cache] = Replay()
        return replay

    def body(self, ids: Array, step: Step) -> Array:
        """(T,) -> residual stream (T, H)."""
        x: Array = step.tap("embedding", self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, step)
        return x

    def head(self, x: Array, tap: Tap, out: Array | None = None) -> Array:
        """(rows, H) -> logits (rows, vocab_size)."""
        logits: Array = self.lm_head(tap("final_norm", self.norm(x)), out=out)
        logits = tap("logits", logits)
        return logits


def _wanted_rows(logits: Logits, bounds: list[int], begin: int, end: int) -> list[int]:
    """Rows of the step from `begin` to `end` whose logits are wanted."""
    if logits == "all":
        return list(range(end - begin))
    return [bound - 1 - begin for bound in bounds[1:] if begin < bound <= end] if logits == "last" else []
