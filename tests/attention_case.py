"""Inputs of sink_attention in a paged cache, and the op again in a page of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compare import assert_close
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import BF16, normal, to_torch, wide

KV_DTYPES = ["float32", "bfloat16", "int8"]
# Dtype of the cache, and what queries and weights are rounded to before they meet it (nothing unless it says so).
KV_MODES = [*KV_DTYPES, "bfloat16/bf16", "int8/bf16"]


def quantize_rows(x: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each last axis to 127 steps of its largest magnitude."""
    scale = (np.abs(x).max(axis=-1) / np.float32(127)).astype(np.float32)
    return np.rint(x / np.maximum(scale, 1e-30)[..., None]).astype(np.int8), scale


@dataclass
class Stored:
    """Keys or values of one sequence (length, heads, head_dim) as a cache holds them."""

    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None

    @property
    def wide(self) -> NDArray[np.float64]:
        return wide(self.values) if self.scales is None else wide(self.values) * wide(self.scales)[..., None]


def store(x: NDArray[np.float32], dtype: str) -> Stored:
    if dtype == "int8":
        return Stored(*quantize_rows(x))
    return Stored(x.astype(BF16 if dtype == "bfloat16" else np.float32))


@dataclass
class AttentionCase:
    """Sequences, each with its new tokens and all its keys; where the keys lie is chosen in `kwargs`."""

    q: NDArray[Any]
    sequences: list[tuple[int, int]]  # (new tokens, keys)
    keys: list[Stored]
    values: list[Stored]
    sinks: NDArray[Any]
    sm_scale: float
    window: int | None = None
    block_size: int = 16
    page_seed: int = 0
    activations: str = "float32"

    @property
    def rounds(self) -> bool:
        """Whether queries and weights are rounded."""
        return self.activations != "float32" and self.keys[0].values.dtype != np.float32

    @property
    def rounded_q(self) -> NDArray[np.float64]:
        """The queries as they meet the cache."""
        if not self.rounds:
            return wide(self.q)
        if self.keys[0].scales is None:
            return wide(self.q.astype(BF16))
        q = self.q.astype(np.float32)
        amax = np.maximum(np.abs(q).max(axis=-1, keepdims=True), np.float32(1e-30))
        return wide(np.rint(q * (np.float32(16256) / amax))) * wide(amax) / 16256

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        return np.cumsum([0] + [new for new, _ in self.sequences]).astype(np.int32)

    def first_needed(self, b: int) -> int:
        new, length = self.sequences[b]
        return 0 if not self.window else max(0, length - new - self.window + 1)

    def block_table(self) -> tuple[NDArray[np.int32], int]:
        """Permuted blocks, some spare; -1 where no query looks."""
        width = max((-(-length // self.block_size) for _, length in self.sequences), default=0) + 1
        table = np.full((len(self.sequences), width), -1, np.int32)
        for b, (new, length) in enumerate(self.sequences):
            if new:
                table[b, self.first_needed(b) // self.block_size : -(-length // self.block_size)] = 0
        used = np.argwhere(table == 0)
        num_blocks = len(used) + 3
        pages = np.random.default_rng(self.page_seed).permutation(num_blocks)
        table[tuple(used.T)] = pages[: len(used)]
        return table, num_blocks

    def cache(self, which: list[Stored], table: NDArray[np.int32], num_blocks: int) -> Any:
        """A cache with poison in every slot that no query looks at."""
        _, heads, head_dim = which[0].values.shape
        dtype = which[0].values.dtype
        cache = np.full((num_blocks, heads, self.block_size, head_dim), -128 if dtype == np.int8 else np.nan, dtype)
        scales = np.full(cache.shape[:3], np.nan, np.float32) if which[0].scales is not None else None
        for b, (new, length) in enumerate(self.sequences):
            at = np.arange(self.first_needed(b), length if new else 0)
            block, place = table[b, at // self.block_size], at % self.block_size
            cache[block, :, place] = which[b].values[at]
            if scales is not None:
                scales[block, :, place] = which[b].scales[at]
        return cache, scales

    @property
    def kwargs(self) -> dict[str, Any]:
        table, num_blocks = self.block_table()
        k_cache, k_scales = self.cache(self.keys, table, num_blocks)
        v_cache, v_scales = self.cache(self.values, table, num_blocks)
        return {
            "k_cache": k_cache,
            "v_cache": v_cache,
            "sinks": self.sinks,
            "block_table": table,
            "cu_seqlens": self.cu_seqlens,
            "seq_lens": np.array([length for _, length in self.sequences], np.int32),
            "sm_scale": self.sm_scale,
            "sliding_window": self.window,
            "activations": self.activations,
            "k_scales": k_scales,
            "v_scales": v_scales,
        }

    def run(self, op: Any = ops.sink_attention, **changes: Any) -> Any:
        return op(self.q, **(self.kwargs | changes))

    def tail(self, b: int, start: int, stop: int) -> AttentionCase:
        """Sequence b alone, its new tokens [start, stop) of all its positions, and no keys behind them."""
        new, length = self.sequences[b]
        first = self.cu_seqlens[b] - (length - new)
        return replace(
            self,
            q=self.q[first + start : first + stop],
            sequences=[(stop - start, stop)],
            keys=[self.keys[b]],
            values=[self.values[b]],
        )


def make(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    kv_dtype: str = "float32",
    q_dtype: str = "float32",
    sinks_dtype: str = "float32",
    seed: int = 0,
    **options: Any,
) -> AttentionCase:
    """Draw a case with `heads` = (attention heads, key/value heads) and `kv_dtype` as in `KV_MODES`."""
    kv_dtype, _, activations = kv_dtype.partition("/")
    rng = np.random.default_rng(seed)
    num_tokens = sum(new for new, _ in sequences)
    keys, values = (
        [store(normal(rng, (length, heads[1], head_dim)), kv_dtype) for _, length in sequences] for _ in range(2)
    )
    return AttentionCase(
        q=normal(rng, (num_tokens, heads[0], head_dim), q_dtype, 2.0),
        sequences=sequences,
        keys=keys,
        values=values,
        sinks=normal(rng, (heads[0],), sinks_dtype),
        sm_scale=head_dim**-0.5,
        activations=activations or "float32",
        **options,
    )


def padded_left(case: AttentionCase, starts: list[int]) -> tuple[NDArray[Any], dict[str, Any], NDArray[np.bool_]]:
    """The same sequences with `starts` places of poison before their first keys, and queries there in new ones."""
    extra = [start if new == length else 0 for (new, length), start in zip(case.sequences, starts, strict=True)]
    parts = np.split(case.q, case.cu_seqlens[1:-1])
    queries = [np.concatenate([np.ones((n, *q.shape[1:]), q.dtype), q]) for n, q in zip(extra, parts, strict=True)]

    def shift(stored: list[Stored]) -> list[Stored]:
        shifted = []
        for x, start in zip(stored, starts, strict=True):
            values = np.concatenate([np.full((start, *x.values.shape[1:]), 127, x.values.dtype), x.values])
            scales = x.scales
            if scales is not None:
                scales = np.concatenate([np.full((start, scales.shape[1]), np.nan, np.float32), scales])
            elif start:
                values[:start] = np.nan
            shifted.append(Stored(values, scales))
        return shifted

    longer = replace(
        case,
        q=np.concatenate(queries),
        sequences=[
            (new + n, length + start) for (new, length), n, start in zip(case.sequences, extra, starts, strict=True)
        ],
        keys=shift(case.keys),
        values=shift(case.values),
    )
    own = np.concatenate([np.arange(len(q)) >= n for q, n in zip(queries, extra, strict=True)])
    kwargs = longer.kwargs | {
        "seq_lens": np.array([length for _, length in case.sequences], np.int32),
        "key_starts": np.array(starts, np.int32),
    }
    return longer.q, kwargs, own


def rounded_by_steps(scores: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights times their values' scales, as integers of a step of 64 keys hold them.

    `scores` (..., keys) are -infinity where a key is not seen; `scales` (..., keys).
    """
    pad = (0, -scores.shape[-1] % 64)
    seen = torch.nn.functional.pad(scores, pad, value=-torch.inf).unflatten(-1, (-1, 64))
    scales = torch.nn.functional.pad(scales.expand_as(scores), pad).unflatten(-1, (-1, 64))
    scales = scales.masked_fill(seen.isinf(), 0.0)
    largest = seen.amax(dim=-1, keepdim=True).clamp(min=-1e30)
    weights = torch.exp(seen - largest) * scales
    unit = weights.amax(dim=-1, keepdim=True).clamp(min=1e-30) / 32768
    top = largest.amax(dim=-2, keepdim=True)
    return ((weights / unit).round() * unit * torch.exp(largest - top)).flatten(-2)[..., : scores.shape[-1]]


def torch_attention(
    case: AttentionCase, dtype: str = "float32", *, by_steps: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and sink share, from one masked softmax a sequence in float32, rounding what the case says.

    With `by_steps` the weights of an int8 cache are rounded as AVX-512 with VNNI does it.
    """
    q, sinks = torch.from_numpy(case.rounded_q).float(), to_torch(case.sinks).float()
    y, share = torch.zeros(q.shape), torch.zeros(q.shape[:2])
    cu = case.cu_seqlens
    for b, (new, length) in enumerate(case.sequences):
        if not new:
            continue
        group = q.shape[1] // case.keys[b].values.shape[1]
        k = torch.from_numpy(case.keys[b].wide).float().repeat_interleave(group, dim=1)
        v = torch.from_numpy(wide(case.values[b].values)).float().repeat_interleave(group, dim=1)
        age = torch.arange(length - new, length)[:, None] - torch.arange(length)[None]
        seen = (age >= 0) & (age < (case.window or length + 1))
        scores = torch.einsum("thd,jhd->htj", q[cu[b] : cu[b + 1]], k) * case.sm_scale
        scores = scores.masked_fill(~seen, -torch.inf)
        logits = torch.cat([scores, sinks[:, None, None].expand(-1, new, 1)], dim=-1)
        powers = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        weights, sink = powers[..., :-1], powers[..., -1:]
        total = powers.sum(dim=-1, keepdim=True)
        if case.values[b].scales is not None:
            scales = torch.from_numpy(case.values[b].scales).T.repeat_interleave(group, dim=0)[:, None]
            weights = weights * scales
            if case.rounds and by_steps:
                top = (scores.amax(dim=-1, keepdim=True) - logits.amax(dim=-1, keepdim=True)).exp()
                weights = rounded_by_steps(scores, scales) * top
            elif case.rounds:
                weights = weights.bfloat16().float()
        elif case.rounds:
            weights = weights.bfloat16().float()
            total = weights.sum(dim=-1, keepdim=True) + sink
        y[cu[b] : cu[b + 1]] = (torch.einsum("htj,jhd->htd", weights, v) / total).transpose(0, 1)
        share[cu[b] : cu[b + 1]] = (sink / total)[..., 0].T
    return y.to(getattr(torch, dtype)), share


def expected(case: AttentionCase) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Result of the reference for the queries as they meet the cache, and the size that errors are measured in."""
    exact = replace(case, q=case.rounded_q)
    # Values of both signs may cancel: errors are measured against what the same weights make of their magnitudes.
    magnitudes = exact.run(reference.sink_attention, v_cache=np.abs(wide(case.kwargs["v_cache"])))
    return exact.run(reference.sink_attention), np.sqrt(np.mean(magnitudes**2, axis=-1, keepdims=True))


def check_attention(got: Any, case: AttentionCase, dtype: str = "float32") -> None:
    """Compare a result with the reference, next to torch's."""
    want, scale = expected(case)
    coarsest = "bfloat16" if case.rounds else dtype
    baseline = torch_attention(case, dtype)[0]
    assert_close(got, want, baseline=baseline, dtype=coarsest, out_dtype=dtype, scale=scale)
