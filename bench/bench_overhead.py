"""What a call through Python costs beyond the work in C++.

A call on n rows of one thread takes ``a + b * n``: b is a row's work, a all the rest, which is Python's part, the
conversion of the arrays, the checks and the choice of the kernel. Both come from a line through the times of a few n.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mxmoe import _core, ops

HIDDEN = 64
ROWS = (1, 2, 4, 8, 16, 32)
CALLS, REPEATS = 2000, 15


def _numpy_out(x: Any, w: Any, y: Any) -> Callable[[], Any]:
    return lambda: ops.rmsnorm(x, w, out=y)


def _torch_out(x: Any, w: Any, y: Any) -> Callable[[], Any]:
    tensors = [torch.from_numpy(array) for array in (x, w, y)]
    return lambda: ops.rmsnorm(tensors[0], tensors[1], out=tensors[2])


WAYS: dict[str, Callable[[Any, Any, Any], Callable[[], Any]]] = {
    "_core.rmsnorm, NumPy": lambda x, w, y: lambda: _core.rmsnorm(x, w, 1e-5, y),
    "ops.rmsnorm, NumPy, out": _numpy_out,
    "ops.rmsnorm, NumPy, new array": lambda x, w, y: lambda: ops.rmsnorm(x, w),
    "ops.rmsnorm, torch, out": _torch_out,
}


def _seconds(call: Callable[[], Any]) -> float:
    """Return the least of some runs: whatever disturbs only adds."""
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - begin) / CALLS)
    return best


@pytest.mark.parametrize("way", WAYS)
def bench_call(way: str, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.ones(HIDDEN, np.float32)
    with ops.num_threads(1):
        times = []
        for rows in ROWS:
            x = np.random.default_rng(0).standard_normal((rows, HIDDEN)).astype(np.float32)
            times.append(_seconds(WAYS[way](x, weight, np.empty_like(x))))
        row, call = np.polyfit(ROWS, times, 1)
        benchmark.extra_info.update(microseconds_per_call=call * 1e6, microseconds_per_row=row * 1e6)
        x = np.ones((1, HIDDEN), np.float32)
        benchmark(WAYS[way](x, weight, np.empty_like(x)))
    with capsys.disabled():
        print(f"\n{way}: {call * 1e6:.2f} µs a call, {row * 1e6:.3f} µs a row")
