"""What the tiny gpt-oss is computed with: forward passes in bf16, the hand-written backward passes beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.compile(dynamic=True)
def _sink_softmax(scores: Tensor, mask: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """Softmax of ``(count, kv_heads, heads, length, length)`` with one more logit a head in the denominator."""
    scores = scores.float() * scale + mask
    sink = sinks.float()[:, :, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    weights = torch.exp(scores - top)
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - top))).to(torch.bfloat16)


@torch.compile(dynamic=True)
def _score_gradient(probs: Tensor, dprobs: Tensor, dots: Tensor, scale: float) -> Tensor:
    return (probs.float() * (dprobs.float() - dots) * scale).to(torch.bfloat16)


@torch.compile(dynamic=True)
def _sink_gradient(probs: Tensor, dots: Tensor) -> Tensor:
    return -((1 - probs.float().sum(-1, keepdim=True)) * dots).sum((0, 3, 4))


class _SinkAttention(torch.autograd.Function):
    """Attention of ``(count, kv_heads, heads, length, dim)`` queries; the sink takes its share and gives no value.

    The gradient of a softmax that has one more logit with value 0 is that of the plain one.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
        ctx.scale = q.shape[-1] ** -0.5
        q = q.flatten(2, 3)
        scores = (q @ k.mT).unflatten(2, (sinks.shape[1], -1))
        probs = _sink_softmax(scores, mask, sinks, ctx.scale)
        out = probs.flatten(2, 3) @ v
        ctx.save_for_backward(q, k, v, probs, out)
        return out.unflatten(2, (sinks.shape[1], -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probs, out = ctx.saved_tensors
        dout = grads[0].flatten(2, 3)
        dots = (dout.float() * out.float()).sum(-1, keepdim=True).unflatten(2, (probs.shape[2], -1))
        dprobs = (dout @ v.mT).unflatten(2, (probs.shape[2], -1))
        dscores = _score_gradient(probs, dprobs, dots, ctx.scale).flatten(2, 3)
        dv = probs.flatten(2, 3).mT @ dout
        dq = (dscores @ k).unflatten(2, (probs.shape[2], -1))
        return dq, dscores.mT @ q, dv, _sink_gradient(probs, dots).to(torch.bfloat16), None


class _Dispatch(torch.autograd.Function):
    """Bring each token's row to the places of its experts: ``x[source]``; `places` are those of (token, choice)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        back = grads[0].index_select(0, places).unflatten(0, (ctx.num_tokens, -1))
        return back.sum(1), None, None


class _Collect(torch.autograd.Function):
    """Bring the experts' rows back: ``y[places]``; rows that pad an expert's share get gradient 0."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = y.shape[0]
        return y.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        full = grads[0].new_zeros(ctx.num_rows, grads[0].shape[1])
        return full.index_copy_(0, places, grads[0]), None


class _GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert, each group through its expert's weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            rows = slice(start, start + count)
            torch.addmm(bias[expert], x[rows], weight[expert].t(), out=out[rows])
            start += count
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        db = weight.new_empty(weight.shape[:2])
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            torch.mm(dy[rows], weight[expert], out=dx[rows])
            torch.mm(dy[rows].t(), x[rows], out=dw[expert])
            db[expert] = dy[rows].sum(0)
            start += count
        return dx, dw, db, None


@torch.compile(dynamic=True)
def _rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(torch.bfloat16)


@torch.compile(dynamic=True)
def _swiglu_forward(gate: Tensor, linear: Tensor, limit: float, alpha: float) -> Tensor:
    gate = gate.float().clamp(max=limit)
    return (gate * torch.sigmoid(alpha * gate) * (linear.float().clamp(-limit, limit) + 1)).to(torch.bfloat16)


@torch.compile(dynamic=True)
def _swiglu_backward(gate: Tensor, linear: Tensor, dout: Tensor, limit: float, alpha: float) -> tuple[Tensor, Tensor]:
    g, up, d = gate.float(), linear.float(), dout.float()
    clamped, lifted = g.clamp(max=limit), up.clamp(-limit, limit) + 1
    sigmoid = torch.sigmoid(alpha * clamped)
    dgate = d * lifted * sigmoid * (1 + alpha * clamped * (1 - sigmoid)) * (g <= limit)
    dlinear = d * clamped * sigmoid * (up.abs() <= limit)
    return dgate.to(torch.bfloat16), dlinear.to(torch.bfloat16)


class _SwiGLU(torch.autograd.Function):
    """Clamped SwiGLU; here the gate rows come first, the linear rows second (interleaved on export)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = limit, alpha
        gate, linear = x.chunk(2, -1)
        return _swiglu_forward(gate, linear, limit, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, linear = ctx.saved_tensors[0].chunk(2, -1)
        # Halves joined outside the compiled code, which would compute both for every element.
        return torch.cat(_swiglu_backward(gate, linear, grads[0], *ctx.constants), -1), None, None


@torch.compile(dynamic=True)
def _rotate(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.float(), b.float()
    return (a * cos - b * sin).to(torch.bfloat16), (b * cos + a * sin).to(torch.bfloat16)


class _Rope(torch.autograd.Function):
    """Rotate ``(num_tokens, heads, head_dim)`` by half-split pairs; cos and sin are ``(num_tokens, 1, half)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.cat(_rotate(*x.chunk(2, -1), cos, sin), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return torch.cat(_rotate(*grads[0].chunk(2, -1), cos, -sin), -1), None, None


@torch.compile(dynamic=True)
def _combine(y: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    return residual + (y.float() * weights[..., None]).sum(1)
