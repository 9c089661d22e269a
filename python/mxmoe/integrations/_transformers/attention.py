"""The attention function that transformers calls for ``attn_implementation="mxmoe"``."""

from __future__ import annotations

from typing import Any

import torch

from mxmoe.integrations._transformers.masks import ranges_of_4d_mask
from mxmoe.integrations.torch import sink_attention_bhsd

__all__ = ["attention"]

_NAME = "attn_implementation='mxmoe'"
_MAX_HEAD_DIM = 256
# Of what callers may pass beyond what is computed here, the things that would change the result.
_UNKNOWN = ("softcap", "position_bias", "head_mask", "cache", "block_table")


def _check_asked(module: Any, dropout: float, more: dict[str, Any]) -> None:
    """Raise for what is asked of the kernel but not computed by it."""
    for name in _UNKNOWN:
        if more.get(name) is not None:
            raise ValueError(f"{_NAME} got {name}, which it does not know; use attn_implementation='eager'")
    if dropout:
        raise ValueError(f"{_NAME} got dropout {dropout}; wanted 0 (attention_dropout in the config)")
    is_causal = more.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{_NAME} was called by {type(module).__name__} without causality; wanted causal attention")
    if more.get("output_attentions"):
        raise ValueError(f"{_NAME} has no attention weights to give; use attn_implementation='eager'")


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise for sizes that the kernel does not take."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    head_dim, heads, kv_heads = query.shape[3], query.shape[1], key.shape[1]
    if key.shape != value.shape or key.shape[3] != head_dim or head_dim > _MAX_HEAD_DIM or heads % kv_heads:
        wanted = f"one head_dim of at most {_MAX_HEAD_DIM}, and query heads a multiple of key heads"
        raise ValueError(f"{_NAME} got {shapes} (batch, heads, tokens, head_dim); wanted {wanted}")


def _ranges(
    mask: torch.Tensor | None, window: int | None, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, int | None]:
    """Key starts, key ends and sliding window out of what `make_mask`, or a caller, made."""
    if mask is None:
        return None, None, window
    new, keys = query.shape[2], key.shape[2]
    if mask.ndim == 4:
        ranges = ranges_of_4d_mask(mask, new, keys, window or 0).expand(query.shape[0], -1)
    elif mask.dtype == torch.int32 and mask.ndim in (2, 3) and mask.shape[1] == 3:
        if mask.ndim == 3:
            if window is not None and mask.shape[2] != window:
                came = f"a mask for a sliding window of {mask.shape[2]}"
                raise ValueError(f"{_NAME} got {came}; the layer's is {window}")
            window, mask = mask.shape[2], mask[..., 0]
        if not torch.compiler.is_compiling() and int(mask[0, 2]) != keys:
            raise ValueError(f"{_NAME} got a mask for {int(mask[0, 2])} keys; the layer's cache gave {keys}")
        ranges = mask
    else:
        came = f"an attention_mask of {mask.dtype} and shape {tuple(mask.shape)}"
        raise ValueError(f"{_NAME} got {came}; wanted one that transformers made for it, or a 4D one")
    return ranges[:, 0].contiguous(), ranges[:, 1].contiguous(), window


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal grouped-query attention, with a sink for every head where the module has them.

    Parameters
    ----------
    module : Module
        The attention layer; its ``sinks`` are taken when `s_aux` is not given.
    query : (batch, num_attention_heads, new_tokens, head_dim) float32 or bfloat16
    key, value : (batch, num_key_value_heads, keys, head_dim)
        From the cache, the new tokens' included.
    attention_mask : tensor, optional
        As `make_mask` makes it, or a 4D mask that says the same.
    scaling : float, optional
        By default ``head_dim ** -0.5``.
    dropout : float
        0.
    sliding_window : int, optional
        In keys, the query's own included.
    s_aux : (num_attention_heads,), optional
        The sinks.

    Returns
    -------
    tensor (batch, new_tokens, num_attention_heads, head_dim), dtype of `query`
    None
        Where other implementations return the attention weights.

    Raises
    ------
    TypeError, ValueError
        Something was asked for that the kernel does not compute.
    """
    _check_asked(module, dropout, kwargs)
    _check_shapes(query, key, value)
    sinks = getattr(module, "sinks", None) if s_aux is None else s_aux
    if sinks is None:
        sinks = query.new_full((query.shape[1],), -torch.inf, dtype=torch.float32)
    starts, ends, window = _ranges(attention_mask, sliding_window, query, key)
    y = sink_attention_bhsd(
        query,
        key,
        value,
        sinks,
        sm_scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        sliding_window=window,
        key_starts=starts,
        key_ends=ends,
    )
    return y.transpose(1, 2), None
