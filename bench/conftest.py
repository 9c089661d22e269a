"""Options and fixtures of the benches: ``pytest bench [--full] [--threads N] [--model PATH]``.

``--layers`` and ``--experts`` are for bench_transformers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from harness import Harness, Result, Work
from mxmoe import ops
from mxmoe.ceilings import CeilingMeter

_harness = pytest.StashKey[Harness]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mxmoe benches")
    group.addoption("--full", action="store_true", help="every shape and mode, not only a small selection")
    group.addoption("--threads", type=int, default=0, help="threads of the ops and of their peers; 0 for all CPUs")
    group.addoption("--model", default=None, help="folder of the checkpoint that bench_model.py times")
    group.addoption("--layers", type=int, default=2, help="layers that bench_transformers.py times")
    group.addoption("--experts", type=int, default=32, help="experts of each; 32 take 1.6 GB a layer in its peers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if getattr(_shape_of(item), "full", False)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _shape_of(item: pytest.Item) -> object:
    return item.callspec.params.get("shape") if hasattr(item, "callspec") else None


@pytest.fixture(scope="session")
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    threads = request.config.getoption("--threads")
    before = torch.get_num_threads()
    with ops.num_threads(threads):
        meter = CeilingMeter(threads)
        torch.set_num_threads(threads or before)
        request.config.stash[_harness] = Harness(meter)
        yield request.config.stash[_harness]
    torch.set_num_threads(before)


@pytest.fixture
def bench(harness: Harness, benchmark: Any) -> Callable[[Work], Result]:
    """Check and time some work."""
    return lambda work: harness.run(work, benchmark)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _harness in config.stash and config.stash[_harness].results:
        config.stash[_harness].show(Console(file=terminalreporter._tw._file, width=160))
