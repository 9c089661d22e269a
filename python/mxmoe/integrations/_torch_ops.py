"""The ops as torch custom operators: ``torch.ops.mxmoe.*``.

What stands here for every op: its schema, the call of the kernel on the tensors' own memory, what torch.compile needs
to know of its result, and how its backward hangs together. Formulas of gradients stand in `_torch_grad`, how an
operator is registered and reaches its kernel in `_torch_define`.

An op that writes into ``out`` is a second operator, ``<op>_out``, which has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxmoe.integrations import _torch_grad as gradients
from mxmoe.integrations._torch_define import (
    PairOp,
    TensorOp,
    _backend,
    _define,
    _define_backward,
    _frozen,
    _given,
    _int32,
    _optional,
    _rows,
)

__all__: list[str] = []

# embedding --------------------------------------------------------------------------------------------------------


def _embedding(token_ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    ids = token_ids.detach()
    result: Tensor = _backend(weight).embedding(ids, _rows("weight", weight), out=_optional("out", out))
    return result


embedding: TensorOp = _define(
    "embedding",
    "Tensor token_ids, Tensor weight",
    "Tensor",
    _embedding,
    lambda token_ids, weight: weight.new_empty((token_ids.shape[0], weight.shape[1]), dtype=torch.float32),
    "Tensor(a!) out",
)
embedding_backward = _define_backward(
    "embedding_backward",
    "Tensor grad, Tensor token_ids, Tensor weight",
    "Tensor",
    lambda grad, token_ids, weight: gradients.embedding(grad, token_ids, weight.shape[0], weight.dtype),
    (2,),
)


def _embedding_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _embedding_backward(ctx: Any, grad: Tensor) -> Any:
    return None, embedding_backward(grad, *ctx.saved_tensors)


embedding.register_autograd(_embedding_backward, setup_context=_embedding_setup)


# rmsnorm ----------------------------------------------------------------------------------------------------------


def _rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    result: Tensor = _backend(x).rmsnorm(_rows("x", x), _rows("weight", weight), eps, out=_optional("out", out))
    return result


rmsnorm: TensorOp = _define(
    "rmsnorm",
    "Tensor x, Tensor weight, float eps",
    "Tensor",
    _rmsnorm,
    lambda x, weight, eps: x.new_empty(x.shape),
    "Tensor(a!) out",
)


def _rmsnorm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rmsnorm_backward(ctx: Any, grad: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    dx, dweight = gradients.rmsnorm(grad, x, weight, ctx.eps)
    return dx.to(x.dtype), dweight.to(weight.dtype), None


rmsnorm.register_autograd(_rmsnorm_backward, setup_context=_rmsnorm_setup)


# rope -------------------------------------------------------------------------------------------------------------


def _rope(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    tables = (_given("cos", cos).contiguous(), _given("sin", sin).contiguous())
    result: Tensor = _backend(x).rope(_rows("x", x, 2), *tables, out=_optional("out", out))
    return result


rope: TensorOp = _define(
    "rope",
    "Tensor x, Tensor cos, Tensor sin",
    "Tensor",
    _rope,
    lambda x, cos, sin: x.new_empty(x.shape),
    "Tensor(a!) out",
)


def _rope_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, cos, sin = inputs
    _frozen(cos=cos, sin=sin)
    ctx.save_for_backward(cos, sin)
    ctx.dtype = x.dtype


def _rope_backward(ctx: Any, grad: Tensor) -> Any:
    return gradients.rope(grad, *ctx.saved_tensors).to(ctx.dtype), None, None


rope.register_autograd(_rope_backward, setup_context=_rope_setup)


def _rope_cos_sin(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    cos, sin = _backend(inv_freq).rope_cos_sin(positions.detach(), _rows("inv_freq", inv_freq), scaling)
    return torch.from_numpy(cos), torch.from_numpy(sin)


def _rope_cos_sin_fake(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    shape = (positions.shape[0], inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=torch.float32), inv_freq.new_empty(shape, dtype=torch.float32)


rope_cos_sin: PairOp = _define(
    "rope_cos_sin",
    "Tensor positions, Tensor inv_freq, float scaling",
    "(Tensor, Tensor)",
    _rope_cos_sin,
    _rope_cos_sin_fake,
)


# linear -----------------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    activations: str,
    residual: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    result: Tensor = _backend(x).linear(
        _rows("x", x),
        _given("weight", weight),
        None if bias is None else _rows("bias", bias),
        scales=_optional("scales", scales),
        activations=activations,
        residual=None if residual is None else _rows("residual", residual),
        out=_optional("out", out),
    )
    return result


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    rows = weight.shape[0] * (16 if weight.dim() == 3 else 1)
    return x.new_empty((x.shape[0], rows), dtype=torch.float32)


linear: TensorOp = _define(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? scales, str activations, Tensor? residual",
    "Tensor",
    _linear,
    _linear_fake,
    "Tensor(a!) out",
)


def _linear_x_fake(grad: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1] * (32 if weight.dim() == 3 else 1)))


linear_x_backward: TensorOp = _define(
    "linear_x_backward",
    "Tensor grad, Tensor weight, Tensor? scales",
    "Tensor",
    lambda grad, weight, scales: gradients.linear_x(grad.detach(), weight.detach(), scales),
    _linear_x_fake,
)


def _linear_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, scales, _, _ = inputs
    _frozen(scales=scales)
    if weight.dim() == 3:
        _frozen(weight=weight)
    # Activations need not be kept for a frozen weight.
    ctx.save_for_backward(x if weight.requires_grad else None, weight, scales)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> Any:
    x, weight, scales = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _, _, wants_residual = ctx.needs_input_grad
    return (
        linear_x_backward(grad, weight, scales).to(ctx.x_dtype) if wants_x else None,
        (grad.T @ x.to(grad.dtype)).to(weight.dtype) if wants_weight else None,
        grad.sum(dim=0).to(ctx.bias_dtype) if wants_bias else None,
        None,
        None,
        grad if wants_residual else None,
    )


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


# linear_group -----------------------------------------------------------------------------------------------------

Optionals = list[Tensor | None]


def _linear_group(
    x: Tensor,
    weights: list[Tensor],
    scales: Optionals,
    biases: Optionals,
    activations: str,
    out: Tensor | None = None,
) -> Tensor:
    layers = [
        (_given(f"weight[{i}]", w), _optional(f"scales[{i}]", s), None if b is None else _rows(f"bias[{i}]", b))
        for i, (w, s, b) in enumerate(zip(weights, scales, biases, strict=True))
    ]
    kernels = _backend(x)
    result: Tensor = kernels.linear_group(_rows("x", x), layers, activations=activations, out=_optional("out", out))
    return result


def _linear_group_fake(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    rows = sum(_linear_fake(x, weight).shape[1] for weight in weights)
    return x.new_empty((x.shape[0], rows), dtype=torch.float32)


# Without gradients: where those are wanted, the layers are computed one by one.
linear_group: TensorOp = _define(
    "linear_group",
    "Tensor x, Tensor[] weights, Tensor?[] scales, Tensor?[] biases, str activations",
    "Tensor",
    _linear_group,
    _linear_group_fake,
    "Tensor(a!) out",
)


# expert_routing ---------------------------------------------------------------------------------------------------


def _expert_routing(router_logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    ids, weights = _backend(router_logits).expert_routing(_rows("router_logits", router_logits), experts_per_token)
    return ids, weights


def _expert_routing_fake(router_logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    shape = (router_logits.shape[0], experts_per_token)
    return router_logits.new_empty(shape, dtype=torch.int32), router_logits.new_empty(shape, dtype=torch.float32)


expert_routing: PairOp = _define(
    "expert_routing",
    "Tensor router_logits, SymInt experts_per_token",
    "(Tensor, Tensor)",
    _expert_routing,
    _expert_routing_fake,
)


def _expert_routing_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output)
    ctx.num_experts = inputs[0].shape[1]


def _expert_routing_backward(ctx: Any, _: Any, grad: Tensor) -> Any:
    ids, weights = ctx.saved_tensors
    return gradients.expert_routing(grad, ids, weights, ctx.num_experts), None


expert_routing.register_autograd(_expert_routing_backward, setup_context=_expert_routing_setup)


def _expert_offsets(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    offsets, order = _backend(topk_ids).expert_offsets(_int32("topk_ids", topk_ids), num_experts)
    return offsets, order


def _expert_offsets_fake(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    return topk_ids.new_empty(num_experts + 1, dtype=torch.int32), topk_ids.new_empty(pairs, dtype=torch.int32)


expert_offsets: PairOp = _define(
    "expert_offsets",
    "Tensor topk_ids, SymInt num_experts",
    "(Tensor, Tensor)",
    _expert_offsets,
    _expert_offsets_fake,
)


# mxfp4_moe --------------------------------------------------------------------------------------------------------

_MOE_INPUTS = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_blocks, Tensor gate_up_scales, "
    "Tensor gate_up_bias, Tensor down_blocks, Tensor down_scales, Tensor down_bias"
)
_MOE_WEIGHTS = ("gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias")
_MOE_BIASES = ("gate_up_bias", "down_bias")


def _mxfp4_moe(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *rest: Any) -> Tensor:
    weights, (residual, activations, alpha, limit, first_expert, foldable, *out) = rest[:6], rest[6:]
    if not topk_weights.dtype.is_floating_point:
        raise TypeError(f"topk_weights has dtype {topk_weights.dtype}; wanted float32 or bfloat16")
    named = zip(_MOE_WEIGHTS, weights, strict=True)
    result: Tensor = _backend(x).mxfp4_moe(
        _rows("x", x),
        _int32("topk_ids", topk_ids),
        _given("topk_weights", topk_weights).float().contiguous(),
        *(_rows(name, w, 2) if name in _MOE_BIASES else _given(name, w) for name, w in named),
        activations=activations,
        swiglu_alpha=alpha,
        swiglu_limit=limit,
        first_expert=first_expert,
        foldable_scales=foldable,
        residual=None if residual is None else _rows("residual", residual),
        out=_optional("out", out[0] if out else None),
    )
    return result


mxfp4_moe: TensorOp = _define(
    "mxfp4_moe",
    f"{_MOE_INPUTS}, Tensor? residual, str activations, float swiglu_alpha, float swiglu_limit, SymInt first_expert, "
    "bool foldable_scales",
    "Tensor",
    _mxfp4_moe,
    lambda x, *_: x.new_empty(x.shape, dtype=torch.float32),
    "Tensor(a!) out",
)
mxfp4_moe_backward = _define_backward(
    "mxfp4_moe_backward",
    f"Tensor grad, {_MOE_INPUTS}, float swiglu_alpha, float swiglu_limit, SymInt first_expert",
    "(Tensor, Tensor, Tensor, Tensor)",
    gradients.mxfp4_moe,
    (1, 3, 6, 9),
)


def _mxfp4_moe_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[11:14]


def _mxfp4_moe_backward(ctx: Any, grad: Tensor) -> Any:
    dresidual = grad if ctx.needs_input_grad[9] else None
    if not any(ctx.needs_input_grad[:9]):
        return *[None] * 9, dresidual, *[None] * 5
    dx, dshares, dbias1, dbias2 = mxfp4_moe_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dx, None, dshares, None, None, dbias1, None, None, dbias2, dresidual, *[None] * 5


mxfp4_moe.register_autograd(_mxfp4_moe_backward, setup_context=_mxfp4_moe_setup)
