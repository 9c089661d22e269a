"""What this machine can run: instruction sets, threads, and the kernel that each op takes and why."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mxmoe import _core

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
    components : dict or None
        For a model: what each component is held in (dtype) and takes (bytes).
    """

    cpu_features: str
    isa: str
    isa_source: str
    available_isas: list[str]
    num_threads: int
    kernels: list[KernelChoice]
    components: dict[str, dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return asdict(self)


def _why(chosen: int, rows: list[tuple[str, str]]) -> str:
    if chosen == 0:
        return "the best there is"
    return "; ".join(f"{name} needs {lacks}" for name, lacks in rows[:chosen])


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
        ``MXMOE_ISA`` names an instruction set that is unknown or that this CPU lacks.
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
        components=None if model is None else model.components,
    )
