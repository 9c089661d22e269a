"""Gradients of the ops, written from their formulas in plain torch.

Every function takes the gradient of an op's result, then what of the op's inputs it needs, and computes in float32
whatever the inputs' dtype is (in float64 where they are float64, so that finite differences can check the formulas).
Activations count as unrounded: where an op rounds them, the gradient passes straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mxmoe import _core, ops

__all__ = ["embedding", "expert_routing", "linear_x", "mxfp4_moe", "rmsnorm", "rope", "sink_attention"]

_BLOCK = 32
_PANEL_ROWS = 16
# Rows of a dense weight that are widened at a time: 47 MB of float32 where rows have 2880 columns.
_ROWS = 4096
# Scores (heads x queries x keys) at a time; about five arrays of this size live at once, 80 MB of float32.
_SCORES = 1 << 22
_MAX_QUERIES = 256


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rmsnorm(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight. With ``n = x / rms``: ``dx = (g w - n mean(g w n)) / rms``."""
    grad, x, weight = _wide(grad), _wide(x), _wide(weight)
    inverse = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    normed = x * inverse
    scaled = grad * weight
    dx = inverse * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
    return dx, (grad * normed).sum(dim=0)


def rope(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x: the rotation backwards."""
    first, second = _wide(grad).chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([first * c + second * s, second * c - first * s], dim=-1)


def embedding(grad: Tensor, token_ids: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the matrix; rows of a token that comes twice are summed before they are rounded to `dtype`."""
    ids, places = torch.unique(token_ids, return_inverse=True)
    rows = torch.zeros((len(ids), grad.shape[1]), dtype=_wide(grad).dtype)
    rows.index_add_(0, places, _wide(grad))
    result = torch.zeros((vocab_size, grad.shape[1]), dtype=dtype)
    result[ids] = rows.to(dtype)
    return result


def expert_routing(grad: Tensor, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    """Gradient of the logits: that of the softmax at the chosen experts, 0 at the others."""
    chosen = topk_weights * (grad - (topk_weights * grad).sum(dim=-1, keepdim=True))
    return chosen.new_zeros((grad.shape[0], num_experts)).scatter(1, topk_ids.long(), chosen)


def _weight_rows(weight: Tensor, scales: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Rows of a dense weight, stored or packed, some at a time: the first one's number, and (rows, K) as held."""
    lines = _PANEL_ROWS if weight.dim() == 3 else 1
    for begin in range(0, weight.shape[0], _ROWS // lines):
        some = slice(begin, begin + _ROWS // lines)
        rows, factors = weight[some], None if scales is None else scales[some]
        if lines > 1:
            panels, per_row = rows.shape[:2]
            shape = (panels * lines, per_row * _BLOCK)
            stored = torch.empty(shape, dtype=torch.bfloat16 if factors is None else torch.int8)
            stored_factors = None if factors is None else torch.empty((shape[0], per_row), dtype=torch.bfloat16)
            _core.unpack_linear(rows, factors, stored, stored_factors)
            rows, factors = stored, stored_factors
        if factors is not None:
            blocks = rows.view(len(rows), -1, _BLOCK).float()
            rows = (blocks * factors.float()[..., None]).flatten(1)
        yield begin * lines, rows


def linear_x(grad: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    """Gradient of x: ``g W``."""
    grad = _wide(grad)
    in_features = weight.shape[1] * (_BLOCK if weight.dim() == 3 else 1)
    dx = torch.zeros((grad.shape[0], in_features), dtype=grad.dtype)
    for begin, rows in _weight_rows(weight, scales):
        dx.addmm_(grad[:, begin : begin + len(rows)], rows.to(grad.dtype))
    return dx


def _expert(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """One expert's matrix (rows, K), from MXFP4 as stored or packed."""
    if blocks.shape[-1] == _PANEL_ROWS * _BLOCK // 2:
        rows, per_row = blocks.shape[0] * _PANEL_ROWS, blocks.shape[1]
        stored = torch.empty((rows, per_row, _BLOCK // 2), dtype=torch.uint8)
        stored_scales = torch.empty((rows, per_row), dtype=torch.uint8)
        _core.unpack_mxfp4(blocks, scales, stored, stored_scales)
        blocks, scales = stored, stored_scales
    matrix: Tensor = ops.mxfp4_dequantize(blocks, scales)
    return matrix.to(dtype)


def mxfp4_moe(
    grad: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    swiglu_alpha: float,
    swiglu_limit: float,
    first_expert: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, topk_weights, gate_up_bias and down_bias.

    One expert is decoded at a time and meets only the tokens that chose it. With ``u = g W2``, the gradient of a
    choice's weight is ``u . a + g . b2``, so the second product need not be made again.
    """
    grad, x, shares = _wide(grad), _wide(x), _wide(topk_weights)
    bias1, bias2 = _wide(gate_up_bias), _wide(down_bias)
    dx, dshares = torch.zeros_like(x), torch.zeros_like(shares)
    dbias1, dbias2 = torch.zeros_like(bias1), torch.zeros_like(bias2)
    for e in (torch.unique(topk_ids).long() - first_expert).tolist():
        if not 0 <= e < gate_up_blocks.shape[0]:
            continue
        tokens, choices = (topk_ids == e + first_expert).nonzero(as_tuple=True)
        gate_up = _expert(gate_up_blocks[e], gate_up_scales[e], x.dtype)
        down = _expert(down_blocks[e], down_scales[e], x.dtype)
        rows = torch.addmm(bias1[e], x[tokens], gate_up.T)
        gate, up = rows[:, 0::2].clamp(max=swiglu_limit), rows[:, 1::2].clamp(-swiglu_limit, swiglu_limit)
        sigmoid = torch.sigmoid(swiglu_alpha * gate)
        g, share = grad[tokens], shares[tokens, choices]
        da = g @ down
        dshares[tokens, choices] = (da * gate * sigmoid * (up + 1)).sum(dim=-1) + g @ bias2[e]
        da *= share[:, None]
        drows = torch.empty_like(rows)
        drows[:, 0::2] = da * (up + 1) * sigmoid * (1 + swiglu_alpha * gate * (1 - sigmoid))
        drows[:, 1::2] = da * gate * sigmoid
        # A clamp passes nothing on where it holds.
        drows[:, 0::2].masked_fill_(rows[:, 0::2] > swiglu_limit, 0)
        drows[:, 1::2].masked_fill_(rows[:, 1::2].abs() > swiglu_limit, 0)
        dbias1[e] = drows.sum(dim=0)
        dbias2[e] = share @ g
        dx.index_add_(0, tokens, drows @ gate_up)
    return dx, dshares, dbias1, dbias2


class _Keys(NamedTuple):
    """Keys [first, first + n) of one sequence: where they lie in the cache, and (heads, n, head_dim) each."""

    first: int
    block: Tensor
    offset: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def gather(
        cls,
        k_cache: Tensor,
        v_cache: Tensor,
        scales: tuple[Tensor | None, Tensor | None],
        blocks: Tensor,
        places: Tensor,
        first: int,
        dtype: torch.dtype,
    ) -> _Keys:
        block, offset = blocks[places // k_cache.shape[2]].long(), places % k_cache.shape[2]
        found = []
        for cache, factors in zip((k_cache, v_cache), scales, strict=True):
            rows = cache[block, :, offset].to(dtype)
            if factors is not None:
                rows = rows * factors[block, :, offset].to(dtype)[..., None]
            found.append(rows.transpose(0, 1))
        return cls(first, block, offset, *found)


class _Scores(NamedTuple):
    q: Tensor  # (heads of k, group x queries, head_dim)
    keys: slice
    visible: Tensor  # (queries, keys)
    sinks: Tensor  # (heads of k, group, 1)


def _attend(grad: Tensor, t: _Scores, keys: _Keys, sm_scale: float, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a few queries, and of the sinks; those of the keys and values are added to `dk` and `dv`.

    With ``dp = g . v`` and ``delta = sum_j p_j dp_j``: ``ds_j = p_j (dp_j - delta)``; a sink has no value, so its
    logit gets ``-share delta``.
    """
    k, v = keys.k[:, t.keys], keys.v[:, t.keys]
    groups = (k.shape[0], -1, *t.visible.shape)
    s = torch.bmm(t.q, k.transpose(1, 2)).mul_(sm_scale).view(groups).masked_fill_(~t.visible, -torch.inf)
    top = torch.maximum(s.amax(dim=-1), t.sinks)
    p = s.sub_(top[..., None]).exp_()
    share = torch.exp(t.sinks - top)
    total = p.sum(dim=-1) + share
    p /= total[..., None]
    share = share / total
    dp = torch.bmm(grad, v.transpose(1, 2)).view(groups)
    delta = (p * dp).sum(dim=-1)
    ds = dp.sub_(delta[..., None]).mul_(p).flatten(1, 2).mul_(sm_scale)
    dk[:, t.keys].baddbmm_(ds.transpose(1, 2), t.q)
    dv[:, t.keys].baddbmm_(p.flatten(1, 2).transpose(1, 2), grad)
    return torch.bmm(ds, k), -(share * delta).sum(dim=-1)


def _attend_sequence(
    grad: Tensor, q: Tensor, sinks: Tensor, keys: _Keys, first: int, sm_scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries (n, heads, head_dim) at positions from `first` on, of their keys and values, of sinks."""
    count, num_heads, head_dim = q.shape
    kv_heads, num_keys, _ = keys.k.shape
    group = num_heads // kv_heads
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys.k), torch.zeros_like(keys.v)
    dsinks = torch.zeros_like(sinks)
    width = min(num_keys, window) if window else num_keys
    step = max(1, min(_MAX_QUERIES, _SCORES // (num_heads * width)))
    for begin in range(0, count, step):
        end = min(begin + step, count)
        rows = [
            x[begin:end].reshape(end - begin, kv_heads, group, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
            for x in (q, grad)
        ]
        position = torch.arange(first + begin, first + end)[:, None]
        lowest = max(keys.first, first + begin - window + 1) if window else keys.first
        key = torch.arange(lowest, first + end)
        visible = (key <= position) & (position - key < window if window else key >= 0)
        some = slice(lowest - keys.first, first + end - keys.first)
        t = _Scores(rows[0], some, visible, sinks.view(kv_heads, group, 1))
        dq_rows, dsink = _attend(rows[1], t, keys, sm_scale, dk, dv)
        dq[begin:end] = dq_rows.view(kv_heads, group, end - begin, head_dim).permute(2, 0, 1, 3).flatten(1, 2)
        dsinks += dsink.flatten()
    return dq, dk, dv, dsinks


def sink_attention(
    grad: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    key_starts: Tensor | None,
    sm_scale: float,
    sliding_window: int,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, both caches (of int8 ones: of the values they stand for) and the sinks.

    The softmax is made again for some queries at a time, so that memory grows with the keys, not with their square.
    """
    grad, q, sinks = _wide(grad), _wide(q), _wide(sinks)
    dq, dsinks = torch.zeros(q.shape, dtype=q.dtype), torch.zeros_like(sinks)
    dk, dv = (torch.zeros(cache.shape, dtype=q.dtype) for cache in (k_cache, v_cache))
    starts = [0] * len(seq_lens) if key_starts is None else key_starts.tolist()
    ends = cu_seqlens.tolist()
    for b, (length, start) in enumerate(zip(seq_lens.tolist(), starts, strict=True)):
        begin, end = ends[b], ends[b + 1]
        begin = max(begin, end - length)  # queries before the first key see nothing
        if begin == end:
            continue
        first = length - (end - begin)
        lowest = max(0, first - sliding_window + 1) if sliding_window else 0
        places = start + torch.arange(lowest, length)
        keys = _Keys.gather(k_cache, v_cache, (k_scales, v_scales), block_table[b], places, lowest, q.dtype)
        some = slice(begin, end)
        dq[some], dk_rows, dv_rows, dsink = _attend_sequence(
            grad[some], q[some], sinks, keys, first, sm_scale, sliding_window
        )
        for total, rows in ((dk, dk_rows), (dv, dv_rows)):
            # Sequences may share blocks, and a block may stand in a table twice.
            total.transpose(1, 2).index_put_((keys.block, keys.offset), rows.transpose(0, 1), accumulate=True)
        dsinks += dsink
    return dq, dk, dv, dsinks
