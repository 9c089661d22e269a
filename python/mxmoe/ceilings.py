"""What this machine can do at most: the rates that speeds are measured against.

Memory bandwidth and, on shared machines, clock rates move with what the neighbours do, by a factor of two within
minutes. A ceiling therefore counts only for what was timed around it: sample before, between and after.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mxmoe import _core, cuda, ops

__all__ = ["CeilingMeter", "Ceilings", "GpuCeilings", "GpuMeter", "TorchProducts", "measure"]

Activations = Literal["float32", "bf16", "int8"]

# Many times the largest last-level cache within a virtual machine's reach; less where memory is short.
_BUFFER_BYTES = 512 << 20
_SMALLEST_BUFFER = 128 << 20
_SHARE_OF_AVAILABLE = 4
_READ_PASSES = 5
_PEAK_RUNS = 3
_PEAK_SECONDS = 0.01
_PRODUCTS = {"bfloat16": 8192, "float32": 4096}


@dataclass(frozen=True)
class Ceilings:
    """The most that all threads together can do.

    Attributes
    ----------
    read_gb_s : float
        Reading memory that is in no cache, on large pages with software prefetch, in 1e9 bytes a second.
    int8_gop_s : float
        Products and sums of bytes, in 1e9 a second: vpdpbusd, or pmaddubsw with its additions where that is missing.
    bf16_gflop_s : float
        Products and sums of bfloat16 pairs: vdpbf16ps. Where it is missing, or slow, as on Intel's CPUs, those of
        16-bit integers, which weights of fewer bits then meet: vpdpwssd, or pmaddwd and an addition. Weights in
        bfloat16 meet float32 there.
    float32_gflop_s : float
        Fused multiply-add of float32, or multiplication and addition in portable code.
    """

    read_gb_s: float
    int8_gop_s: float
    bf16_gflop_s: float
    float32_gflop_s: float

    def peak(self, activations: Activations) -> float:
        """Return the rate, in 1e9 operations a second, of dot products with activations of this kind."""
        return {"int8": self.int8_gop_s, "bf16": self.bf16_gflop_s, "float32": self.float32_gflop_s}[activations]

    def seconds(self, nbytes: float, operations: float, activations: Activations) -> float:
        """Return the floor of what reads so many bytes and does so many operations: the longer of the two."""
        return max(nbytes / (self.read_gb_s * 1e9), operations / (self.peak(activations) * 1e9))


class CeilingMeter:
    """Measures the ceilings again and again, on memory that it holds in between.

    Parameters
    ----------
    num_threads : int
        0 for as many as this process has CPUs.
    buffer_bytes : int, optional
        Memory to read: 512 MiB, or a quarter of what is available where that is less.

    Attributes
    ----------
    samples : list of Ceilings
    passes : list of float
        Every pass over the memory, in 1e9 bytes a second, of which samples take the best. A share of their median is
        what work that takes seconds reaches of what reading alone reaches, as disturbed as it is by neighbours.

    Raises
    ------
    ValueError
        `buffer_bytes` is below 1 MiB, or more than the system gives.
    """

    def __init__(self, num_threads: int = 0, buffer_bytes: int | None = None) -> None:
        self.num_threads = num_threads
        self.samples: list[Ceilings] = []
        self.passes: list[float] = []
        self._rounds: dict[Activations, int] = {}
        with ops.num_threads(num_threads):
            self._buffer = _core.ReadBuffer(_default_bytes() if buffer_bytes is None else buffer_bytes)

    @property
    def buffer_bytes(self) -> int:
        """Memory that the meter holds."""
        return self._buffer.nbytes

    def sample(self) -> Ceilings:
        """Measure once, in about a fifth of a second: the best of a few passes each, as the others were disturbed."""
        with ops.num_threads(self.num_threads):
            passes = [self._buffer.nbytes / self._buffer.read_seconds() / 1e9 for _ in range(_READ_PASSES)]
            peaks = [self._peak(activations) for activations in ("int8", "bf16", "float32")]
        self.passes += passes
        self.samples.append(Ceilings(max(passes), *peaks))
        return self.samples[-1]

    def _peak(self, activations: Activations) -> float:
        rounds = self._rounds.get(activations, 64)
        operations, seconds = _core.run_peak(activations, rounds)
        while seconds < _PEAK_SECONDS:
            rounds = max(2 * rounds, int(rounds * 1.5 * _PEAK_SECONDS / max(seconds, 1e-6)))
            operations, seconds = _core.run_peak(activations, rounds)
        self._rounds[activations] = rounds
        rates = [operations / seconds]
        for _ in range(_PEAK_RUNS - 1):
            operations, seconds = _core.run_peak(activations, rounds)
            rates.append(operations / seconds)
        return max(rates) / 1e9

    def median(self) -> Ceilings:
        """Return the median of all samples, each rate on its own.

        Raises
        ------
        ValueError
            There is no sample yet.
        """
        if not self.samples:
            raise ValueError("the meter holds no samples; wanted at least one call of sample()")
        columns = zip(*(asdict(sample).values() for sample in self.samples), strict=True)
        return Ceilings(*(statistics.median(column) for column in columns))


@dataclass(frozen=True)
class GpuCeilings:
    """The most that a GPU can do.

    Attributes
    ----------
    read_gb_s : float
        Bytes read and written by a copy from its memory to its memory, in 1e9 a second.
    bf16_gflop_s, float32_gflop_s : float or None
        Products of large matrices of random numbers by torch, in 1e9 operations a second; float32 without tf32. None
        where there is no torch that sees the GPU: mxmoe's own products are no measure of themselves.
    """

    read_gb_s: float
    bf16_gflop_s: float | None = None
    float32_gflop_s: float | None = None

    def peak(self, activations: Activations) -> float | None:
        """Return the rate, in 1e9 operations a second, of products with activations of this kind."""
        return {"bf16": self.bf16_gflop_s, "float32": self.float32_gflop_s}.get(activations)

    def seconds(self, nbytes: float, operations: float, activations: Activations) -> float:
        """Return the floor of what moves so many bytes and does so many operations: the longer of the two.

        Where the rate of operations was not measured, that of the bytes.
        """
        peak = self.peak(activations)
        return max(nbytes / (self.read_gb_s * 1e9), operations / (peak * 1e9) if peak else 0.0)


class TorchProducts:
    """Times products of square matrices by torch, which on a GPU are cuBLAS's.

    Parameters
    ----------
    device : str
        torch's name of it.
    sizes : dict, optional
        Rows by dtype: large enough that launching does not count.
    """

    def __init__(self, device: str, sizes: dict[str, int] | None = None) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        self._pairs = {
            dtype: [torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2)]
            for dtype, size in (sizes or _PRODUCTS).items()
        }

    @classmethod
    def find(cls) -> TorchProducts | None:
        """Make one where torch is installed and sees the GPU; None elsewhere, and where there is no room."""
        if importlib.util.find_spec("torch") is None:
            return None
        import torch

        if not torch.cuda.is_available():
            return None
        try:
            return cls(f"cuda:{cuda.extension().current_stream().device}")
        except torch.OutOfMemoryError:
            return None

    def _seconds(self, call: Callable[[], object]) -> float:
        if self._device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        event: Callable[..., Any] = self._torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3

    def gflop_s(self, dtype: str) -> float:
        """Return the best of a few products, as the others were disturbed, in 1e9 operations a second."""
        a, b = self._pairs[dtype]
        allowed = self._torch.backends.cuda.matmul.allow_tf32
        self._torch.backends.cuda.matmul.allow_tf32 = False
        try:
            seconds = [self._seconds(lambda: a @ b) for _ in range(_READ_PASSES)]
        finally:
            self._torch.backends.cuda.matmul.allow_tf32 = allowed
        return float(2.0 * len(a) ** 3 / max(min(seconds), 1e-9) / 1e9)


class GpuMeter:
    """Measures a GPU's ceilings again and again, as `CeilingMeter` does the CPU's.

    Parameters
    ----------
    products : TorchProducts or None, optional
        What measures products; looked for by default.

    Attributes
    ----------
    samples : list of GpuCeilings
    passes : list of float
        Every copy, in 1e9 bytes a second.
    """

    num_threads = 0
    buffer_bytes = 0  # of the host

    def __init__(self, products: TorchProducts | Literal["find"] | None = "find") -> None:
        free, _ = cuda.extension().memory_info()
        # Many times the second-level cache; twice this much is held while it is copied.
        self._buffer = cuda.empty((min(_BUFFER_BYTES, free // 4),), "uint8", "the meter of bandwidth")
        self._products = TorchProducts.find() if products == "find" else products
        self.samples: list[GpuCeilings] = []
        self.passes: list[float] = []

    def sample(self) -> GpuCeilings:
        """Measure once: the best of a few copies, as the others were disturbed."""
        module, seconds = cuda.extension(), []
        self._buffer.copy()  # whose memory the others take
        for _ in range(_READ_PASSES):
            begin, end = module.Event(), module.Event()
            begin.record()
            self._buffer.copy()
            end.record()
            end.synchronize()
            seconds.append(max(end.milliseconds_since(begin), 1e-3) / 1e3)
        peaks = [] if self._products is None else [self._products.gflop_s(d) for d in ("bfloat16", "float32")]
        passes = [2 * self._buffer.nbytes / taken / 1e9 for taken in seconds]
        self.passes += passes
        self.samples.append(GpuCeilings(max(passes), *peaks))
        return self.samples[-1]

    def median(self) -> GpuCeilings:
        """Return the median of all samples, each rate on its own."""
        if not self.samples:
            raise ValueError("the meter holds no samples; wanted at least one call of sample()")

        def middle(rates: Iterable[float | None]) -> float | None:
            known = [rate for rate in rates if rate is not None]
            return statistics.median(known) if known else None

        reads = statistics.median(sample.read_gb_s for sample in self.samples)
        peaks = zip(*((sample.bf16_gflop_s, sample.float32_gflop_s) for sample in self.samples), strict=True)
        return GpuCeilings(reads, *map(middle, peaks))


def _default_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return _BUFFER_BYTES
    return min(_BUFFER_BYTES, max(_SMALLEST_BUFFER, available // _SHARE_OF_AVAILABLE))


def measure(num_threads: int = 0, *, samples: int = 3) -> Ceilings:
    """Measure this machine's ceilings.

    Parameters
    ----------
    num_threads : int
        0 for as many as this process has CPUs.
    samples : int
        How often; the medians count.

    Returns
    -------
    Ceilings

    Raises
    ------
    ValueError
        `samples` is below 1, or `num_threads` is out of range.

    Examples
    --------
    >>> mxmoe.ceilings.measure(num_threads=2)
    Ceilings(read_gb_s=42.1, int8_gop_s=936.0, bf16_gflop_s=468.2, float32_gflop_s=234.5)
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; wanted 1 or more")
    meter = CeilingMeter(num_threads)
    for _ in range(samples):
        meter.sample()
    return meter.median()
