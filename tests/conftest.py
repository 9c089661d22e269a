"""Fixtures of the op tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mxmoe
from cuda_helpers import EMULATION, modules
from cuda_models import loader
from mxmoe import _core, cuda, ops
from small_models import write


@pytest.fixture(autouse=True, scope="session")
def _cpus_of_its_own() -> None:
    """Give each of pytest-xdist's processes its share of the CPUs: threads of several would spin on each other's."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count > 1 and hasattr(os, "sched_setaffinity"):
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[number % len(cpus) :: count])


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _subnormals() -> None:
    """Give every test's own arithmetic its subnormals.

    What some versions of torch compile turns them off for its thread when it is loaded, and NumPy, which the oracles
    are written in, heeds that.
    """
    torch.set_flush_denormal(False)


# VNNI has kernels of its own for products of int8 alone; elsewhere its levels are AVX2 and AVX-512 once more.
HAVE_VNNI_KERNELS = [
    f"test_{name}" for name in ("c_interface", "ceilings", "isa", "linear", "linear_group", "mxfp4_moe", "packing")
]


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0]
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes `isa` under every instruction set of this machine, unless the test says itself which."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "isa" not in metafunc.fixturenames or any("isa" in _names(mark) for mark in marks):
        return
    own = metafunc.module.__name__ in HAVE_VNNI_KERNELS
    levels = [name for name in _core.available_isas() if own or name not in ("avxvnni", "avx512vnni")]
    metafunc.parametrize("isa", levels, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test under the instruction set of that name."""
    with ops.isa(request.param):
        yield request.param


_CUDA_MODULES = modules()
_MISSING = {
    "emulation": f"{EMULATION} names no folder with the emulation (built with MXMOE_CUDA_EMULATION=ON)",
    "gpu": f"no GPU: {cuda.problem()}",
}


@pytest.fixture(params=[name for name, module in _CUDA_MODULES.items() if module is not None] or ["gpu"])
def gpu(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Run a test on the emulation of a GPU, and on a GPU where there is one; gives the extension module."""
    module = _CUDA_MODULES[request.param]
    if module is None:
        pytest.skip(_MISSING[request.param])
    cuda.use(module)
    if request.param == "emulation":
        # Each test sees its own orders of threads, the same ones every time.
        module.set_seed(1 + sum(map(ord, request.node.name)) % 1000)
    yield module
    if request.param == "emulation":
        module.clear_fault()
        module.set_memory_limit(0)
    cuda.use(None)


@pytest.fixture
def emulation() -> Iterator[ModuleType]:
    """Run a test on the emulation alone; gives its module."""
    module = _CUDA_MODULES["emulation"]
    if module is None:
        pytest.skip(_MISSING["emulation"])
    cuda.use(module)
    yield module
    module.clear_fault()
    module.set_memory_limit(0)
    module.set_seed(0)
    cuda.use(None)


@pytest.fixture(scope="module")
def gpu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random model's checkpoint."""
    return write(tmp_path_factory.mktemp("model") / "x")


@pytest.fixture(scope="module")
def gpu_load(gpu_folder: Path) -> Callable[[ModuleType, str], mxmoe.Model]:
    """Load it on a GPU in one of `GPU_MODES`, once for each."""
    return loader(gpu_folder)


@pytest.fixture
def gpu_model(gpu: ModuleType, gpu_load: Callable[[ModuleType, str], mxmoe.Model]) -> mxmoe.Model:
    """It in the mode that goes by the tensor cores' kernels; the other is ten times slower on the emulation."""
    return gpu_load(gpu, "bf16")
