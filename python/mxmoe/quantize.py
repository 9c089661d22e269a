"""Turning bf16 experts into MXFP4, for checkpoints that were dequantised or fine-tuned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["quantize_mxfp4", "squared_error"]

# Rows that are decoded at a time when the rounding is measured: 2880 columns of float32 take 12 MB.
_ROWS = 256


def quantize_mxfp4(w: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Encode weights as MXFP4, the input dimension last.

    A block of 32 values shares the exponent ``floor(log2(max |w|)) - 2`` (OCP MX specification, section
    6.3); elements round to the nearest e2m1 value, ties to even, and saturate at 6. What was decoded from
    MXFP4 comes back with the same values, though not always the same bytes; a block of zeros takes scale
    byte 0.

    Parameters
    ----------
    w : (..., K) bfloat16 or float32
        K a multiple of 32; finite.

    Returns
    -------
    blocks : (..., K / 32, 16) uint8
    scales : (..., K / 32) uint8

    Raises
    ------
    TypeError, ValueError
        When dtype, shape or values are not as above.
    """
    # Imported here: reading a checkpoint otherwise does without the compiled extension.
    from mxmoe import ops

    blocks, scales = ops.mxfp4_quantize(w)
    return np.asarray(blocks), np.asarray(scales)


def squared_error(w: NDArray[Any], blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> tuple[float, float]:
    """Measure what rounding to MXFP4 changed.

    Parameters
    ----------
    w : (N, K) bfloat16 or float32
    blocks, scales : (N, K / 32, 16) uint8, (N, K / 32) uint8

    Returns
    -------
    error, power : float
        Sums of the squared differences and of the squared weights.
    """
    from mxmoe import ops

    error = power = 0.0
    for start in range(0, len(w), _ROWS):
        rows = slice(start, start + _ROWS)
        wide = w[rows].astype(np.float32).reshape(-1)
        difference = wide - np.asarray(ops.mxfp4_dequantize(blocks[rows], scales[rows])).reshape(-1)
        # Sums of some million squares: float32 keeps the four digits that are shown.
        error, power = error + float(difference @ difference), power + float(wide @ wide)
    return error, power
