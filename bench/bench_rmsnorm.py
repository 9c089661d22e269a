"""rmsnorm of the residual stream, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from compare import assert_close
from harness import Peer, Work, copies
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import normal, to_torch
from shapes import Shape, shapes


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    tokens, hidden = shape.num_tokens, shape.config.hidden_size
    nbytes = 8 * tokens * hidden + 2 * hidden
    rng = np.random.default_rng(0)
    weight = normal(rng, (hidden,), "bfloat16")
    inputs = [normal(rng, (tokens, hidden)) for _ in range(copies(nbytes))]
    out = np.empty((tokens, hidden), np.float32)
    wide = to_torch(weight).float()

    def torch_norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (hidden,), wide, 1e-5)

    def check() -> None:
        x = inputs[0][:2]
        want = reference.rmsnorm(x, weight)
        assert_close(ops.rmsnorm(inputs[0], weight)[:2], want, baseline=torch_norm(torch.from_numpy(x)))

    return Work(
        "rmsnorm", str(shape), [partial(ops.rmsnorm, x, weight, out=out) for x in inputs], nbytes,
        4.0 * tokens * hidden, "float32", check,
        Peer("torch", [partial(torch_norm, torch.from_numpy(x)) for x in inputs]),
    )  # fmt: skip


@pytest.mark.parametrize("shape", shapes(both_sizes=False), ids=str)
def bench_rmsnorm(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
