"""What the tests of the CUDA side share: the modules to run on, arrays to the GPU and back, order after order.

Two builds of one source are tested: the emulation on the CPU, from the folder that MXMOE_CUDA_EMULATION names, and
the installed extension where there is a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compare import assert_exact
from mxmoe import cuda

EMULATION = "MXMOE_CUDA_EMULATION"


def load_emulation() -> ModuleType | None:
    """Import the emulation; None when the environment names no folder with it."""
    folder = os.environ.get(EMULATION)
    if not folder:
        return None
    found = sorted(Path(folder).rglob("_cuda_emulated*.so"))
    if not found:
        raise FileNotFoundError(f"{EMULATION} is {folder}; wanted a folder with _cuda_emulated*.so somewhere in it")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules() -> dict[str, ModuleType | None]:
    """The emulation, and the extension where a GPU can run it; None stands for what is missing."""
    with_gpu = cuda.problem() is None
    return {"emulation": load_emulation(), "gpu": cuda.extension() if with_gpu else None}


def up(x: Any, gap: int = 0) -> Any:
    """Copy to the GPU; with `gap`, a matrix to rows that are so many elements apart, NaN between them."""
    x = np.ascontiguousarray(x)
    if not gap:
        return cuda.array(x)
    rows, width = x.shape
    memory = np.full(rows * (width + gap) * x.itemsize, 0xFF, np.uint8).view(x.dtype).reshape(rows, width + gap)
    memory[:, :width] = x
    return cuda.array(memory)[:, :width]


def poisoned_up(shape: Sequence[int], dtype: Any = np.float32) -> Any:
    """Make an output on the GPU of NaN, or of a pattern that is no index."""
    dtype = np.dtype(dtype)
    fill = 0xA5 if dtype.kind in "iu" else 0xFF
    return cuda.array(np.full(int(np.prod(shape)) * dtype.itemsize, fill, np.uint8).view(dtype).reshape(shape))


def down(x: Any) -> NDArray[Any]:
    """Copy from the GPU; errors of kernels show here."""
    return x.numpy()


def assert_rows_stand_alone_on_gpu(
    compute: Callable[[NDArray[np.intp]], NDArray[Any]], num_rows: int, sizes: Sequence[int] = (1, 2, 3, 5, 8)
) -> None:
    """Fail unless the bits of a row depend on that row alone; see `op_helpers.assert_rows_stand_alone`."""
    everything = np.arange(num_rows)
    want = compute(everything)
    order = np.random.default_rng(1).permutation(num_rows)
    assert_exact(compute(order), want[order])
    again = np.full(num_rows, num_rows // 2)
    assert_exact(compute(again), want[again])
    for size in sizes:
        for start in range(0, num_rows, max(size, num_rows // 2)):
            run = everything[start : start + size]
            assert_exact(compute(run), want[run])
