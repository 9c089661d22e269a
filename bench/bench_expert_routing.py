"""expert_routing, against torch's topk and softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from harness import Peer, Work, copies
from mxmoe import ops
from mxmoe.reference import ops as reference
from op_helpers import normal
from shapes import Shape, shapes


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    c, rng = shape.config, np.random.default_rng(0)
    nbytes = shape.num_tokens * (4 * c.num_experts + 8 * c.experts_per_token)
    inputs = [normal(rng, (shape.num_tokens, c.num_experts)) for _ in range(copies(nbytes))]

    def torch_routing(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, ids = torch.topk(logits, c.experts_per_token)
        return ids, torch.softmax(values, dim=-1)

    def check() -> None:
        ids, shares = ops.expert_routing(inputs[0], c.experts_per_token)
        want_ids, want_shares = reference.expert_routing(inputs[0], c.experts_per_token)
        assert_exact(ids, want_ids)
        assert_close(shares, want_shares, baseline=torch_routing(torch.from_numpy(inputs[0]))[1])

    return Work(
        "expert_routing", str(shape), [partial(ops.expert_routing, x, c.experts_per_token) for x in inputs],
        nbytes, 0.0, "float32", check,
        Peer("torch", [partial(torch_routing, torch.from_numpy(x)) for x in inputs]),
    )  # fmt: skip


@pytest.mark.parametrize("shape", shapes(), ids=str)
def bench_expert_routing(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
