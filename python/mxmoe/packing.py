"""Weights by panels of sixteen rows: the layout in which the kernels read memory at its full speed.

`mxmoe.load` packs while loading; who calls the ops alone may pack once and pass the packed arrays wherever the stored
ones are taken, with the same result to the last bit. The layout itself is described in ``csrc/core/packed.h``.

The scales of a block lie right behind its values, so that a product reads memory as one stream: the two arrays that
packing returns are views of one buffer. Contiguous copies of them are as good, only slower to read.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mxmoe import _core
from mxmoe.memory import empty
from mxmoe.ops import Activations

__all__ = [
    "can_pack",
    "pack_linear",
    "pack_mxfp4",
    "prefers_packed",
    "unpack_linear",
    "unpack_mxfp4",
]

Array = NDArray[Any]

PANEL_ROWS = 16
_BLOCK = 32


def prefers_packed(activations: Activations, weights: Literal["mxfp4", "int8", "bf16"] = "mxfp4") -> bool:
    """Say whether the kernels in force are made for packed weights.

    Parameters
    ----------
    activations : {"float32", "bf16", "int8"}
        As the ops will be called with.
    weights : {"mxfp4", "int8", "bf16"}

    Returns
    -------
    bool
        When False they take packed weights, too, but read stored ones faster.
    """
    return _core.prefers_packed(activations, weights)


def can_pack(rows: int, k: int) -> bool:
    """Say whether a matrix of `rows` rows and `k` columns has whole panels and blocks."""
    return rows > 0 and k > 0 and rows % PANEL_ROWS == 0 and k % _BLOCK == 0


def _side_by_side(shape: tuple[int, ...], value_bytes: int, scale_bytes: int) -> tuple[Array, Array]:
    """Make uint8 arrays (*shape, value_bytes) and (*shape, scale_bytes), row beside row in one buffer."""
    both = empty((*shape, value_bytes + scale_bytes))
    return both[..., :value_bytes], both[..., value_bytes:]


def pack_mxfp4(blocks: Array, scales: Array) -> tuple[Array, Array]:
    """Pack MXFP4 weights.

    Parameters
    ----------
    blocks : array, shape (..., rows, k // 32, 16), uint8
        As stored; rows a multiple of 16.
    scales : array, shape (..., rows, k // 32), uint8

    Returns
    -------
    packed : array, shape (..., rows // 16, k // 32, 256), uint8
    packed_scales : array, shape (..., rows // 16, k // 32, 16), uint8
        Views of one buffer.

    Raises
    ------
    TypeError, ValueError
        A dtype or shape is not as above.
    """
    if blocks.ndim < 3 or scales.shape != blocks.shape[:-1]:
        raise ValueError(
            f"blocks has shape {blocks.shape} and scales {scales.shape}; "
            "wanted (..., rows, k / 32, 16) and the same without the last axis"
        )
    *lead, rows, per_row, _ = blocks.shape
    flat = blocks.reshape(-1, per_row, blocks.shape[-1])
    packed, packed_scales = _side_by_side((len(flat) // PANEL_ROWS, per_row), 256, PANEL_ROWS)
    _core.pack_mxfp4(flat, scales.reshape(-1, per_row), packed, packed_scales)
    shape = (*lead, rows // PANEL_ROWS, per_row)
    return packed.reshape(*shape, 256), packed_scales.reshape(*shape, PANEL_ROWS)


def unpack_mxfp4(packed: Array, packed_scales: Array) -> tuple[Array, Array]:
    """Undo `pack_mxfp4`.

    Parameters
    ----------
    packed : array, shape (..., rows // 16, k // 32, 256), uint8
    packed_scales : array, shape (..., rows // 16, k // 32, 16), uint8

    Returns
    -------
    blocks : array, shape (..., rows, k // 32, 16), uint8
    scales : array, shape (..., rows, k // 32), uint8

    Raises
    ------
    TypeError, ValueError
        A dtype or shape is not as above.
    """
    if packed.ndim < 3 or packed_scales.shape[:-1] != packed.shape[:-1]:
        raise ValueError(
            f"packed has shape {packed.shape} and packed_scales {packed_scales.shape}; "
            "wanted (..., rows / 16, k / 32, 256) and (..., rows / 16, k / 32, 16)"
        )
    *lead, panels, per_row, _ = packed.shape
    shape = (*lead, panels * PANEL_ROWS, per_row)
    blocks, scales = np.empty((*shape, 16), np.uint8), np.empty(shape, np.uint8)
    _core.unpack_mxfp4(
        packed.reshape(-1, per_row, packed.shape[-1]),
        packed_scales.reshape(-1, per_row, packed_scales.shape[-1]),
        blocks.reshape(-1, per_row, 16),
        scales.reshape(-1, per_row),
    )
    return blocks, scales


def pack_linear(weight: Array, scales: Array | None = None) -> tuple[Array, Array | None]:
    """Pack the weights of a dense layer.

    Parameters
    ----------
    weight : array, shape (rows, k), bfloat16 or int8
        rows a multiple of 16, k of 32.
    scales : array, shape (rows, k // 32), bfloat16, optional
        With int8 weights only.

    Returns
    -------
    packed : array, shape (rows // 16, k // 32, 512), bfloat16 or uint8
        uint8 for int8: the codes are raised by 128.
    packed_scales : array, shape (rows // 16, k // 32, 16), bfloat16, or None
        A view of the buffer that `packed` is one of.

    Raises
    ------
    TypeError, ValueError
        A dtype or shape is not as above.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {weight.shape}; wanted (rows, k)")
    shape = (weight.shape[0] // PANEL_ROWS, weight.shape[1] // _BLOCK)
    packed_scales: Array | None = None
    if scales is None:
        packed = empty((*shape, 1024)).view(ml_dtypes.bfloat16)
    else:
        packed, scale_bytes = _side_by_side(shape, 512, 2 * PANEL_ROWS)
        packed_scales = scale_bytes.view(ml_dtypes.bfloat16)
    _core.pack_linear(np.ascontiguousarray(weight), scales, packed, packed_scales)
    return packed, packed_scales


def unpack_linear(packed: Array, packed_scales: Array | None = None) -> tuple[Array, Array | None]:
    """Undo `pack_linear`.

    Parameters
    ----------
    packed : array, shape (rows // 16, k // 32, 512), bfloat16 or uint8
    packed_scales : array, shape (rows // 16, k // 32, 16), bfloat16, optional
        With uint8 only.

    Returns
    -------
    weight : array, shape (rows, k), bfloat16 or int8
    scales : array, shape (rows, k // 32), bfloat16, or None

    Raises
    ------
    TypeError, ValueError
        A dtype or shape is not as above.
    """
    if packed.ndim != 3:
        raise ValueError(f"packed has shape {packed.shape}; wanted (rows / 16, k / 32, 512)")
    rows, per_row = packed.shape[0] * PANEL_ROWS, packed.shape[1]
    weight = np.empty((rows, per_row * _BLOCK), np.int8 if packed_scales is not None else ml_dtypes.bfloat16)
    scales = None if packed_scales is None else np.empty((rows, per_row), ml_dtypes.bfloat16)
    _core.unpack_linear(packed, packed_scales, weight, scales)
    return weight, scales
