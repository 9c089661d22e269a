"""Times on a GPU: CUDA events around replays of a graph, warm, medians.

A graph holds the calls one after the other, each on other memory where they are made so: a model's weights are in no
cache when their turn comes. What the second-level cache would hold in a model (activations just made) it holds here.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mxmoe import cuda

__all__ = ["Call", "choose_device", "copies", "is_emulation", "save", "seconds_of", "time_text", "torch_seconds"]

Call = Callable[[], Any]

# A graph is long beside its launch, and short beside a part's time limit.
GRAPH_SECONDS, MOST_CALLS, REPLAYS = 0.01, 512, 9
# Several times the second-level cache (50 MB on an H100), and no more of them than is quick to make.
CACHES, MOST_COPIES = 4, 64


def choose_device() -> None:
    """Run on the emulation where the environment names its folder, as the tests do; else on the GPU."""
    if os.environ.get("MXMOE_CUDA_EMULATION"):
        from cuda_helpers import load_emulation

        cuda.use(load_emulation())
    if problem := cuda.problem():
        raise SystemExit(f"no GPU to run on: {problem}")


def is_emulation() -> bool:
    """Whether times mean nothing."""
    return bool(cuda.extension().architectures() == "emulation")


def save(name: str, found: Any) -> None:
    """Write what was measured to the folder that OUT names; nowhere when it names none."""
    if folder := os.environ.get("OUT"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        about = {"device": cuda.extension().status().devices[0].name, "emulation": is_emulation()}
        (Path(folder) / f"{name}.json").write_text(json.dumps(about | {name: found}, indent=1))


def copies(nbytes: float) -> int:
    """Return on how many different inputs of so many bytes a call must go round to find none in the cache."""
    cache = cuda.extension().status().devices[0].l2_bytes
    most = 2 if is_emulation() else MOST_COPIES
    return max(1, min(most, -(-CACHES * cache // max(int(nbytes), 1))))


def _graph(calls: Sequence[Call], pool: Any) -> Any:
    with cuda.graph() as graph, cuda.pooled(pool):
        for call in calls:
            call()
    return graph


def _replay_seconds(graph: Any) -> float:
    begin, end = cuda.extension().Event(), cuda.extension().Event()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return max(float(end.milliseconds_since(begin)), 1e-4) / 1e3


def seconds_of(calls: Sequence[Call]) -> float:
    """Return what a call takes, gone round many times.

    What calls return is dropped; nothing may be allocated outside the ops.
    """
    stream = cuda.extension().Stream(cuda.extension().current_stream().device)
    with cuda.on_stream(stream):
        pool = cuda.extension().Pool()
        with cuda.pooled(pool):
            for call in calls:
                call()  # takes all memory that it wants
        graph = _graph(calls, pool)
        if is_emulation():
            return _replay_seconds(graph) / len(calls)
        _replay_seconds(graph)
        once = _replay_seconds(graph)
        rounds = max(1, min(MOST_CALLS // len(calls), round(GRAPH_SECONDS / once)))
        if rounds > 1:
            graph = _graph([*calls] * rounds, pool)
        _replay_seconds(graph)
        seconds = statistics.median(_replay_seconds(graph) for _ in range(REPLAYS))
    return seconds / (rounds * len(calls))


def torch_seconds(torch: Any, device: str, calls: Sequence[Call]) -> float:
    """Return the same for calls of torch; on torch's CPU by the clock."""
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.synchronize()

    def record(rounds: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        return graph

    def replay(graph: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return max(float(begin.elapsed_time(end)), 1e-4) / 1e3

    graph = record(1)
    replay(graph)
    rounds = max(1, min(MOST_CALLS // len(calls), round(GRAPH_SECONDS / replay(graph))))
    if rounds > 1:
        graph = record(rounds)
    replay(graph)
    return statistics.median(replay(graph) for _ in range(REPLAYS)) / (rounds * len(calls))


def time_text(seconds: float) -> str:
    """Write a time for people."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
