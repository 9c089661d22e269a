"""What the tests of the ops share: arrays, roundings, guarded calls, and the proof that rows stand alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from compare import as_numpy, assert_exact, poisoned
from mxmoe import _core, ops

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float32": np.dtype(np.float32), "bfloat16": BF16}
BLOCK = 32

# Around one vector of 4, 8 and 16 lanes, and the model's own sizes.
VECTOR_SIZES = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 96, 2880]
# Around the edges of every tile of rows in the kernels.
TOKEN_COUNTS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129]


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str = "float32", scale: float = 1.0) -> Any:
    """Draw normal values of a dtype named in `FLOATS`."""
    return (rng.standard_normal(shape) * scale).astype(FLOATS[dtype])


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """Copy a NumPy array, bfloat16 included, to torch."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def wide(array: Any) -> NDArray[np.float64]:
    """Widen exactly to float64."""
    return as_numpy(array).astype(np.float64)


def _apart(shape: Sequence[int], dtype: Any, extra: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Make rows that are `extra` elements apart, and all the memory they lie in: bytes of ones."""
    rows, *rest = shape
    dtype, width = np.dtype(dtype), int(np.prod(rest))
    memory = np.full((rows + 2) * (width + extra) * dtype.itemsize, 0xFF, np.uint8)
    view = memory.view(dtype).reshape(rows + 2, width + extra)[1:-1, :width].reshape(shape)
    assert view.size == 0 or np.shares_memory(view, memory)
    return view, memory


def strided(array: NDArray[Any], extra: int = 3) -> NDArray[Any]:
    """Copy into rows that are `extra` elements apart, with NaN (or -1) between and around them."""
    view, _ = _apart(array.shape, array.dtype, extra)
    view[...] = array
    return view


def strided_output(shape: Sequence[int], dtype: Any, extra: int = 3) -> tuple[NDArray[Any], Callable[[], None]]:
    """Make an output of rows that are `extra` elements apart, and a check that nothing beside them changed."""
    view, memory = _apart(shape, dtype, extra)
    untouched = np.ones(memory.size // view.itemsize, bool)
    untouched.reshape(shape[0] + 2, -1)[1:-1, : int(np.prod(shape[1:]))] = False
    beside = memory.reshape(-1, view.itemsize)

    def check() -> None:
        assert (beside[untouched] == 0xFF).all(), "something between the rows was written"

    return view, check


def round_int8(x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Round to 127 steps of each block's largest magnitude: codes (..., K / 32, 32) and scales (..., K / 32, 1)."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 0)
    return np.rint(blocks * inverse), amax / np.float32(127)


def bf16_as_integers() -> bool:
    """Tell whether bfloat16 activations meet MXFP4 and int8 weights as 16-bit integers at the active level."""
    index, _, rows = _core.kernels()["mxfp4_moe_bf16"]
    return rows[index][0].rpartition("_")[2] in ("avx2", "avxvnni", "avx512", "avx512vnni")


def round_bf16_to_integers(x: NDArray[Any]) -> NDArray[np.float64]:
    """Round to bfloat16, then to 2^-14 of the power of two in each block's largest magnitude, or of the next one."""
    rounded = wide(x.astype(BF16))
    blocks = rounded.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    _, exponent = np.frexp(amax * (1 + 2**-7))  # the next one from 255/256 of it on; [2^(exponent - 1), 2^exponent)
    step = np.ldexp(1.0, np.maximum(exponent - 1, 32 - 127) - 14)
    return (np.rint(blocks / step) * step).reshape(x.shape)


def round_activations(x: NDArray[Any], activations: str, weights: str = "bfloat16") -> NDArray[np.float64]:
    """Round as the op contracts say, for weights of that dtype; the result is exact in float64."""
    if activations == "float32":
        return wide(x.astype(np.float32))
    if activations == "bf16" and weights != "bfloat16" and bf16_as_integers():
        return round_bf16_to_integers(x)
    if activations == "bf16":
        return wide(x.astype(BF16))
    codes, scales = round_int8(x)
    return (wide(codes) * wide(scales)).reshape(x.shape)


def random_mxfp4(
    rng: np.random.Generator, shape: Sequence[int], low: int = 120, high: int = 126
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw blocks and scales of a matrix (..., K), all codes alike, scale bytes within [low, high]."""
    *rows, k = shape
    blocks = rng.integers(0, 256, (*rows, k // BLOCK, BLOCK // 2), dtype=np.uint8)
    return blocks, rng.integers(low, high + 1, (*rows, k // BLOCK), dtype=np.uint8)


def decode_mxfp4(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode with the formats of ml_dtypes; exact in float32."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return (values * factors[..., None]).reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


@contextmanager
def unchanged(*arrays: Any) -> Iterator[None]:
    """Fail if a byte of the given NumPy arrays (None is skipped) changes within the block."""
    kept = [a for a in arrays if isinstance(a, np.ndarray)]
    before = [a.tobytes() for a in kept]
    yield
    for i, (array, old) in enumerate(zip(kept, before, strict=True)):
        assert array.tobytes() == old, f"input {i} was changed"


def guarded(
    op: Callable[..., Any],
    *args: Any,
    shape: tuple[int, ...],
    dtype: Any = np.float32,
    misalign: int = 0,
    **kwargs: Any,
) -> NDArray[Any]:
    """Call `op` with a poisoned output between canaries; inputs must stay as they are."""
    out, check = poisoned(shape, dtype, misalign=misalign)
    with unchanged(*args, *kwargs.values()):
        assert op(*args, **kwargs, out=out) is out
    check()
    return out


def assert_rows_stand_alone(
    compute: Callable[[NDArray[np.intp]], NDArray[Any]], num_rows: int, sizes: Sequence[int] = (1, 2, 3, 5, 8)
) -> None:
    """Fail unless the bits of a row depend on that row alone.

    `compute` takes row indices and returns those rows' results, computed in one batch. They are taken all
    together, with 1, 2 and 3 threads, permuted, repeated, and in runs of each size at every phase.
    """
    everything = np.arange(num_rows)
    with ops.num_threads(1):
        want = compute(everything)
    for threads in (2, 3):
        with ops.num_threads(threads):
            assert_exact(compute(everything), want)
    order = np.random.default_rng(1).permutation(num_rows)
    assert_exact(compute(order), want[order])
    again = np.full(num_rows, num_rows // 2)
    assert_exact(compute(again), want[again])
    for size in sizes:
        for start in range(0, num_rows, max(size, num_rows // 4)):
            run = everything[start : start + size]
            assert_exact(compute(run), want[run])
