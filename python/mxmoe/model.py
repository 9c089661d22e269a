"""The model's forward pass: layers over a cache, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxmoe.config import ModelConfig
from mxmoe.inspection import Hook, HookFunction, Taps, check_pattern, site_names
from mxmoe.kv_cache import KVCache, KVDtype
from mxmoe.layers import DecoderLayer, Embedding, Experts, Linear, RMSNorm, Step
from mxmoe.tokenizer import Tokenizer

__all__ = ["LoadOptions", "Transformer"]

Array = NDArray[Any]
Logits = Literal["all", "last", "none"]

# New tokens that pass through the layers at a time: enough to use every weight tile many times, few enough that the
# experts' working memory stays around 100 MB at gpt-oss's sizes.
_STEP_TOKENS = 512


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
    ) -> None:
        self.config, self.path, self.options, self.tokenizer = config, path, options, tokenizer
        self.embed_tokens, self.layers, self.norm, self.lm_head = embed_tokens, layers, norm, lm_head
        self._ops = embed_tokens.ops
        self._rope = self._ops.rope_inv_freq(config.head_dim, **vars(config.rope))
        self._hooks: list[Hook] = []

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<mxmoe.{type(self).__name__} {self.path.name}: {c.num_hidden_layers} layers, {c.num_experts} experts, "
            f"dense={self.options.dense}, kv={self.options.kv}, activations={self.options.activations}"
            f"{'' if self.options.adapter is None else f', adapter={self.options.adapter.name}'}>"
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
        dtype: KVDtype = "float64" if self.options.backend == "reference" else self.options.kv
        return KVCache(self.config, max_tokens, num_sequences=num_sequences, dtype=dtype, step_tokens=_STEP_TOKENS)

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
        ids = check_token_ids(token_ids, self.config.vocab_size)
        bounds = _check_bounds(cu_seqlens, ids.size)
        counts = np.diff(bounds)
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits is {logits!r}; wanted 'all', 'last' or 'none'")
        if cache is None:
            cache = self.new_cache(max(1, int(counts.max())), num_sequences=len(counts))
        self.check_cache(cache)
        which = _check_sequences(sequences, len(counts))
        for sequence, count in zip(which, counts, strict=True):
            cache.check_room(sequence, int(count))
        taps = Taps(self.config, self._hooks, capture)

        rows = []
        with self._threads():
            for begin in range(0, ids.size, cache.step_tokens):
                end = min(begin + cache.step_tokens, ids.size)
                # The part of every sequence that falls into this step.
                cut = np.clip(bounds, begin, end) - begin
                present = [i for i in range(len(counts)) if cut[i + 1] > cut[i]]
                x = self._step(ids[begin:end], cache, [which[i] for i in present], np.diff(cut)[present], taps)
                wanted = _wanted_rows(logits, bounds, begin, end)
                taps.positions, taps.sequences = taps.positions[wanted], taps.sequences[wanted]
                if wanted.size:
                    x = taps("final_norm", self.norm(np.ascontiguousarray(x[wanted])))
                    rows.append(taps("logits", self.lm_head(x)))
        result = np.concatenate(rows) if len(rows) > 1 else rows[0] if rows else self._no_logits()
        return result if capture is None else (result, taps.captured)

    __call__ = forward

    def check_cache(self, cache: object) -> None:
        """Raise TypeError or ValueError unless `cache` is a cache of this model's configuration."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache is of type {type(cache).__name__}; wanted a KVCache, as new_cache makes it")
        if cache.config != self.config:
            raise ValueError("cache was made for a model of another configuration; wanted one of this model's own")

    def _no_logits(self) -> Array:
        return np.zeros((0, self.config.vocab_size), np.float32)

    def _threads(self) -> Any:
        if self.options.backend == "reference":
            return nullcontext()
        return self._ops.num_threads(self.options.num_threads)

    def _step(self, ids: Array, cache: KVCache, sequences: list[int], counts: Array, taps: Taps) -> Array:
        """Run up to step_tokens new tokens through all layers; (T,) -> residual stream (T, H)."""
        lengths = np.array([cache.lengths[s] for s in sequences], np.int64)
        pages = cache.reserve(sequences, [int(n) for n in counts])
        positions = np.concatenate(
            [np.arange(n, n + new, dtype=np.int64) for n, new in zip(lengths, counts, strict=True)]
        )
        taps.positions, taps.sequences = positions, np.repeat(np.array(sequences, np.int64), counts)
        cos, sin = self._ops.rope_cos_sin(positions, *self._rope)
        cu_seqlens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        step = Step(cos, sin, cu_seqlens, (lengths + counts).astype(np.int32), pages, cache, taps)

        x = taps("embedding", self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, step)
        cache.commit(sequences, [int(n) for n in counts])
        return x


def _integers(name: str, values: ArrayLike) -> Array:
    """Convert to a vector of integers; ValueError for what is none."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} is ragged; wanted a vector of integers") from None
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; wanted a non-empty vector of integers"
        )
    return array


def check_token_ids(token_ids: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    """Convert to int64 what is a non-empty vector of ids below `vocab_size`; ValueError for everything else."""
    ids = _integers("token_ids", token_ids)
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(f"token_ids holds {bad}; wanted 0 to {vocab_size - 1}")
    return ids.astype(np.int64)


def _check_bounds(cu_seqlens: Sequence[int] | None, num_tokens: int) -> NDArray[np.int64]:
    bounds = _integers("cu_seqlens", [0, num_tokens] if cu_seqlens is None else cu_seqlens)
    if bounds.size < 2 or bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens is {bounds.tolist()}; wanted it to run from 0 to {num_tokens}")
    if (bounds[1:] <= bounds[:-1]).any():
        raise ValueError(f"cu_seqlens is {bounds.tolist()}; wanted at least one token for every sequence")
    return bounds.astype(np.int64)


def _check_sequences(sequences: Sequence[int] | None, count: int) -> list[int]:
    which: list[int] = _integers("sequences", range(count) if sequences is None else sequences).tolist()
    if len(which) != count or len(set(which)) != count:
        raise ValueError(f"sequences is {which}; wanted {count} different numbers, as many as cu_seqlens has")
    return which


def _wanted_rows(logits: Logits, bounds: Array, begin: int, end: int) -> NDArray[np.int64]:
    """Rows of the step from `begin` to `end` whose logits are wanted."""
    if logits == "all":
        return np.arange(end - begin)
    last = bounds[1:] - 1
    return last[(last >= begin) & (last < end)] - begin if logits == "last" else np.zeros(0, np.int64)
