"""Rounding of weights to what the checkpoint can hold, with gradients passed straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_exponents(blocks: Tensor) -> Tensor:
    """Choose each block's power of two: ``floor(log2(amax)) - 2``, one more where 6 would clip more than 1/7.

    Parameters
    ----------
    blocks : Tensor
        float32 ``(..., 32)``.

    Returns
    -------
    Tensor
        float32 ``(..., 1)``, whole numbers from -126 to 125; -126 for a block of zeros.
    """
    amax = blocks.abs().amax(-1, keepdim=True)
    # x * 8/7 reaches the next power of two exactly where x / 2^e reaches 7, midway between 6 and 8.
    return torch.frexp(amax * (8 / 7)).exponent.float().sub_(3).clamp_(-126, 125)


def round_e2m1(values: Tensor) -> Tensor:
    """Round to the nearest of the sixteen e2m1 values, ties to the even code, saturating at 6."""
    size = values.abs().clamp(max=6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(torch.round(size / step) * step, values)


def mxfp4_round(weight: Tensor) -> Tensor:
    """Round float32 ``(..., K)`` to MXFP4 values, blocks of 32 along K."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    scale = torch.exp2(mxfp4_exponents(blocks))
    return (round_e2m1(blocks / scale) * scale).flatten(-2)


def mxfp4_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Write MXFP4-rounded weights as the checkpoint's bytes.

    Parameters
    ----------
    weight : Tensor
        float32 ``(..., K)``, any values; they are rounded first.

    Returns
    -------
    blocks : Tensor
        uint8 ``(..., K/32, 16)``: value 2j in the low nibble of byte j, value 2j+1 in the high one.
    scales : Tensor
        uint8 ``(..., K/32)``: exponent plus 127.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    exponents = mxfp4_exponents(blocks)
    rounded = round_e2m1(blocks / torch.exp2(exponents))
    codes = torch.bucketize(rounded.abs(), torch.tensor(E2M1_VALUES)).to(torch.uint8)
    codes |= torch.signbit(rounded).to(torch.uint8) << 3
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.contiguous(), (exponents.squeeze(-1) + 127).to(torch.uint8)


_compiled_round = torch.compile(mxfp4_round, dynamic=False)


class _StraightThrough(torch.autograd.Function):
    """Round in the forward pass; the backward pass acts as if nothing were rounded."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mxfp4: bool) -> Tensor:
        # Every MXFP4 value of ordinary size is exact in bf16.
        return (_compiled_round(weight) if mxfp4 else weight).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].float(), None


def as_mxfp4(weight: Tensor) -> Tensor:
    """Round a float32 master weight to MXFP4, held as bf16, with a straight-through gradient."""
    result: Tensor = _StraightThrough.apply(weight, True)
    return result


def as_bf16(weight: Tensor) -> Tensor:
    """Round a float32 master weight to bf16 with a straight-through gradient."""
    result: Tensor = _StraightThrough.apply(weight, False)
    return result
