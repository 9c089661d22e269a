"""The CUDA extension where there may be no GPU and no driver."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mxmoe import cuda, doctor, ops


def extension():
    try:
        return cuda.extension()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_it_says_what_is_missing():
    status = extension().status()
    assert bool(status.problem) == (not status.devices)
    assert status.runtime_version >= 12000
    assert cuda.problem() == (status.problem or None)
    names = extension().architectures().split(",")
    assert {"80-real", "90a-real", "80-virtual"} <= set(names)


def test_without_a_gpu_an_array_is_one_clear_error():
    if not extension().status().problem:
        pytest.skip("there is a GPU")
    with pytest.raises(extension().CudaError, match="there is no GPU to use: "):
        cuda.empty((3,))


def test_without_the_extension_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(cuda, "_backend", None)
    monkeypatch.setitem(sys.modules, "mxmoe._cuda", None)
    monkeypatch.delattr("mxmoe._cuda", raising=False)
    assert "built without CUDA" in str(cuda.problem())
    with pytest.raises(RuntimeError, match="mxmoe was built without CUDA"):
        cuda.empty((3,))
    report = doctor().cuda
    assert not report["built"] and report["devices"] == [] and "without CUDA" in report["problem"]


def test_the_doctor_tells_the_same():
    report = doctor().cuda
    assert report["problem"] == cuda.problem()
    assert report["built"] == (report["runtime"] is not None)


def test_the_best_kernels_run_unless_others_are_forced(emulation):
    assert emulation.available_architectures() == ["sm_80", "sm_90a"]
    assert emulation.active_architecture() == "sm_90a"
    with cuda.architecture("sm_80"):
        assert emulation.active_architecture() == "sm_80"
    assert emulation.active_architecture() == "sm_90a"
    with (
        pytest.raises(ValueError, match="architecture is 'sm_70'; wanted sm_80 or sm_90a"),
        cuda.architecture("sm_70"),
    ):
        pass
    with pytest.raises(ValueError, match="architecture is empty"), cuda.architecture(""):
        pass


ASK = (
    "import importlib.util as u, sys\n"
    "s = u.spec_from_file_location('_cuda_emulated', sys.argv[1])\n"
    "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
    "print(m.available_architectures(), m.active_architecture())\n"
)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MXMOE_EMULATED_CAPABILITY": "8.0"}, "['sm_80'] sm_80"),
        ({"MXMOE_EMULATED_CAPABILITY": "10.0"}, "['sm_80'] sm_80"),
        ({"MXMOE_CUDA_ARCH": "sm_80"}, "['sm_80', 'sm_90a'] sm_80"),
        ({"MXMOE_CUDA_ARCH": ""}, "['sm_80', 'sm_90a'] sm_90a"),
        ({"MXMOE_CUDA_ARCH": "sm_90"}, "MXMOE_CUDA_ARCH is 'sm_90'; wanted sm_80 or sm_90a"),
        (
            {"MXMOE_CUDA_ARCH": "sm_90a", "MXMOE_EMULATED_CAPABILITY": "8.6"},
            "the architecture is forced to be sm_90a, but device 0 or this build (emulation) lacks it; wanted sm_80",
        ),
    ],
)
def test_the_environment_forces_kernels_that_the_device_has(emulation, environment, said):
    command = [sys.executable, "-c", ASK, emulation.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | environment, timeout=120)
    assert said in done.stdout + done.stderr


def test_no_driver_library_is_linked():
    done = subprocess.run(["ldd", extension().__file__], capture_output=True, text=True, check=True)
    assert "libcuda" not in done.stdout and "not found" not in done.stdout


def test_host_arrays_stay_on_the_host(monkeypatch):
    monkeypatch.setattr(cuda, "extension", lambda: pytest.fail("the GPU was asked"))
    x = np.ones((2, 4), np.float32)
    assert type(ops.rmsnorm(x, np.ones(4, np.float32))) is np.ndarray


def test_the_emulation_has_what_the_extension_has(emulation):
    stub = ast.parse(Path(cuda.__file__).with_name("_cuda.pyi").read_text())
    names = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)} | {"CudaError"}
    own = {"set_seed", "clear_fault", "set_memory_limit", "device_bytes", "run_kernel", "run_product", "sanitized"}
    assert {name for name in dir(emulation) if not name.startswith("_")} - own == names
