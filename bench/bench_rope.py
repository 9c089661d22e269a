"""rope of queries and keys, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from compare import assert_close
from harness import Peer, Work, copies
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import normal
from shapes import Shape, shapes


def torch_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the halves of each head."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    c, rng = shape.config, np.random.default_rng(0)
    heads = c.num_attention_heads if shape.what == "queries" else c.num_key_value_heads
    size = (shape.num_tokens, heads, c.head_dim)
    positions = np.arange(1000, 1000 + shape.num_tokens)
    angles = ops.rope_cos_sin(positions, *ops.rope_inv_freq(c.head_dim, **vars(c.rope)))
    nbytes = 8 * np.prod(size) + 2 * angles[0].nbytes
    inputs = [normal(rng, size) for _ in range(copies(nbytes))]
    out = np.empty(size, np.float32)
    tensors = [torch.from_numpy(a) for a in angles]

    def check() -> None:
        got, x = ops.rope(inputs[0], *angles)[:2], inputs[0][:2]
        few: list[Any] = [a[:2] for a in angles]
        baseline = torch_rope(torch.from_numpy(x), *(torch.from_numpy(a) for a in few))
        assert_close(got, reference.rope(x, *few), baseline=baseline)

    return Work(
        "rope", str(shape), [partial(ops.rope, x, *angles, out=out) for x in inputs], float(nbytes),
        3.0 * np.prod(size), "float32", check,
        Peer("torch", [partial(torch_rope, torch.from_numpy(x), *tensors) for x in inputs]),
    )  # fmt: skip


@pytest.mark.parametrize("shape", shapes(("queries",), full_whats=("keys",), both_sizes=False), ids=str)
def bench_rope(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
