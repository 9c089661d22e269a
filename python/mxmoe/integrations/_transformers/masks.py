"""Masks as three numbers a sequence: where its visible keys begin and end, and how many keys are held.

transformers asks for a mask once a step and kind of layer and hands it to every such layer. What the kernels have to
know is where a sequence's keys begin (after the padding on its left) and end (before the unused places of a static
cache). So the mask here is None, when all keys count, or an int32 tensor (batch, 3); of sliding layers that tensor
expanded to (batch, 3, sliding_window), so that the layer knows the window also while tracing. Any other mask is an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

__all__ = ["make_mask", "ranges_of_4d_mask"]

_MaskFunction = Callable[..., Any]
_ONLY = "attn_implementation='mxmoe' takes causal, sliding-window and padding masks only"


def _same(f: Any, g: Any) -> bool:
    """Whether two functions made by the same factory hold the same things."""
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(_same(a, b) for a, b in zip(f, g, strict=True))
    if f is g or not hasattr(f, "__code__") or not hasattr(g, "__code__"):
        return bool(f is g or (type(f) is type(g) and f == g))
    held = [tuple(cell.cell_contents for cell in h.__closure__ or ()) for h in (f, g)]
    return f.__code__ is g.__code__ and _same(*held)


@torch.library.custom_op("mxmoe::places", mutates_args=())
def _places(first: torch.Tensor, count: int) -> torch.Tensor:
    """Count from `first` on. An operator, since the compiler stumbles over comparisons of numbers it sees through."""
    return torch.arange(count) + first


@_places.register_fake
def _(first: torch.Tensor, count: int) -> torch.Tensor:
    return first.new_empty((count,), dtype=torch.int64)


def _probe(function: _MaskFunction, window: int | None, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Hold a mask function against the causal one along its edges, where it cannot be looked into: () bool.

    The edges are each query's own key and the next, the two at the window's end, the first key, and all keys of the
    last query.
    """
    sequence = head = torch.zeros((), dtype=torch.int64)
    reach = queries.shape[0] if window is None else window
    beside = (0, 1, 1 - reach, -reach)
    places = [(queries, queries + step) for step in beside] + [(queries, keys[:1].expand_as(queries))]
    agree = torch.ones((), dtype=torch.bool)
    for q, k in [*places, (queries[-1:].expand_as(keys), keys)]:
        inside = (k >= keys[0]) & (k <= keys[-1])
        k = k.clamp(keys[0], keys[-1])
        seen = (k <= q) if window is None else (k <= q) & (k > q - window)
        agree = agree & ((function(sequence, head, q, k) == seen) | ~inside).all()
    return agree


