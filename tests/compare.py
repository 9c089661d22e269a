"""How results are compared: the one place where tolerances are written.

Integers, routing, offsets and MXFP4 decoding are compared exactly. Floats are compared with a float64
reference by their error in units of the row's scale (the root mean square of the reference row, unless the
caller knows better):

    worst element  <=  2 * worst element of the baseline  +  floor * (1 + |want| / scale)
    RMS of a row   <=  2 * worst RMS of a baseline row    +  floor

The baseline is what a straightforward computation at the same dtypes gives (torch, as a rule), so that the
problem's own difficulty sets the tolerance. The floor is `FLOOR` unit roundoffs of the result's dtype:
a few roundings, no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

# Roundings of the result's dtype that any correct computation may make beyond its baseline.
FLOOR = 4.0
# How much worse than the straightforward computation a kernel may be.
SLACK = 2.0

# Unit roundoff: the largest relative error of one rounding.
_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    # Activations rounded to int8 by blocks carry half a step of 1/127 of the block's largest value.
    "int8": 0.5 / 127,
}

# Guard elements on each side of a poisoned array: 4 cache lines of 64 bytes, more than any vector.
_GUARD_BYTES = 256


def dtype_name(array: Any) -> str:
    """Name the dtype of a NumPy or torch array in NumPy's words."""
    return str(array.dtype).removeprefix("torch.")


def as_numpy(array: Any) -> NDArray[Any]:
    """View a NumPy or CPU torch array as NumPy, bfloat16 by its bits."""
    if dtype_name(array) == "bfloat16" and not isinstance(array, np.ndarray):
        import torch

        return array.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(array.detach() if hasattr(array, "detach") else array)


def _at(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])


def assert_exact(got: Any, want: Any) -> None:
    """Fail unless dtype, shape and every element agree; NaN agrees with NaN, and 0 with -0 does not."""
    got, want = as_numpy(got), as_numpy(want)
    assert got.dtype == want.dtype, f"dtype is {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"shape is {got.shape}, expected {want.shape}"
    same = got == want
    if got.dtype.kind not in "iub":
        same = (same & (np.signbit(got) == np.signbit(want))) | (np.isnan(got) & np.isnan(want))
    if not same.all():
        at = _at(np.atleast_1d(~same))
        first = at if got.ndim else ()
        raise AssertionError(f"{(~same).sum()} of {same.size} differ, first {at}: {got[first]}, {want[first]}")


def assert_close(
    got: Any,
    want64: ArrayLike,
    *,
    baseline: Any = None,
    dtype: str = "float32",
    out_dtype: str | None = None,
    scale: ArrayLike | None = None,
) -> None:
    """Fail unless `got` is as near to the float64 reference as the rule at the head of this file asks.

    Parameters
    ----------
    got : array (..., N)
        Floating point.
    want64 : array (..., N) float64
        The reference.
    baseline : array (..., N), optional
        The same computed straightforwardly at the same dtypes; without it only the floor is allowed.
    dtype : {"float64", "float32", "bfloat16", "int8"}
        The coarsest dtype to which the computation rounds; gives the floor its unit.
    out_dtype : str, optional
        The dtype that `got` must have; `dtype` by default (float32 for "int8").
    scale : array, optional
        Broadcasts against `want64`: the size that errors are measured in, where a row's own size would be
        unfair, as where large terms cancel.
    """
    expected = out_dtype or ("float32" if dtype == "int8" else dtype)
    assert dtype_name(got) == expected, f"dtype is {dtype_name(got)}, expected {expected}"
    want = np.asarray(want64)
    assert want.dtype == np.float64, f"the reference is {want.dtype}, expected float64"
    error, unit = _error(got, want, scale)
    floor = FLOOR * _ROUNDOFF[dtype]
    worst, worst_rms = 0.0, 0.0
    if baseline is not None:
        base, _ = _error(baseline, want, scale)
        worst, worst_rms = base.max(initial=0.0), _rms(base).max(initial=0.0)
    limit = SLACK * worst + floor * (1 + np.abs(np.where(np.isfinite(want), want, 0.0)) / unit)
    if not (error <= limit).all():
        at = _at(np.atleast_1d(error > limit))
        value, true = np.atleast_1d(as_numpy(got))[at], np.atleast_1d(want)[at]
        over = f"error {np.atleast_1d(error)[at]:.3g} of the row's scale, limit {np.atleast_1d(limit)[at]:.3g}"
        raise AssertionError(f"element {at} is {value}, expected {true}: {over}")
    # A row that is wrong by little everywhere passes the test of its worst element.
    rms, rms_limit = _rms(error), SLACK * worst_rms + floor
    if not (rms <= rms_limit).all():
        at = _at(np.atleast_1d(rms > rms_limit))
        raise AssertionError(f"row {at} is off by {rms.max():.3g} of its scale (RMS), limit {rms_limit:.3g}")


def _rms(error: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.mean(error**2, axis=-1)) if error.size else np.zeros(1)


