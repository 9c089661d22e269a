"""Times an op beside a peer and the machine's ceilings, interleaved, after checking its result.

Every round runs the op, then the peer on the same work; the ceilings are measured before, between and after. Times
are medians. Inputs go round over as much memory as no cache holds, since a model's weights are in no cache either;
what is so small that even all its copies are cached is bound by the call, and its share of the floor says little.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mxmoe.ceilings import CeilingMeter, Ceilings

__all__ = ["Harness", "Peer", "Result", "Work", "copies"]

# Several times a large last-level cache, and no more of them than is quick to make.
COLD_BYTES, MOST_COPIES = 256 << 20, 64
# A round is long beside the clock's resolution and a thread's waking up.
ROUND_SECONDS = 0.02
ROUNDS = 7
CEILINGS_EVERY_SECONDS = 1.0

Activations = Literal["float32", "bf16", "int8"]
Call = Callable[[], Any]


def copies(nbytes: float) -> int:
    """Return on how many different inputs of so many bytes a call must go round to find none in a cache."""
    return max(1, min(MOST_COPIES, math.ceil(COLD_BYTES / max(nbytes, 1))))


@dataclass(frozen=True)
class Peer:
    """Another program at the same work: its name, and its calls, to be gone round like the op's."""

    name: str
    calls: Sequence[Call]


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes
    ----------
    op, shape : str
    calls : sequence of callables
        The op on different memory.
    nbytes, operations : float
        Of one call: what its formula must read and write, multiply and add.
    activations : {"float32", "bf16", "int8"}
        Whose peak its operations are held against.
    check : callable
        Raises AssertionError unless a slice of the result is right.
    peer : Peer, optional
    """

    op: str
    shape: str
    calls: Sequence[Call]
    nbytes: float
    operations: float
    activations: Activations
    check: Call
    peer: Peer | None = None


@dataclass(frozen=True)
class Result:
    """What came out, in seconds for one call."""

    work: Work
    seconds: float
    peer_seconds: float | None
    ceilings: Ceilings

    @property
    def gb_s(self) -> float:
        """Bytes of the formula over time."""
        return self.work.nbytes / self.seconds / 1e9

    @property
    def gflop_s(self) -> float:
        """Operations of the formula over time."""
        return self.work.operations / self.seconds / 1e9

    @property
    def share(self) -> float:
        """Time that the ceilings allow at the least, over time taken."""
        return self.ceilings.seconds(self.work.nbytes, self.work.operations, self.work.activations) / self.seconds

    @property
    def bound(self) -> str:
        """Which of the two floors is the larger."""
        reading = self.work.nbytes / self.ceilings.read_gb_s
        return "read" if reading > self.work.operations / self.ceilings.peak(self.work.activations) else "peak"

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, for pytest-benchmark's files."""
        peer = None if self.work.peer is None else self.work.peer.name
        figures = {"seconds": self.seconds, "gb_s": self.gb_s, "gflop_s": self.gflop_s, "share_of_floor": self.share}
        return figures | {"bound": self.bound, "peer": peer, "times_the_peer": self.ratio, **vars(self.ceilings)}


class _Turn:
    """Calls to be gone round, some at a time, with their times."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.at, self.seconds = calls, 0, list[float]()
        self.count = 1
        self.run()  # the first run pays for pages, threads and working memory
        while self.run() < ROUND_SECONDS and self.count < 1 << 20:
            self.count *= 2
        self.seconds.clear()

    def run(self) -> float:
        calls, size, at = self.calls, len(self.calls), self.at
        begin = time.perf_counter()
        for i in range(at, at + self.count):
            calls[i % size]()
        elapsed = time.perf_counter() - begin
        self.at = (at + self.count) % size
        self.seconds.append(elapsed / self.count)
        return elapsed


@dataclass
class Harness:
    """Runs work and keeps the results of a session."""

    meter: CeilingMeter
    results: list[Result] = field(default_factory=list)
    _last_sample: float = -math.inf

    def _sample(self) -> None:
        if time.monotonic() - self._last_sample > CEILINGS_EVERY_SECONDS:
            self.meter.sample()
            self._last_sample = time.monotonic()

    def run(self, work: Work, benchmark: Any = None) -> Result:
        """Check, time and keep; `benchmark` is pytest-benchmark's fixture, which then counts the op's rounds."""
        work.check()
        self.meter.samples.clear()
        self._last_sample = -math.inf
        ours = _Turn(work.calls)
        peer = None if work.peer is None else _Turn(work.peer.calls)

        def between() -> None:
            self._sample()
            if peer is not None:
                peer.run()

        if benchmark is None:
            for _ in range(ROUNDS):
                between()
                ours.run()
        else:
            benchmark.pedantic(ours.run, setup=between, rounds=ROUNDS, iterations=1)
        self.meter.sample()
        seconds = statistics.median(ours.seconds)
        result = Result(
            work, seconds, None if peer is None else statistics.median(peer.seconds), self.meter.median()
        )  # fmt: skip
        self.results.append(result)
        if benchmark is not None:
            benchmark.extra_info.update(result.to_dict(), calls_per_round=ours.count)
        return result

    def show(self, console: Console) -> None:
        """Print the table of all results."""
        table = Table("op", "shape", "time", "GB/s", "GFLOP/s", "of the floor", "peer", "times as fast")
        for r in self.results:
            peer = r.work.peer.name if r.work.peer else "-"
            ratio = "-" if r.ratio is None else f"{r.ratio:.2f}"
            share = f"{r.share:.0%} ({r.bound})"
            table.add_row(
                r.work.op, r.work.shape, _time(r.seconds), f"{r.gb_s:.1f}", f"{r.gflop_s:.1f}", share, peer, ratio
            )
        console.print(table)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            break
    return f"{seconds * factor:.3g} {unit}"
