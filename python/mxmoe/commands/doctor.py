"""``mxmoe doctor``."""

from __future__ import annotations

import importlib
import platform
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mxmoe
from mxmoe.doctor import doctor

__all__ = ["run", "show"]


def run() -> dict[str, Any]:
    """Return what ``--json`` prints."""
    libraries = {name: importlib.import_module(name).__version__ for name in ("safetensors", "tokenizers")}
    return {
        "mxmoe": mxmoe.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **libraries,
        "platform": platform.platform(),
        **doctor().to_dict(),
    }


def _cuda_line(cuda: dict[str, Any]) -> str:
    if not cuda["built"]:
        return f"CUDA: {cuda['problem']}"
    built = f"CUDA: built with {cuda['runtime']} for {', '.join(cuda['architectures'])}"
    if cuda["problem"]:
        return f"{built}; cannot run here: {cuda['problem']}"
    devices = ", ".join(
        f"{d['name']} ({d['total_bytes'] / 2**30:.0f} GiB, kernels: {d['kernels'] or 'none'})"
        for d in cuda["devices"]
    )
    return f"{built}; driver {cuda['driver']}; {devices}"


def show(result: dict[str, Any]) -> None:
    """Print the same for people."""
    console = Console()
    console.print(
        f"mxmoe {result['mxmoe']}, Python {result['python']}, NumPy {result['numpy']}, {result['platform']}\n"
        f"CPU: {result['cpu_features']}; {result['num_threads']} threads\n"
        f"instruction set: {result['isa']} ({result['isa_source']}); available: "
        f"{', '.join(result['available_isas'])}",
        highlight=False,
    )
    console.print(_cuda_line(result["cuda"]), highlight=False)
    table = Table("op", "kernel", "why")
    for kernel in result["kernels"]:
        table.add_row(kernel["op"], kernel["kernel"], kernel["why"])
    console.print(table)
