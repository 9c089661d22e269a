"""What this machine can run: instruction sets, threads, and the kernel that each op takes and why."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mxmoe import _core, cuda

if TYPE_CHECKING:
    from mxmoe.generate import Model

__all__ = ["Doctor", "KernelChoice", "doctor"]


@dataclass(frozen=True)
class KernelChoice:
    """One op's kernel.

    Attributes
    ----------
    op : str
    kernel : str
        What runs.
    why : str
        Why no better one does.
    """

    op: str
    kernel: str
    why: str


@dataclass(frozen=True)
class Doctor:
    """The machine as mxmoe sees it.

    Attributes
    ----------
    cpu_features : str
        Instruction sets that kernels can use.
    isa, isa_source : str
        The level in force and who chose it.
    available_isas : list of str
    num_threads : int
        CPUs this process may run on.
    kernels : list of KernelChoice
    cuda : dict
        `built` (whether the extension is there), `architectures` it has code for, `runtime` and `driver` versions,
        `devices`, each with the architecture whose `kernels` run there, and `problem`: what keeps this machine from
        running on a GPU, or None.
    components : dict or None
        For a model: what each component is held in (dtype) and takes (bytes).
    """

    cpu_features: str
    isa: str
    isa_source: str
    available_isas: list[str]
    num_threads: int
    kernels: list[KernelChoice]
    cuda: dict[str, Any]
    components: dict[str, dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return asdict(self)


def _why(chosen: int, rows: list[tuple[str, str]]) -> str:
    if chosen == 0:
        return "the best there is"
    return "; ".join(f"{name} needs {lacks}" for name, lacks in rows[:chosen])


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _cuda() -> dict[str, Any]:
    try:
        extension = cuda.extension()
    except RuntimeError as error:
        return {"built": False, "architectures": None, "runtime": None, "driver": None, "devices": [],
                "problem": str(error)}  # fmt: skip
    status = extension.status()
    devices = [
        {
            "index": device.index,
            "name": device.name,
            "compute_capability": list(device.compute_capability),
            "total_bytes": device.total_bytes,
            "kernels": extension.active_architecture(device.index) if device.compute_capability >= (8, 0) else None,
        }
        for device in status.devices
    ]
    return {
        "built": True,
        "architectures": extension.architectures().split(","),
        "runtime": _version(status.runtime_version),
        "driver": _version(status.driver_version),
        "devices": devices,
        "problem": status.problem or None,
    }


def doctor(model: Model | None = None) -> Doctor:
    """Tell which kernel runs each op on this machine, and why, and what a model's components take.

    Parameters
    ----------
    model : Model, optional

    Returns
    -------
    Doctor

    Raises
    ------
    ValueError
        ``MXMOE_ISA`` or ``MXMOE_CUDA_ARCH`` names what is unknown or what this machine lacks.
    """
    isa = _core.active_isa()
    forced = bool(os.environ.get("MXMOE_ISA"))
    kernels = [
        KernelChoice(op, rows[chosen][0], _why(chosen, rows))
        for op, (chosen, _, rows) in sorted(_core.kernels().items())
    ]
    return Doctor(
        cpu_features=_core.cpu_features(),
        isa=isa,
        isa_source="MXMOE_ISA" if forced else "the best this CPU has",
        available_isas=_core.available_isas(),
        num_threads=_core.hardware_threads(),
        kernels=kernels,
        cuda=_cuda(),
        components=None if model is None else model.components,
    )
