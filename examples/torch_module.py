"""A torch module of one's own, built of mxmoe's operators: a layer of experts in MXFP4 with a router that learns.

    python examples/torch_module.py

The experts' weights are quantised once and frozen, 4.25 bits each. Gradients pass through them to the router and to
the layers below; here the router and the norm learn what another such layer does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mxmoe.integrations import torch as ops

HIDDEN, INTERMEDIATE, NUM_EXPERTS, EXPERTS_PER_TOKEN = 64, 96, 8, 2


class MoE(nn.Module):
    """Norm, router and experts on top of a residual stream."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(HIDDEN))
        self.router = nn.Linear(HIDDEN, NUM_EXPERTS)
        self.gate_up_bias = nn.Parameter(torch.zeros(NUM_EXPERTS, 2 * INTERMEDIATE))
        self.down_bias = nn.Parameter(torch.zeros(NUM_EXPERTS, HIDDEN))
        for name, weight in (("gate_up", gate_up), ("down", down)):
            blocks, scales = ops.mxfp4_quantize(weight)  # (experts, out, in / 32, 16), (experts, out, in / 32)
            self.register_buffer(f"{name}_blocks", blocks)
            self.register_buffer(f"{name}_scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """(num_tokens, HIDDEN) float32 -> the same."""
        h = ops.rmsnorm(x, self.norm)
        topk_ids, topk_weights = ops.expert_routing(self.router(h), EXPERTS_PER_TOKEN)
        gate_up = (self.gate_up_blocks, self.gate_up_scales, self.gate_up_bias)
        down = (self.down_blocks, self.down_scales, self.down_bias)
        return ops.mxfp4_moe(h, topk_ids, topk_weights, *gate_up, *down, activations="float32", residual=x)


def plain_torch(layer: MoE, x: Tensor) -> Tensor:
    """Compute the same in torch alone, on decoded weights."""
    h = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * layer.norm
    weights, ids = layer.router(h).topk(EXPERTS_PER_TOKEN)
    up = ops.mxfp4_dequantize(layer.gate_up_blocks, layer.gate_up_scales)[ids]
    down = ops.mxfp4_dequantize(layer.down_blocks, layer.down_scales)[ids]
    a = torch.einsum("tkoi,ti->tko", up, h) + layer.gate_up_bias[ids]
    gate, linear = a[..., ::2].clamp(max=7.0), a[..., 1::2].clamp(-7.0, 7.0)
    y = torch.einsum("tkoi,tki->tko", down, gate * torch.sigmoid(1.702 * gate) * (linear + 1)) + layer.down_bias[ids]
    return x + (weights.softmax(-1)[..., None] * y).sum(1)


def main() -> None:
    """Check against plain torch, then let the router learn."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for work as small as this, threads cost more than they give
    experts = (
        torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN) / 8,
        torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE) / 8,
    )
    teacher, student = MoE(*experts), MoE(*experts)
    frozen = {name: buffer.clone() for name, buffer in student.named_buffers()}
    bits = 8 * sum(b.nbytes for b in frozen.values()) / sum(w.numel() for w in experts)
    print(f"experts: {bits:.2f} bits a weight")

    x = torch.randn(32, HIDDEN)
    gap = (teacher(x) - plain_torch(teacher, x)).abs().max().item()
    print(f"largest difference from plain torch: {gap:.1e}")
    if gap > 1e-4:
        raise SystemExit("the two disagree")

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for step in range(301):
        x = torch.randn(128, HIDDEN)
        loss = nn.functional.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3}: loss {loss.item():.4f}")
    same = all(torch.equal(buffer, frozen[name]) for name, buffer in student.named_buffers())
    print(f"the experts' weights are {'unchanged' if same else 'CHANGED'}")


if __name__ == "__main__":
    main()
