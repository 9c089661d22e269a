"""Experts with plain weights: ``experts_implementation="mxmoe"``."""

from __future__ import annotations

from typing import Any

import torch

from mxmoe.integrations.torch import linear

__all__ = ["experts_forward"]


def _rows_first(weight: torch.nn.Parameter) -> None:
    """Lay (experts, in, out) out so that each expert's transpose is contiguous; shape and values stay."""
    if weight.dtype == torch.bfloat16 and weight.stride(1) != 1:
        weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``, float32 out of bfloat16."""
    if weight.dtype == torch.bfloat16:
        return linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run an experts module of transformers expert by expert, on the tokens that chose it.

    bfloat16 weights go through `mxmoe.ops.linear`, which rounds activations to bfloat16 and sums in float32; others
    through torch. Weights that are stored input before output, as gpt-oss has them, are laid out anew at the first
    call, one matrix of a layer at a time: shapes, values and names stay, strides change. Gradients flow to all of
    them. The loop depends on the data, so `torch.compile` breaks its graph here.

    Parameters
    ----------
    self : Module
        Decorated by transformers' ``use_experts_implementation``.
    hidden_states : (num_tokens, hidden_size)
    top_k_index, top_k_weights : (num_tokens, experts_per_token)
        Ids past the last expert contribute nothing.

    Returns
    -------
    tensor (num_tokens, hidden_size), dtype of `hidden_states`
    """
    up_name = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
    up, down = getattr(self, up_name), self.down_proj
    if self.is_transposed:
        for weight in (up, down):
            _rows_first(weight)
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    up_bias, down_bias = (getattr(self, f"{name}_bias") if self.has_bias else None for name in (up_name, "down_proj"))
    # One slice of all experts: the gradients of single ones would each be as large as the whole.
    num_experts, experts_per_token = up.shape[0], top_k_index.shape[1]
    pieces = [[None] * num_experts if part is None else part.unbind(0) for part in (up, up_bias, down, down_bias)]
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen.clamp(max=num_experts), minlength=num_experts)[:num_experts].tolist()
    gathered, weights = order // experts_per_token, top_k_weights.reshape(-1)[order, None]
    y = torch.zeros(hidden_states.shape, dtype=torch.float32)
    begin = 0
    for count, w1, b1, w2, b2 in zip(counts, *pieces, strict=True):
        if count:
            some = slice(begin, begin + count)
            h = _product(hidden_states[gathered[some]], w1, b1)
            h = self._apply_gate(h) if up_name == "gate_up_proj" else self.act_fn(h)
            h = _product(h, w2, b2)
            if getattr(self, "has_post_expert_norm", False):
                h = self.post_expert_norm(h)
            y.index_add_(0, gathered[some], (h * weights[some]).to(torch.float32))
        begin += count
    return y.to(hidden_states.dtype)
