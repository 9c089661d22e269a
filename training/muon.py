"""Muon (Jordan et al., 2024): momentum made orthogonal, for weight matrices and stacks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic a x + b x^3 + c x^5 that drives singular values towards 1 fastest from near 0 (the paper's choice).
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Map each matrix U S V^T to about U V^T by Newton-Schulz iteration in bf16.

    Parameters
    ----------
    matrices : Tensor
        ``(..., rows, columns)``.
    steps : int, default 5
        Iterations.

    Returns
    -------
    Tensor
        float32, of the same shape.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay.

    Parameters
    ----------
    params : iterable of Tensor
        Parameters of two or more dimensions; leading dimensions are a stack.
    lr, momentum, weight_decay : float
        As usual; an update has all its singular values near ``lr * sqrt(max(1, rows / columns))``.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(momentum, group["momentum"])
        rows, columns = update.shape[-2:]
        # gate_up_proj stacks two square matrices: each is made orthogonal on its own.
        halves = 2 if update.dim() == 3 and rows == 2 * columns else 1
        stacked = update.unflatten(-2, (halves, rows // halves))
        direction = orthogonalize(stacked).flatten(-3, -2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * max(1.0, rows / halves / columns) ** 0.5)
