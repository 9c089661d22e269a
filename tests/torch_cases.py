"""Calls of the torch operators, and the ops again as differentiable torch formulas of any precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import attention_case
import moe_case
from mxmoe.integrations import torch as mx
from mxmoe.packing import pack_linear, pack_mxfp4
from op_helpers import decode_mxfp4, to_torch

MOE_WEIGHTS = moe_case.WEIGHTS


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> torch.Tensor:
    """Draw normal values."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


def tensors(arguments: dict[str, Any], *grad: str) -> dict[str, Any]:
    """Copy the arrays among some arguments to torch; those named in `grad` require gradients."""
    copies = {k: to_torch(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    for name in grad:
        copies[name].requires_grad_()
    return copies


def moe_arguments(packed: bool = False, grad: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    """Arguments of mxfp4_moe by name."""
    case = moe_case.make(**options)
    weights = dict(case.weights)
    if packed:
        for name in ("gate_up", "down"):
            both = (f"{name}_blocks", f"{name}_scales")
            weights |= dict(zip(both, pack_mxfp4(*(weights[key] for key in both)), strict=True))
    named = {"x": case.x, "topk_ids": case.topk_ids, "topk_weights": case.topk_weights, **weights}
    return tensors(named | case.kwargs, *grad)


def linear_arguments(kind: str, rows: int = 5, **options: Any) -> dict[str, Any]:
    """Arguments of linear by name; `kind` is a dtype of the weight, perhaps with "packed"."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((48, 64)).astype(np.float32)
    scales = None
    if kind.startswith("int8"):
        codes, factors = mx.int8_quantize(torch.from_numpy(weight))
        weight, scales = codes.numpy(), factors
    else:
        weight = to_torch(weight).bfloat16()
    if kind.endswith("packed"):
        bits = [None if x is None else as_array(x) for x in (weight, scales)]
        weight, scales = (None if x is None else to_torch(x) for x in pack_linear(*bits))
    return {
        "x": normal(rows, 64),
        "weight": torch.as_tensor(weight),
        "bias": normal(48, seed=2),
        "scales": scales,
        "residual": normal(rows, 48, seed=3),
        **options,
    }


def as_array(x: Any) -> Any:
    from compare import as_numpy

    return as_numpy(x)


def paged_arguments(*grad: str, **options: Any) -> dict[str, Any]:
    """Arguments of sink_attention by name."""
    options.setdefault("sequences", [(3, 20), (2, 5), (7, 7)])
    case = attention_case.make(**options)
    named = {k: v for k, v in case.kwargs.items() if v is not None}
    for cache in ("k_cache", "v_cache"):
        if cache in grad:
            named[cache] = np.nan_to_num(named[cache])
    return tensors({"q": case.q, **named}, *grad)


def dense_arguments(
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    queries: int = 9,
    keys: int = 9,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    grad: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    """Arguments of sink_attention_bhsd by name."""
    found: dict[str, Any] = {
        "q": 2 * normal(batch, heads[0], queries, head_dim, seed=1),
        "k": normal(batch, heads[1], keys, head_dim, seed=2),
        "v": normal(batch, heads[1], keys, head_dim, seed=3),
        "sinks": normal(heads[0], seed=4),
    }
    found = {name: x.to(dtype).requires_grad_(name in grad) for name, x in found.items()}
    return {**found, "sm_scale": head_dim**-0.5, **options}


# Formulas -----------------------------------------------------------------------------------------------------------


def rmsnorm(x, weight, eps=1e-5):
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def rope(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def routing(logits, experts_per_token):
    top = logits.topk(experts_per_token, dim=-1)
    return top.indices, torch.softmax(top.values, dim=-1)


def moe(x, topk_ids, topk_weights, bias1, bias2, w1, w2, residual=None, alpha=1.702, limit=7.0, first_expert=0):
    """`w1`, `w2` are the decoded matrices of all experts."""
    y = torch.zeros_like(x) if residual is None else residual
    for e in range(len(w1)):
        tokens, choices = (topk_ids == e + first_expert).nonzero(as_tuple=True)
        g = x[tokens] @ w1[e].T + bias1[e]
        gate, up = g[:, 0::2].clamp(max=limit), g[:, 1::2].clamp(-limit, limit)
        out = (gate * torch.sigmoid(alpha * gate) * (up + 1)) @ w2[e].T + bias2[e]
        y = y.index_add(0, tokens, topk_weights[tokens, choices, None] * out)
    return y


def decoded(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both matrices of all experts, from stored MXFP4."""
    w1, w2 = (
        torch.from_numpy(decode_mxfp4(arguments[f"{n}_blocks"].numpy(), arguments[f"{n}_scales"].numpy())).to(dtype)
        for n in ("gate_up", "down")
    )
    return w1, w2


def dense_attention(q, k, v, sinks, *, sm_scale, sliding_window=None, key_starts=None, key_ends=None, **_):
    """Full masks, all scores at once."""
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    starts = torch.zeros(batch, dtype=torch.long) if key_starts is None else key_starts.long()
    ends = torch.full((batch,), keys) if key_ends is None else key_ends.long()
    j = torch.arange(keys)[None, None]
    p = (ends[:, None] - queries + torch.arange(queries))[:, :, None]
    seen = (j >= starts[:, None, None]) & (j <= p) & (p - j < (sliding_window or keys + 1))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(2, 3) * sm_scale).masked_fill(~seen[:, None], -torch.inf)
    logits = torch.cat([scores, sinks[:, None, None].expand(batch, heads, queries, 1)], dim=-1)
    return torch.softmax(logits, dim=-1)[..., :-1] @ v


def gradients_of(function: Callable[..., Any], arguments: dict[str, Any], grad: torch.Tensor, dtype=None):
    """Gradients by name of what requires them, of `function` on copies in `dtype` (or as they are)."""
    copies = dict(arguments)
    wanted = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    for name in wanted:
        x = arguments[name].detach()
        copies[name] = (x if dtype is None else x.to(dtype)).clone().requires_grad_()
    result = function(**copies)
    found = torch.autograd.grad(result, [copies[name] for name in wanted], grad.to(result.dtype))
    return dict(zip(wanted, found, strict=True))
