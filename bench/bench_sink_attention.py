"""sink_attention over a paged cache, against torch's attention on contiguous keys, without sinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from compare import assert_close
from harness import Peer, Work, copies
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import normal
from shapes import Shape, shapes

BLOCK_SIZE = 64
KV = {"bf16": ml_dtypes.bfloat16, "float32": np.float32, "int8": np.int8}
DTYPES = {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}
# Tokens in the cache before the new ones; "window" for a sliding layer.
DEPTHS, FULL_DEPTHS = ("depth 4096", "window"), ("depth 0", "depth 32768")


@dataclass
class Case:
    """Sequences of one length, each with as many new tokens."""

    shape: Shape
    batch: int
    new: int
    keys: int
    window: int | None
    q: NDArray[np.float32]
    kwargs: dict[str, Any]

    def run(self, op: Callable[..., Any] = ops.sink_attention, **changes: Any) -> Any:
        return op(self.q, **(self.kwargs | changes))

    @property
    def seen(self) -> int:
        """Keys that the new tokens of a sequence see, summed over them."""
        position = np.arange(self.keys - self.new, self.keys) + 1
        return int(np.minimum(position, self.window or self.keys).sum())

    @property
    def kv_bytes(self) -> int:
        """Keys and values that some new token sees, each once."""
        c = self.shape.config
        head = c.head_dim * np.dtype(KV[self.shape.mode]).itemsize + (4 if self.shape.mode == "int8" else 0)
        held = self.keys if self.window is None else min(self.keys, self.window - 1 + self.new)
        return 2 * c.num_key_value_heads * head * held * self.batch


def make_case(shape: Shape, seed: int) -> Case:
    """Fill a cache; sequences take their blocks in turn, so that none is contiguous."""
    c, rng = shape.config, np.random.default_rng(seed)
    batch, new = (shape.num_tokens, 1) if shape.phase.startswith("decode") else (1, shape.num_tokens)
    sliding = shape.what == "window"
    keys = new + (4096 if sliding else int(shape.what.split()[1]))
    width = -(-keys // BLOCK_SIZE)
    table = np.arange(batch * width, dtype=np.int32).reshape(width, batch).T.copy()
    cache = (batch * width, c.num_key_value_heads, BLOCK_SIZE, c.head_dim)
    held: dict[str, Any] = {"k_cache": np.zeros(cache, KV[shape.mode]), "v_cache": np.zeros(cache, KV[shape.mode])}
    held |= {"k_scales": None, "v_scales": None}
    if shape.mode == "int8":
        held |= {name: np.zeros(cache[:3], np.float32) for name in ("k_scales", "v_scales")}
    for begin in range(0, cache[0] * BLOCK_SIZE, 4096):
        slots = np.arange(begin, min(begin + 4096, cache[0] * BLOCK_SIZE))
        k, v = (normal(rng, (len(slots), c.num_key_value_heads, c.head_dim)) for _ in range(2))
        scales = {name: held[name] for name in ("k_scales", "v_scales")}
        ops.kv_cache_write(k, v, held["k_cache"], held["v_cache"], slots, **scales)
    window = c.sliding_window if sliding else None
    kwargs = held | {
        "sinks": normal(rng, (c.num_attention_heads,)),
        "block_table": table,
        "cu_seqlens": np.arange(batch + 1, dtype=np.int32) * new,
        "seq_lens": np.full(batch, keys, np.int32),
        "sm_scale": c.sm_scale,
        "sliding_window": window,
    }
    q = normal(rng, (batch * new, c.num_attention_heads, c.head_dim))
    return Case(shape, batch, new, keys, window, q, kwargs)


def gathered(case: Case, name: str) -> torch.Tensor:
    """Keys or values in order, (batch, heads, keys, head_dim), float32."""
    cache = case.kwargs[f"{name}_cache"].astype(np.float32)
    if case.kwargs[f"{name}_scales"] is not None:
        cache *= case.kwargs[f"{name}_scales"][..., None]
    pages = cache[case.kwargs["block_table"]].swapaxes(1, 2)  # (batch, heads, blocks, block, head_dim)
    return torch.from_numpy(pages.reshape(*pages.shape[:2], -1, pages.shape[-1])[:, :, : case.keys].copy())


def torch_attention(case: Case, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Return the same by torch, but for the sink, which it does not have."""
    c = case.shape.config
    first = 0 if case.window is None else max(0, case.keys - case.new - case.window + 1)
    k, v = (gathered(case, name)[:, :, first:].to(dtype) for name in "kv")
    q = torch.from_numpy(case.q).reshape(case.batch, case.new, -1, c.head_dim).transpose(1, 2).to(dtype)
    position = torch.arange(case.keys - case.new, case.keys)[:, None]
    key = torch.arange(first, case.keys)
    seen = (key <= position) & (position - key < (case.window or case.keys))
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).to(dtype)
    causal = case.new == case.keys and case.window is None
    options = {"is_causal": True} if causal else {"attn_mask": None if case.new == 1 else mask}
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(q, k, v, scale=c.sm_scale, enable_gqa=True, **options)


def last_token(case: Case) -> torch.Tensor:
    """Compute the last token of the first sequence by torch in float32, sink included: (1, heads, head_dim)."""
    first = 0 if case.window is None else max(0, case.keys - case.window)
    k, v = (gathered(case, name)[0, :, first:] for name in "kv")  # (key/value heads, keys, head_dim)
    q = torch.from_numpy(case.q[case.new - 1]).reshape(k.shape[0], -1, k.shape[-1])
    sinks = torch.from_numpy(case.kwargs["sinks"]).reshape(*q.shape[:2], 1)
    scores = torch.cat([q @ k.transpose(1, 2) * case.shape.config.sm_scale, sinks], dim=-1)
    return (torch.softmax(scores, dim=-1)[..., :-1] @ v).reshape(1, -1, k.shape[-1])


def check(case: Case) -> None:
    """Compare the last token of the first sequence with float64, as near as torch in float32 is."""
    got = case.run()[case.new - 1 : case.new]
    last = {"cu_seqlens": [0, 1], "seq_lens": case.kwargs["seq_lens"][:1]}
    want = reference.sink_attention(case.q[case.new - 1 : case.new], **(case.kwargs | last))
    assert_close(got, want, baseline=last_token(case), dtype=DTYPES[case.shape.mode], out_dtype="float32")


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    c = shape.config
    first = make_case(shape, 0)
    nbytes = first.kv_bytes + 2 * first.q.nbytes
    whole = first.batch * first.keys * c.num_key_value_heads * c.head_dim * 4
    cases = [first, *(make_case(shape, seed) for seed in range(1, min(copies(nbytes), copies(whole))))]
    out = np.empty_like(first.q)

    dtype = torch.float32 if shape.mode == "float32" else torch.bfloat16
    operations = 4.0 * c.num_attention_heads * c.head_dim * first.seen * first.batch
    return Work(
        "sink_attention", str(shape), [partial(case.run, out=out) for case in cases], nbytes, operations, shape.mode,
        lambda: check(first),
        Peer(f"torch sdpa {str(dtype)[6:]}, no sink", [torch_attention(case, dtype) for case in cases]),
    )  # fmt: skip


SHAPES = [
    shape
    for shape in shapes(DEPTHS, ("bf16", "int8"), full_whats=FULL_DEPTHS, full_modes=("float32",), both_sizes=False)
    if shape.phase != "decode x16" or shape.what != "depth 32768"  # whose copies for torch take 8 GB
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sink_attention(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
