"""Weights by panels of sixteen rows: the layout in which the kernels read memory at its full speed.

`mxmoe.load` packs while loading; who calls the ops alone may pack once and pass the packed arrays wherever the stored
ones are taken, with the same result to the last bit. The layout itself is described in ``csrc/core/packed.h``.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mxmoe import _core
from mxmoe.ops import Activations

__all__ = [
    "can_pack",
    "pack_linear",
    "pack_mxfp4",
    "pack_mxfp4_in_place",
    "prefers_packed",
    "unpack_linear",
    "unpack_mxfp4",
]

Array = NDArray[Any]

PANEL_ROWS = 16
_BLOCK = 32
_ROWS_IN_PLACE = 16 * PANEL_ROWS


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
    shape = (*lead, rows // PANEL_ROWS, per_row)
    packed, packed_scales = np.empty((*shape, 256), np.uint8), np.empty((*shape, 16), np.uint8)
    _core.pack_mxfp4(
        blocks.reshape(-1, per_row, blocks.shape[-1]),
        scales.reshape(-1, per_row),
        packed.reshape(-1, per_row, 256),
        packed_scales.reshape(-1, per_row, 16),
    )
    return packed, packed_scales


def pack_mxfp4_in_place(blocks: Array, scales: Array) -> tuple[Array, Array]:
    """Pack MXFP4 weights into the memory they lie in.

    Parameters
    ----------
    blocks : array, shape (num_experts, rows, k // 32, 16), uint8
        Contiguous; overwritten.
    scales : array, shape (num_experts, rows, k // 32), uint8
        Contiguous; overwritten.

    Returns
    -------
    packed, packed_scales : array
        As of `pack_mxfp4`, in the memory of `blocks` and `scales`.

    Raises
    ------
    TypeError, ValueError
        A dtype or shape is not as above.
    """
    num_experts, rows, per_row, _ = blocks.shape
    flat, flat_scales = blocks.reshape(-1, per_row, 16), scales.reshape(-1, per_row)
    # A panel takes the very bytes of its sixteen rows, so a few at a time can change places.
    for begin in range(0, len(flat), _ROWS_IN_PLACE):
        some = slice(begin, begin + _ROWS_IN_PLACE)
        packed, packed_scales = pack_mxfp4(flat[some], flat_scales[some])
        flat[some] = packed.reshape(-1, per_row, 16)
        flat_scales[some] = packed_scales.reshape(-1, per_row)
    shape = (num_experts, rows // PANEL_ROWS, per_row)
    return blocks.reshape(*shape, 256), scales.reshape(*shape, 16)


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

    Raises
    ------
    TypeError, ValueError
        A dtype or shape is not as above.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {weight.shape}; wanted (rows, k)")
    shape = (weight.shape[0] // PANEL_ROWS, weight.shape[1] // _BLOCK)
    packed = np.empty((*shape, 512), np.uint8 if scales is not None else ml_dtypes.bfloat16)
    packed_scales = None if scales is None else np.empty((*shape, PANEL_ROWS), ml_dtypes.bfloat16)
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
