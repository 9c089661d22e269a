"""Inputs of mxfp4_moe, and the op again in a page of torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mxmoe import ops
from op_helpers import BLOCK, decode_mxfp4, normal, random_mxfp4, round_activations, to_torch, wide

WEIGHTS = ("gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias")


@dataclass
class MoeCase:
    """Arguments of one call."""

    x: NDArray[Any]
    topk_ids: NDArray[np.int32]
    topk_weights: NDArray[np.float32]
    weights: dict[str, NDArray[Any]]
    residual: NDArray[np.float32] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.x, self.topk_ids, self.topk_weights, *(self.weights[name] for name in WEIGHTS)

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"residual": self.residual, **self.options}

    def run(self, activations: str, op: Any = ops.mxfp4_moe, **kwargs: Any) -> Any:
        return op(*self.args, activations=activations, **self.kwargs, **kwargs)

    def rows(self, rows: Any) -> MoeCase:
        residual = None if self.residual is None else self.residual[rows]
        return replace(
            self,
            x=self.x[rows],
            topk_ids=self.topk_ids[rows],
            topk_weights=self.topk_weights[rows],
            residual=residual,
        )

    def with_weights(self, **weights: NDArray[Any]) -> MoeCase:
        return replace(self, weights=self.weights | weights)


def make(
    num_tokens: int = 6,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_experts: int = 5,
    experts_per_token: int = 2,
    x_dtype: str = "float32",
    bias_dtype: str = "bfloat16",
    residual: bool = False,
    seed: int = 0,
    **options: Any,
) -> MoeCase:
    """Draw a case in which every token takes different experts."""
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(num_experts)[:experts_per_token] for _ in range(num_tokens)], np.int32)
    weights = {}
    for name, rows, k in (
        ("gate_up", 2 * intermediate_size, hidden_size),
        ("down", hidden_size, intermediate_size),
    ):
        # Products of a size that reaches both clamps now and then, whatever K is.
        middle = 124 - round(np.log2(k) / 2)
        blocks, scales = random_mxfp4(rng, (num_experts, rows, k), middle - 1, middle + 2)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[f"{name}_bias"] = normal(rng, (num_experts, rows), bias_dtype)
    return MoeCase(
        x=normal(rng, (num_tokens, hidden_size), x_dtype, 2.0),
        topk_ids=ids.reshape(num_tokens, experts_per_token),
        topk_weights=rng.random((num_tokens, experts_per_token), np.float32),
        weights=weights,
        residual=normal(rng, (num_tokens, hidden_size)) if residual else None,
        options=options,
    )


def torch_moe(case: MoeCase, activations: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The op at a precision of choice, rounded where its contract says."""
    w = {name: array for name, array in case.weights.items() if name.endswith("bias")}
    w = {name: torch.from_numpy(wide(array)).to(dtype) for name, array in w.items()}
    alpha, limit = case.options.get("swiglu_alpha", 1.702), case.options.get("swiglu_limit", 7.0)
    first = case.options.get("first_expert", 0)
    x = torch.from_numpy(round_activations(case.x, activations, "mxfp4")).to(dtype)
    y = torch.zeros(case.x.shape, dtype=dtype)
    ids = torch.from_numpy(case.topk_ids.astype(np.int64)) - first
    shares = torch.from_numpy(case.topk_weights).to(dtype)
    for e in range(case.weights["gate_up_blocks"].shape[0]):
        tokens, choices = (ids == e).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate_up, down = (
            torch.from_numpy(decode_mxfp4(case.weights[f"{name}_blocks"][e], case.weights[f"{name}_scales"][e]))
            for name in ("gate_up", "down")
        )
        g = x[tokens] @ gate_up.to(dtype).T + w["gate_up_bias"][e]
        gate, up = g[:, 0::2].clamp(max=limit), g[:, 1::2].clamp(-limit, limit)
        a = gate * torch.sigmoid(alpha * gate) * (up + 1)
        a = torch.from_numpy(round_activations(a.numpy().astype(np.float32), activations, "mxfp4")).to(dtype)
        out = a @ down.to(dtype).T + w["down_bias"][e]
        y.index_add_(0, tokens, shares[tokens, choices, None] * out)
    return y if case.residual is None else y + to_torch(case.residual).to(dtype)


def exact_case(num_tokens: int = 9, num_experts: int = 4, residual: bool = True) -> MoeCase:
    """A case whose result is exact in float32, however its sums are ordered and activations rounded.

    alpha is 0, so the sigmoid is 1/2; up is its bias of 1, so a = gate; and gate picks elements of x, whole numbers
    with 127 in every block. The second product then sums small multiples of 2^-5.
    """
    rng = np.random.default_rng(0)
    size = 2 * BLOCK
    case = make(num_tokens, size, size, num_experts, 3, "float32", "float32", residual, swiglu_alpha=0.0)
    case.options["swiglu_limit"] = 1e6
    case.x = rng.integers(-127, 128, case.x.shape).astype(np.float32)
    case.x[:, [3, BLOCK + 9]] = rng.choice([-127.0, 127.0], (num_tokens, 2))
    codes = np.zeros((num_experts, 2 * size, size), np.uint8)
    for e in range(num_experts):
        # Within halves, so that each block of a keeps its 127.
        picked = np.concatenate([rng.permutation(BLOCK), BLOCK + rng.permutation(BLOCK)])
        codes[e, 2 * np.arange(size), picked] = 2  # the code of 1.0
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(num_experts, 2 * size, 2, BLOCK // 2)
    case.weights["gate_up_blocks"] = packed
    case.weights["gate_up_scales"] = np.full((num_experts, 2 * size, 2), 127, np.uint8)
    case.weights["gate_up_bias"] = np.tile(np.array([0, 1], np.float32), (num_experts, size))
    case.weights["down_scales"] = rng.integers(125, 130, (num_experts, size, 2), dtype=np.uint8)
    case.weights["down_bias"] = rng.integers(-100, 100, (num_experts, size)).astype(np.float32)
    case.topk_weights = (2.0 ** -rng.integers(0, 3, case.topk_weights.shape)).astype(np.float32)
    if case.residual is not None:
        case.residual = rng.integers(-1000, 1000, case.residual.shape).astype(np.float32)
    return case