def _error(
    got: Any, want: NDArray[np.float64], scale: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the absolute error in units of the scale, and the scale."""
    values = as_numpy(got).astype(np.float64)
    assert values.shape == want.shape, f"shape is {values.shape}, expected {want.shape}"
    # A comparison with NaN is false, so NaN and infinity must be matched one by one before errors are formed.
    for name, test in (("NaN", np.isnan), ("infinity", np.isinf)):
        wrong = test(values) != test(want)
        assert not wrong.any(), f"{name} stands on one side only, first at {_at(np.atleast_1d(wrong))}"
    finite = np.isfinite(want)
    wrong = ~finite & ~np.isnan(want) & (values != want)
    assert not wrong.any(), f"infinity has the wrong sign at {_at(np.atleast_1d(wrong))}"
    clean = np.where(finite, want, 0.0)
    if scale is None:
        count = np.maximum(finite.sum(axis=-1, keepdims=True), 1)
        unit = np.sqrt(np.sum(clean**2, axis=-1, keepdims=True) / count)
    else:
        unit = np.asarray(scale, dtype=np.float64)
    # A row of zeros has no scale; any float32 below the smallest normal one counts as zero there.
    unit = np.broadcast_to(np.maximum(unit, 2.0**-126), want.shape)
    return np.abs(np.where(finite, values - clean, 0.0)) / unit, unit


def relative_error(got: Any, want64: ArrayLike) -> NDArray[np.float64]:
    """Return each row's RMS error over the reference row's standard deviation, for medians over rows."""
    want = np.asarray(want64, dtype=np.float64)
    return _rms(as_numpy(got).astype(np.float64) - want) / want.std(axis=-1)


def poisoned(shape: tuple[int, ...], dtype: Any, *, misalign: int = 0) -> tuple[NDArray[Any], Callable[[], None]]:
    """Make an output array that betrays what was not written, and what was written beside it.

    Parameters
    ----------
    shape : tuple of int
    dtype : dtype
        NumPy or `ml_dtypes`.
    misalign : int, default 0
        Elements by which the first one lies past a 64-byte boundary.

    Returns
    -------
    view : array
        Floats are NaN, integers a pattern.
    check : callable
        Fails when a guard beside `view` changed, or when an element of `view` (of 2 bytes or more: any byte
        is a fair result) still is what it was.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    # All ones is NaN in every IEEE format; integers take a pattern that no small index or code has.
    fill = 0xA5 if dtype.kind in "iu" else 0xFF
    whole = np.full(size + 2 * _GUARD_BYTES + 64 + misalign * dtype.itemsize, fill, dtype=np.uint8)
    start = _GUARD_BYTES + (-(whole.ctypes.data + _GUARD_BYTES) % 64) + misalign * dtype.itemsize
    view = whole[start : start + size].view(dtype).reshape(shape)

    def check() -> None:
        guards = np.concatenate([whole[:start], whole[start + size :]])
        assert (guards == fill).all(), f"{(guards != fill).sum()} bytes beside the output were written"
        if dtype.itemsize > 1 and size:
            raw = whole[start : start + size].reshape(-1, dtype.itemsize)
            left = (raw == fill).all(axis=1).reshape(shape)
            assert not left.any(), f"{left.sum()} of {left.size} elements were never written, first {_at(left)}"

    return view, check


# A whole model's logits are judged by their median row: random routers sit on near ties, and one expert chosen
# otherwise, for whatever rounding, moves every later row of that token's sequence by more than any arithmetic does.
MODEL_SLACK = 1.5
# What float32 may add up to over a model of a few layers, in units of a row's standard deviation.
MODEL_NOISE = 1e-4


def row_errors(got: Any, want64: ArrayLike) -> NDArray[np.float64]:
    """Return each row's worst error over the reference row's standard deviation."""
    values, want = as_numpy(got).astype(np.float64), np.asarray(want64, dtype=np.float64)
    assert values.shape == want.shape, f"shape is {values.shape}, expected {want.shape}"
    return np.abs(values - want).max(axis=-1) / want.std(axis=-1)


def assert_model_close(got: Any, want64: ArrayLike, baseline: Any = None, *, limit: float = np.inf) -> None:
    """Fail unless the median row is as near to the reference as the baseline's (by `MODEL_SLACK`), and `limit`.

    Parameters
    ----------
    got : array (T, vocab_size)
    want64 : array (T, vocab_size) float64
    baseline : array (T, vocab_size), optional
        What another program makes with the same roundings.
    limit : float
        In standard deviations of a reference row.
    """
    values = as_numpy(got)
    assert np.isfinite(values).all(), f"{(~np.isfinite(values)).sum()} logits are not finite"
    if baseline is not None:
        limit = min(limit, MODEL_SLACK * float(np.median(row_errors(baseline, want64))))
    error = float(np.median(row_errors(got, want64)))
    assert error <= limit, f"the median row is off by {error:.3g} standard deviations, limit {limit:.3g}"
