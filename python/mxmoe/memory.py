"""Memory for weights that are made while loading."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

__all__ = ["empty"]

_HUGE_PAGE = 2 << 20


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
    size = math.prod(shape)
    if size < _HUGE_PAGE // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, np.uint8)
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    try:
        mapping = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"weights of {size} bytes find no room: {error.strerror}") from error
    with suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    begin = -memory.ctypes.data % _HUGE_PAGE
    return memory[begin : begin + size].reshape(shape)
