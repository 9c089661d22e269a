"""linear at the shapes of attention, router and lm_head, against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from compare import assert_close
from harness import Activations, Peer, Work, copies
from make_checkpoint import Weights
from mxmoe import ops
from mxmoe.costs import Costs
from mxmoe.reference import ops as reference
from op_helpers import bf16_as_integers, normal, round_activations, to_torch
from shapes import Shape, shapes

# "weights activations"
MODES, FULL_MODES = ("bf16 bf16", "int8 int8"), ("bf16 float32", "int8 bf16", "int8 float32")
LAYERS, FULL_LAYERS = ("q_proj", "o_proj", "lm_head"), ("k_proj", "router")


def make_weight(shape: Shape, layer: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Weight and scales as the op takes them."""
    weights = Weights(shape.config, 0)
    name = shape.what if shape.what == "lm_head" else f"{shape.what}_weight"
    rows, columns = weights.shapes[name]
    weight = np.concatenate(list(weights.pieces(name, layer))).reshape(rows, columns)
    return ops.int8_quantize(weight) if shape.mode.startswith("int8") else (weight, None)


def rounding(held: str, activations: Activations) -> Activations:
    """Return what activations are rounded to: bf16 weights make bf16 of int8."""
    return "bf16" if activations == "int8" and held == "bf16" else activations


def multiplied_as(held: str, activations: Activations) -> Activations:
    """Return whose peak the products are held against: 16-bit integers do not meet bf16 weights, float32 does."""
    rounded = rounding(held, activations)
    return "float32" if held == "bf16" and rounded == "bf16" and bf16_as_integers() else rounded


def check(x: NDArray[Any], weight: NDArray[Any], scales: NDArray[Any] | None, activations: str) -> None:
    """Compare two tokens and 512 columns with float64, as near as torch in float32 is."""
    got = ops.linear(x, weight, scales=scales, activations=activations)[:2, :512]
    held = "bf16" if scales is None else "int8"
    rounded = round_activations(x[:2], rounding(held, activations), "bfloat16" if scales is None else "int8")
    scales = None if scales is None else scales[:512]
    want = reference.linear(rounded, weight[:512], scales=scales)
    exact = reference.linear(np.eye(weight.shape[1]), weight[:512], scales=scales).T.astype(np.float32)
    baseline = torch.from_numpy(rounded.astype(np.float32)) @ torch.from_numpy(exact).T
    assert_close(got, want, baseline=baseline)


def work(shape: Shape) -> Work:
    """Make the calls of one shape."""
    held, activations = shape.mode.split()
    # Of a prompt, the last token alone gets logits.
    tokens = 1 if shape.what == "lm_head" and shape.phase.startswith("prefill") else shape.num_tokens
    first = make_weight(shape, 0)
    rows, columns = first[0].shape
    nbytes = Costs(shape.config, held).dense_bytes(rows, columns, bias=False) + 4 * tokens * (rows + columns)
    weights = [first, *(make_weight(shape, i) for i in range(1, copies(nbytes)))]
    x = normal(np.random.default_rng(0), (tokens, columns))
    out = np.empty((tokens, rows), np.float32)

    # torch has no int8 weights with a scale per block; its bf16 is what people would run instead.
    plain = replace(shape, mode="bf16 bf16")
    peers = [to_torch(make_weight(plain, i)[0]) for i in range(len(weights))]
    x16 = torch.from_numpy(x).to(torch.bfloat16)
    calls = [partial(ops.linear, x, w, scales=scales, activations=activations, out=out) for w, scales in weights]
    return Work(
        "linear", f"{shape} ({tokens}x{columns} @ {rows})", calls, nbytes, 2.0 * tokens * rows * columns,
        multiplied_as(held, activations), lambda: check(x, *first, activations),
        Peer("torch bf16", [partial(torch.nn.functional.linear, x16, w) for w in peers]),
    )  # fmt: skip


@pytest.mark.parametrize("shape", shapes(LAYERS, MODES, full_whats=FULL_LAYERS, full_modes=FULL_MODES), ids=str)
def bench_linear(shape: Shape, bench: Callable[[Work], object]) -> None:
    bench(work(shape))
