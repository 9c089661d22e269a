"""``mxmoe eval``."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mxmoe.evaluation import evaluate
from mxmoe.generate import Model

__all__ = ["run", "show"]


def run(model: Model, n_per_task: int, seed: int, max_new_tokens: int, *, quiet: bool) -> dict[str, Any]:
    """Evaluate with a progress bar on stderr; return what ``--json`` prints."""
    console = Console(stderr=True)
    begin = time.perf_counter()
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("Evaluating", total=None)
        result = evaluate(
            model,
            n_per_task,
            seed=seed,
            max_new_tokens=max_new_tokens,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return {
        **result.to_dict(),
        "seconds": time.perf_counter() - begin,
        "dense": model.options.dense,
        "kv": model.options.kv,
        "activations": model.options.activations,
    }


def show(result: dict[str, Any]) -> None:
    """Print the accuracies for people."""
    table = Table("task", "accuracy", "95% interval", "problems")
    for name, task in [*result["tasks"].items(), ("all", result)]:
        low, high = task["interval"]
        table.add_row(name, f"{task['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(task["n"]))
    Console().print(table)
