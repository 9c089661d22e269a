"""Memory for weights that are made while loading, and for keys and values."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["empty", "zeros"]

_HUGE_PAGE, _LINE = 2 << 20, 64


def empty(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Make an array of bytes; a large one has whole huge pages to itself, which memory is read faster from.

    What NumPy allocates begins anywhere, and has small pages at both ends: of some megabytes they are a good part. A
    large array goes back to the system as soon as it is let go, too.

    Parameters
    ----------
    shape : tuple of int

    Returns
    -------
    ndarray, uint8
        Not initialised.

    Raises
    ------
    MemoryError
        The system does not give that much.
    """
    memory = _huge_pages(math.prod(shape), "weights")
    return np.empty(shape, np.uint8) if memory is None else memory.reshape(shape)


def zeros(arrays: Sequence[tuple[Sequence[int], Any]], what: str) -> list[NDArray[Any]]:
    """Make arrays of zeros in one piece of memory, which is like that of `empty` and taken as it is first written.

    Parameters
    ----------
    arrays : sequence of (shape, dtype)
    what : str
        Whose they are, for errors.

    Raises
    ------
    MemoryError
        The system does not give that much.
    """
    dtypes = [np.dtype(dtype) for _, dtype in arrays]
    sizes = [math.prod(shape) * dtype.itemsize for (shape, _), dtype in zip(arrays, dtypes, strict=True)]
    begins = [0, *itertools.accumulate(-(-size // _LINE) * _LINE for size in sizes)]
    memory = _huge_pages(begins[-1], what)
    if memory is None:
        memory = np.zeros(begins[-1], np.uint8)
    return [
        memory[begin : begin + size].view(dtype).reshape(shape)
        for (shape, _), dtype, begin, size in zip(arrays, dtypes, begins, sizes, strict=False)
    ]


def _huge_pages(size: int, what: str) -> NDArray[np.uint8] | None:
    """Map whole huge pages for so many bytes; None where small pages will do."""
    if size < _HUGE_PAGE // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    try:
        mapping = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{what} of {size} bytes find no room: {error.strerror}") from error
    with suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    begin = -memory.ctypes.data % _HUGE_PAGE
    return memory[begin : begin + size]
