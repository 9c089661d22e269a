"""Attention, its cache and the number formats as torch custom operators; see `_torch_ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxmoe.integrations import _torch_grad as gradients
from mxmoe.integrations._torch_define import (
    PairOp,
    TensorOp,
    _backend,
    _cache,
    _define,
    _define_backward,
    _frozen,
    _given,
    _int32,
    _no_tensor,
    _optional,
    _rows,
)

__all__: list[str] = []

# kv_cache_write ---------------------------------------------------------------------------------------------------


def _kv_cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    _backend(k_cache).kv_cache_write(
        _rows("k", k, 2),
        _rows("v", v, 2),
        _given("k_cache", k_cache),
        _given("v_cache", v_cache),
        slots.detach(),
        k_scales=_optional("k_scales", k_scales),
        v_scales=_optional("v_scales", v_scales),
    )


kv_cache_write = torch.library.custom_op(
    "mxmoe::kv_cache_write",
    _kv_cache_write,
    mutates_args=("k_cache", "v_cache", "k_scales", "v_scales"),
    schema="(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!)? k_scales, "
    "Tensor(d!)? v_scales) -> ()",
)
kv_cache_write.register_fake(_no_tensor)


# sink_attention ---------------------------------------------------------------------------------------------------

_BATCH = "Tensor block_table, Tensor cu_seqlens, Tensor seq_lens, Tensor? key_starts"


def _sink_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    key_starts: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    sm_scale: float,
    sliding_window: int,
    activations: str,
    sink_share: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    result: Tensor = _backend(q).sink_attention(
        _rows("q", q, 2),
        _given("k_cache", k_cache),
        _given("v_cache", v_cache),
        _rows("sinks", sinks),
        block_table=_int32("block_table", block_table),
        cu_seqlens=_int32("cu_seqlens", cu_seqlens),
        seq_lens=_int32("seq_lens", seq_lens),
        key_starts=None if key_starts is None else _int32("key_starts", key_starts),
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        activations=activations,
        k_scales=_optional("k_scales", k_scales),
        v_scales=_optional("v_scales", v_scales),
        sink_share=_optional("sink_share", sink_share),
        out=_optional("out", out),
    )
    return result


sink_attention: TensorOp = _define(
    "sink_attention",
    f"Tensor q, Tensor k_cache, Tensor v_cache, Tensor sinks, {_BATCH}, Tensor? k_scales, Tensor? v_scales, "
    "float sm_scale, SymInt sliding_window, str activations",
    "Tensor",
    _sink_attention,
    lambda q, *_: q.new_empty(q.shape),
    "Tensor(a!)? sink_share, Tensor(b!) out",
)


def _attention_gradients(
    grad: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    key_starts: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    sm_scale: float,
    sliding_window: int,
) -> tuple[Tensor, ...]:
    batch = (block_table, cu_seqlens, seq_lens, key_starts)
    return gradients.sink_attention(
        grad, q, k_cache, v_cache, sinks, *batch, sm_scale, sliding_window, k_scales, v_scales
    )


sink_attention_backward = _define_backward(
    "sink_attention_backward",
    f"Tensor grad, Tensor q, Tensor k_cache, Tensor v_cache, Tensor sinks, {_BATCH}, Tensor? k_scales, "
    "Tensor? v_scales, float sm_scale, SymInt sliding_window",
    "(Tensor, Tensor, Tensor, Tensor)",
    _attention_gradients,
    (1, 2, 3, 4),
)


def _sink_attention_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, sm_scale, sliding_window, _ = inputs
    _frozen(k_scales=tensors[8], v_scales=tensors[9])
    ctx.save_for_backward(*tensors)
    ctx.options = (sm_scale, sliding_window)


def _sink_attention_backward(ctx: Any, grad: Tensor) -> Any:
    found = sink_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted = (x if wants else None for x, wants in zip(found, ctx.needs_input_grad, strict=False))
    return *wanted, *[None] * 9


sink_attention.register_autograd(_sink_attention_backward, setup_context=_sink_attention_setup)


# sink_attention_bhsd ----------------------------------------------------------------------------------------------


def _check_dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted (batch, heads, sequence, head_dim)")
    wanted = (q.shape[0], k.shape[1], k.shape[2], q.shape[3])
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted (batch, heads, keys, head_dim) = {wanted}")
    if k.dtype != v.dtype:
        raise TypeError(f"v has dtype {v.dtype}; wanted that of k, {k.dtype}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] != 0 or q.shape[1] < 1:
        raise ValueError(f"q has {q.shape[1]} heads; wanted a multiple of k's {k.shape[1]}")


def _ranges(q: Tensor, k: Tensor, key_starts: Tensor | None, key_ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check where the rows' keys begin and end; as int32."""
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    for name, x in (("key_starts", key_starts), ("key_ends", key_ends)):
        if x is not None and tuple(x.shape) != (batch,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; wanted (batch,) = ({batch},)")
    starts = torch.zeros(batch, dtype=torch.int32) if key_starts is None else _int32("key_starts", key_starts)
    ends = torch.full((batch,), keys, dtype=torch.int32) if key_ends is None else _int32("key_ends", key_ends)
    for b, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if not queries <= end <= keys:
            raise ValueError(f"key_ends[{b}] is {end}; wanted {queries} queries to {keys} keys")
        if not 0 <= start <= end:
            raise ValueError(f"key_starts[{b}] is {start}; wanted 0 to key_ends[{b}] = {end}")
    return starts, ends


def _paged(
    q: Tensor, k: Tensor, key_starts: Tensor | None, key_ends: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Say the same of a paged cache, whose block b is row b: block_table, cu_seqlens, seq_lens, key_starts."""
    starts, ends = _ranges(q, k, key_starts, key_ends)
    rows = torch.arange(q.shape[0] + 1, dtype=torch.int32)
    return rows[:-1, None].contiguous(), rows * q.shape[2], ends - starts, starts


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1], x.shape[3])


def _sink_attention_bhsd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    key_starts: Tensor | None,
    key_ends: Tensor | None,
    sm_scale: float,
    sliding_window: int,
    activations: str,
) -> Tensor:
    backend = _backend(q)
    q, k, v = _given("q", q), _given("k", k), _given("v", v)
    _check_dense(q, k, v)
    block_table, cu_seqlens, seq_lens, starts = _paged(q, k, key_starts, key_ends)
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty((batch, queries, heads, head_dim))
    if out.numel() == 0:
        return out
    backend.sink_attention(
        _rows("q", _token_major(q), 2),
        _cache("k", k),
        _cache("v", v),
        _rows("sinks", sinks),
        block_table=block_table,
        cu_seqlens=cu_seqlens,
        seq_lens=seq_lens,
        key_starts=starts,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        activations=activations,
        out=out.view(batch * queries, heads, head_dim),
    )
    return out


# The result is (batch, queries, heads, head_dim), as it lies in memory.
sink_attention_bhsd: TensorOp = _define(
    "sink_attention_bhsd",
    "Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor? key_starts, Tensor? key_ends, float sm_scale, "
    "SymInt sliding_window, str activations",
    "Tensor",
    _sink_attention_bhsd,
    lambda q, *_: q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])),
)


def _dense_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    key_starts: Tensor | None,
    key_ends: Tensor | None,
    sm_scale: float,
    sliding_window: int,
) -> tuple[Tensor, ...]:
    tokens = _token_major(grad.transpose(1, 2)), _token_major(q)
    batch = _paged(q, k, key_starts, key_ends)
    dq, dk, dv, dsinks = gradients.sink_attention(*tokens, k, v, sinks, *batch, sm_scale, sliding_window)
    shape = (q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    return dq.view(shape).transpose(1, 2), dk, dv, dsinks


sink_attention_bhsd_backward = _define_backward(
    "sink_attention_bhsd_backward",
    "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor? key_starts, Tensor? key_ends, float sm_scale, "
    "SymInt sliding_window",
    "(Tensor, Tensor, Tensor, Tensor)",
    _dense_gradients,
    (1, 2, 3, 4),
)


def _dense_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, sm_scale, sliding_window, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (sm_scale, sliding_window)


def _dense_backward(ctx: Any, grad: Tensor) -> Any:
    found = sink_attention_bhsd_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted = (x if wants else None for x, wants in zip(found, ctx.needs_input_grad, strict=False))
    return *wanted, *[None] * 5


sink_attention_bhsd.register_autograd(_dense_backward, setup_context=_dense_setup)


# quantisation -----------------------------------------------------------------------------------------------------


def _mxfp4_dequantize(blocks: Tensor, scales: Tensor, bfloat16: bool) -> Tensor:
    dtype = "bfloat16" if bfloat16 else "float32"
    result: Tensor = _backend(blocks).mxfp4_dequantize(blocks.contiguous(), scales.contiguous(), dtype=dtype)
    return result


mxfp4_dequantize: TensorOp = _define(
    "mxfp4_dequantize",
    "Tensor blocks, Tensor scales, bool bfloat16",
    "Tensor",
    _mxfp4_dequantize,
    lambda blocks, scales, bfloat16: blocks.new_empty(
        (*scales.shape[:-1], scales.shape[-1] * 32), dtype=torch.bfloat16 if bfloat16 else torch.float32
    ),
)


def _mxfp4_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks, scales = _backend(x).mxfp4_quantize(_given("x", x).contiguous())
    return blocks, scales


def _mxfp4_quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], x.shape[-1] // 32)
    return x.new_empty((*shape, 16), dtype=torch.uint8), x.new_empty(shape, dtype=torch.uint8)


mxfp4_quantize: PairOp = _define(
    "mxfp4_quantize", "Tensor x", "(Tensor, Tensor)", _mxfp4_quantize, _mxfp4_quantize_fake
)


def _int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _backend(x).int8_quantize(_rows("x", x))
    return codes, scales


def _int8_quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((x.shape[0], x.shape[1] // 32), dtype=torch.bfloat16)
    return x.new_empty(x.shape, dtype=torch.int8), scales


int8_quantize: PairOp = _define("int8_quantize", "Tensor x", "(Tensor, Tensor)", _int8_quantize, _int8_quantize_fake)
