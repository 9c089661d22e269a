"""What this machine can do at most: the rates that speeds are measured against.

Memory bandwidth and, on shared machines, clock rates move with what the neighbours do, by a factor of two within
minutes. A ceiling therefore counts only for what was timed around it: sample before, between and after.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mxmoe import _core, cuda, ops

__all__ = ["CeilingMeter", "Ceilings", "GpuCeilings", "GpuMeter", "measure"]

Activations = Literal["float32", "bf16", "int8"]

# Many times the largest last-level cache within a virtual machine's reach; less where memory is short.
_BUFFER_BYTES = 512 << 20
_SMALLEST_BUFFER = 128 << 20
_SHARE_OF_AVAILABLE = 4
_READ_PASSES = 5
_PEAK_RUNS = 3
_PEAK_SECONDS = 0.01


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
        Products and sums of bfloat16 pairs: vdpbf16ps. Where it is missing, the figure is float32's, which is then
        how bfloat16 is computed.
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

    Raises
    ------
    ValueError
        `buffer_bytes` is below 1 MiB, or more than the system gives.
    """

    def __init__(self, num_threads: int = 0, buffer_bytes: int | None = None) -> None:
        self.num_threads = num_threads
        self.samples: list[Ceilings] = []
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
            read = min(self._buffer.read_seconds() for _ in range(_READ_PASSES))
            peaks = [self._peak(activations) for activations in ("int8", "bf16", "float32")]
        self.samples.append(Ceilings(self._buffer.nbytes / read / 1e9, *peaks))
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
    bf16_gflop_s, float32_gflop_s : None
        Not measured: no matrix product that is not mxmoe's own is at hand.
    """

    read_gb_s: float
    bf16_gflop_s: None = None
    float32_gflop_s: None = None

    def peak(self, activations: Activations) -> None:
        """Return None: not measured."""


class GpuMeter:
    """Measures a GPU's ceilings again and again, as `CeilingMeter` does the CPU's.

    Attributes
    ----------
    samples : list of GpuCeilings
    """

    num_threads = 0
    buffer_bytes = 0  # of the host

    def __init__(self) -> None:
        free, _ = cuda.extension().memory_info()
        # Many times the second-level cache; twice this much is held while it is copied.
        self._buffer = cuda.empty((min(_BUFFER_BYTES, free // 4),), "uint8", "the meter of bandwidth")
        self.samples: list[GpuCeilings] = []

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
        self.samples.append(GpuCeilings(2 * self._buffer.nbytes / min(seconds) / 1e9))
        return self.samples[-1]

    def median(self) -> GpuCeilings:
        """Return the median of all samples."""
        if not self.samples:
            raise ValueError("the meter holds no samples; wanted at least one call of sample()")
        return GpuCeilings(statistics.median(sample.read_gb_s for sample in self.samples))


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
