"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mxmoe import _core, ops


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once under every instruction set of this machine, and give its name."""
    with ops.isa(request.param):
        yield request.param
