"""mxfp4_moe at a layer's true shape. There is no peer: no framework computes on MXFP4 weights on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from compare import assert_close
from harness import Work, copies
from make_checkpoint import Weights
from moe_case import WEIGHTS, MoeCase, torch_moe
from mxmoe import ops
from mxmoe.costs import Costs, distinct_experts
from mxmoe.reference import ops as reference
from op_helpers import normal
from shapes import Shape, shapes

DTYPES = {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}


def make_weights(shape: Shape) -> dict[str, Any]:
    """Make the experts of one layer, as the op takes them."""
    weights = Weights(shape.config, 0)
    return {name: np.concatenate(list(weights.pieces(name, 0))).reshape(weights.shapes[name]) for name in WEIGHTS}


def make_case(shape: Shape, weights: dict[str, Any], seed: int) -> MoeCase:
    """Tokens that choose their experts evenly."""
    c, rng = shape.config, np.random.default_rng(seed)
    logits = normal(rng, (shape.num_tokens, c.num_experts))
    ids, shares = ops.expert_routing(logits, c.experts_per_token)
    x = normal(rng, (shape.num_tokens, c.hidden_size))
    return MoeCase(x, ids, shares, weights, normal(rng, x.shape))


def check(case: MoeCase, activations: str) -> None:
    """Compare one token with float64, as near as torch at the same roundings is."""
    got = case.run(activations)[:1]
    one = case.rows(slice(0, 1))
    want = one.run(activations, reference.mxfp4_moe)
    assert_close(
        got, want, baseline=torch_moe(one, activations), dtype=DTYPES[activations], out_dtype="float32"
    )  # fmt: skip


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    c = shape.config
    weights = make_weights(shape)
    expert = 2 * 3 * c.intermediate_size * c.hidden_size
    read = distinct_experts(c.num_experts, c.experts_per_token, shape.num_tokens)
    nbytes = read * Costs(c).expert_bytes + 12 * shape.num_tokens * c.hidden_size
    # Another choice of experts each time is other memory.
    cases = [
        make_case(shape, weights, seed) for seed in range(max(8, copies(nbytes)) if shape.num_tokens == 1 else 2)
    ]
    out = np.empty_like(cases[0].x)

    operations = float(shape.num_tokens * c.experts_per_token * expert)
    calls = [partial(case.run, shape.mode, out=out) for case in cases]
    return Work(
        "mxfp4_moe", str(shape), calls, nbytes, operations, shape.mode, lambda: check(cases[0], shape.mode)
    )  # fmt: skip


@pytest.mark.parametrize("shape", shapes(modes=("int8", "bf16", "float32")), ids=str)
def bench_mxfp4_moe(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
