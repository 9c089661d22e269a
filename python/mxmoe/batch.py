"""What callers say of a batch of tokens: ids, where sequences begin, and which they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["check_bounds", "check_sequences", "check_token_ids"]

_FEW = 16  # numbers that Python goes through faster than NumPy


def _integers(name: str, values: ArrayLike) -> NDArray[Any]:
    """Convert to a vector of integers; ValueError for what is none."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} is ragged; wanted a vector of integers") from None
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; wanted a non-empty vector of integers"
        )
    return array


def check_token_ids(token_ids: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    """Convert to int64 what is a non-empty vector of ids below `vocab_size`; ValueError for everything else."""
    ids = _integers("token_ids", token_ids)
    few = ids.tolist() if ids.size <= _FEW else [ids.min(), ids.max()]
    if min(few) < 0 or max(few) >= vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(f"token_ids holds {bad}; wanted 0 to {vocab_size - 1}")
    return ids.astype(np.int64)


def check_bounds(cu_seqlens: Sequence[int] | None, num_tokens: int) -> list[int]:
    """Tell where each sequence's tokens begin, and their number; ValueError where a sequence would have none."""
    if cu_seqlens is None:
        return [0, num_tokens]
    bounds: list[int] = _integers("cu_seqlens", cu_seqlens).tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens is {bounds}; wanted it to run from 0 to {num_tokens}")
    if any(end <= begin for begin, end in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens is {bounds}; wanted at least one token for every sequence")
    return bounds


def check_sequences(sequences: Sequence[int] | None, count: int) -> list[int]:
    """Tell which sequences of a cache are meant, `count` of them; ValueError where one comes twice."""
    if sequences is None:
        return list(range(count))
    which: list[int] = _integers("sequences", sequences).tolist()
    if len(which) != count or len(set(which)) != count:
        raise ValueError(f"sequences is {which}; wanted {count} different numbers, as many as cu_seqlens has")
    return which