@torch.library.custom_op("mxmoe::key_ranges", mutates_args=())
def _key_ranges(padding: torch.Tensor, end: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Where each sequence's visible keys begin and end, and the number of keys: (batch, 3) int32.

    Parameters
    ----------
    padding : (batch, keys) bool
        False for padding.
    end : () int64
        How many of the keys are in use, those of the new tokens included.
    plain : () bool
        What `_probe` found.
    """
    if not plain:
        raise ValueError(f"{_ONLY}; came a mask function that is none of them")
    stop = int(end)
    seen = padding[:, :stop]
    starts = torch.where(seen.any(-1), seen.int().argmax(-1), stop)
    # Behind the last visible key there are only queries that are padding themselves, and whose results nobody reads.
    broken = starts + seen.sum(-1) != stop - seen.flip(-1).int().argmax(-1)
    if bool(broken.any()):
        came = f"attention_mask of sequence {int(broken.nonzero()[0])} hides keys between visible ones"
        raise ValueError(f"{_ONLY}; {came}, as padding on the right does once tokens follow it: pad on the left")
    counts = (torch.full_like(starts, count) for count in (stop, padding.shape[1]))
    return torch.stack([starts, *counts], -1).to(torch.int32)


@_key_ranges.register_fake
def _(padding: torch.Tensor, end: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    return padding.new_empty((padding.shape[0], 3), dtype=torch.int32)


def make_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: _MaskFunction = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    cache_position: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Make the mask that the attention function takes; transformers calls this (`AttentionMaskInterface`).

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        Sequences, new tokens of each, and keys held.
    q_offset : int or () int64 tensor
        Place of the first new token; a tensor with static caches.
    kv_offset : int
        Place of the first key held.
    mask_function : callable
        Says which keys a query sees.
    attention_mask : (batch, length) bool, optional
        False for padding.
    local_size : int, optional
        Sliding window.
    use_vmap : bool
        True when a caller added a mask function.
    cache_position : (q_length,) int64, optional
        Places of the new tokens; older versions give it instead of `q_length` and `q_offset`.

    Returns
    -------
    None, or tensor (batch, 3) or (batch, 3, local_size), int32

    Raises
    ------
    ValueError
        The mask is not causal, sliding or padding.
    """
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if use_vmap:
        raise ValueError(f"{_ONLY}; came an or_mask_function or and_mask_function")
    end, plain = q_offset + q_length - kv_offset, torch.ones((), dtype=torch.bool)
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if torch.compiler.is_compiling():
        if mask_function is not causal_mask_function:
            queries, keys = _places(torch.as_tensor(q_offset), q_length), _places(torch.tensor(kv_offset), kv_length)
            plain = _probe(mask_function, local_size, queries, keys)
    else:
        end = int(end)
        wanted = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
        if not _same(mask_function, wanted):
            raise ValueError(f"{_ONLY}; came {getattr(mask_function, '__qualname__', mask_function)}")
        if attention_mask is not None and bool(attention_mask[:, :end].all()):
            attention_mask = None
    whole = attention_mask is None and not isinstance(end, torch.Tensor) and end == kv_length
    if whole and mask_function is causal_mask_function:
        return None
    if attention_mask is None:
        attention_mask = torch.ones((1, 1), dtype=torch.bool).expand(batch_size, kv_length)
    elif (missing := kv_length - attention_mask.shape[-1]) > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    end = end.to(torch.int64) if isinstance(end, torch.Tensor) else torch.full((), end, dtype=torch.int64)
    ranges: torch.Tensor = _key_ranges(attention_mask, end, plain)
    return ranges if local_size is None else ranges[..., None].expand(-1, -1, local_size)


@torch.library.custom_op("mxmoe::ranges_of_4d_mask", mutates_args=())
def ranges_of_4d_mask(mask: torch.Tensor, q_length: int, kv_length: int, window: int) -> torch.Tensor:
    """Read a mask that a caller made; returns what `_key_ranges` does.

    Parameters
    ----------
    mask : (batch, 1 or heads, q_length, kv_length or more), bool or float
        True or 0 where a key is seen; False or at most -1e4 where it is not.
    q_length, kv_length : int
    window : int
        Of the layer; 0 for none.

    Raises
    ------
    TypeError, ValueError
        It is not causal, sliding or padding.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask has four axes and dtype {mask.dtype}; wanted bool or a float")
    if mask.shape[2] != q_length or mask.shape[3] < kv_length:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; wanted (batch, 1, {q_length}, {kv_length})")
    mask = mask[..., :kv_length]
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and bool((~seen & (mask > -1e4)).any()):
        raise ValueError(f"{_ONLY}; came a 4D attention_mask with a bias")
    if bool((seen != seen[:, :1]).any()):
        raise ValueError(f"{_ONLY}; came a 4D attention_mask that differs between heads")
    seen = seen[:, 0]  # (batch, q, k)
    places, new = torch.arange(kv_length), torch.arange(q_length)
    some = seen.any(-1)
    last = torch.where(some, kv_length - 1 - seen.flip(-1).int().argmax(-1), -kv_length)  # (batch, q)
    # A token sees itself, so the new tokens end behind the last visible key; a token that nobody sees is padding.
    ends = ((last - new).amax(-1) + q_length).clamp(q_length, kv_length)
    starts = torch.where(seen.any(-1).any(-1), seen.any(1).int().argmax(-1), ends)
    own = ends[:, None] - q_length + new  # (batch, q)
    wanted = (places <= own[..., None]) & (places >= starts[:, None, None])
    if window:
        wanted = wanted & (places > own[..., None] - window)
    hidden = ~seen.any(1).gather(1, own.clamp(max=kv_length - 1))
    if bool(((seen != wanted).any(-1) & ~hidden).any()):
        raise ValueError(
            f"{_ONLY}; came a 4D attention_mask that is none of them"
            + (f" (this layer's sliding window is {window})" if window else "")
        )
    return torch.stack([starts, ends, torch.full_like(starts, kv_length)], -1).to(torch.int32)


@ranges_of_4d_mask.register_fake
def _(mask: torch.Tensor, q_length: int, kv_length: int, window: int) -> torch.Tensor:
    return mask.new_empty((mask.shape[0], 3), dtype=torch.int32)
