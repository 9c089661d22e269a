"""embedding from the true vocabulary, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from compare import assert_exact
from harness import Peer, Work, copies
from make_checkpoint import Weights
from mxmoe import ops
from op_helpers import to_torch
from shapes import Shape, shapes


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    c, rng = shape.config, np.random.default_rng(0)
    weights = Weights(c, 0)
    weight = np.concatenate(list(weights.pieces("embed_tokens", 0))).reshape(c.vocab_size, c.hidden_size)
    nbytes = 6 * shape.num_tokens * c.hidden_size
    ids = [rng.integers(0, c.vocab_size, shape.num_tokens) for _ in range(copies(nbytes))]
    out = np.empty((shape.num_tokens, c.hidden_size), np.float32)
    table = to_torch(weight)

    def torch_embedding(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(rows, table).float()

    def check() -> None:
        assert_exact(ops.embedding(ids[0], weight), weight[ids[0]].astype(np.float32))

    return Work(
        "embedding", str(shape), [partial(ops.embedding, rows, weight, out=out) for rows in ids], nbytes, 0.0,
        "float32", check, Peer("torch", [partial(torch_embedding, torch.from_numpy(rows)) for rows in ids]),
    )  # fmt: skip


@pytest.mark.parametrize("shape", shapes(both_sizes=False), ids=str)
def bench_embedding(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
