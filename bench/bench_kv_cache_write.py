"""kv_cache_write of new tokens, against torch's assignment by index."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from compare import assert_exact
from harness import Peer, Work, copies
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import normal
from shapes import Shape, shapes

BLOCK_SIZE = 64
KV = {"bf16": ml_dtypes.bfloat16, "float32": np.float32, "int8": np.int8}


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    c, rng, dtype = shape.config, np.random.default_rng(0), np.dtype(KV[shape.mode])
    size = (shape.num_tokens, c.num_key_value_heads, c.head_dim)
    scale = 4 if shape.mode == "int8" else 0
    nbytes = 2 * shape.num_tokens * c.num_key_value_heads * (c.head_dim * (4 + dtype.itemsize) + scale)
    count = copies(nbytes)
    blocks = -(-shape.num_tokens // BLOCK_SIZE)
    cache = (blocks * count, c.num_key_value_heads, BLOCK_SIZE, c.head_dim)
    k, v = normal(rng, size), normal(rng, size)

    def new_cache() -> list[Any]:
        held = [np.zeros(cache, dtype), np.zeros(cache, dtype)]
        return held + ([np.zeros(cache[:3], np.float32) for _ in range(2)] if scale else [None, None])

    slots = [i * blocks * BLOCK_SIZE + rng.permutation(blocks * BLOCK_SIZE)[: shape.num_tokens] for i in range(count)]

    def write(held: list[Any], at: Any, op: Callable[..., Any] = ops.kv_cache_write) -> None:
        op(k, v, held[0], held[1], at, k_scales=held[2], v_scales=held[3])

    def check() -> None:
        got, want = new_cache(), new_cache()
        write(got, slots[0])
        write(want, slots[0], reference.kv_cache_write)
        for a, b in zip(got[:2], want[:2], strict=True):
            near = (
                np.abs(a.astype(np.float32) - b.astype(np.float32)).max() <= 1
            )  # a tie may round either way in int8
            assert near if scale else assert_exact(a, b) is None

    held = new_cache()
    torch_dtype = {"bf16": torch.bfloat16, "float32": torch.float32}.get(shape.mode)
    peer = None
    if torch_dtype is not None:
        caches = [torch.zeros(cache[0], BLOCK_SIZE, *size[1:], dtype=torch_dtype).flatten(0, 1) for _ in range(2)]
        rows = [torch.from_numpy(k), torch.from_numpy(v)]
        indices = [torch.from_numpy(at) for at in slots]

        def index_put(at: torch.Tensor) -> None:
            for whole, new in zip(caches, rows, strict=True):
                whole[at] = new.to(whole.dtype)

        peer = Peer("torch index_put", [partial(index_put, at) for at in indices])
    return Work(
        "kv_cache_write", str(shape), [partial(write, held, at) for at in slots], nbytes, 0.0, "float32", check, peer
    )  # fmt: skip


@pytest.mark.parametrize("shape", shapes(modes=("bf16", "int8"), full_modes=("float32",), both_sizes=False), ids=str)
def bench_kv_cache_write(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
