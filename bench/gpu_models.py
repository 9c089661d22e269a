"""Decode and prefill of whole models on a GPU, on random weights of the true shapes.

    python bench/gpu_models.py --size 20b --size 120b --batch 1 --batch 32 --prompt 8192

Two layers are written to a temporary folder and brought to the GPU again for every layer of the model, each to memory
of its own: 120b needs 7 GB of disk. What a step costs does not depend on what the weights are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from make_checkpoint import SIZES, write_checkpoint
from mxmoe.checkpoint import Checkpoint, LayerWeights
from mxmoe.commands import bench
from mxmoe.config import ModelConfig
from mxmoe.loading import build_model
from mxmoe.model import LoadOptions, Transformer

LAYERS = 2  # a sliding and a full one


class Repeated(Checkpoint):
    """A checkpoint of a few layers that stands for one of many.

    Parameters
    ----------
    few : Checkpoint
    config : ModelConfig
        As the few layers' own but for their number and kinds.
    """

    def __init__(self, few: Checkpoint, config: ModelConfig) -> None:
        self._few, self.config, self.path = few, config, few.path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._few, name)

    embed_tokens = property(lambda self: self._few.embed_tokens)
    lm_head = property(lambda self: self._few.lm_head)
    norm = property(lambda self: self._few.norm)
    nbytes = property(lambda self: self._few.nbytes * self.config.num_hidden_layers // LAYERS)

    def layer(self, i: int) -> LayerWeights:
        """Return the weights that stand for layer `i`."""
        return self._few.layer(i % LAYERS)

    def release(self, *_: Any) -> None:
        """Keep what comes again."""


def random_model(config: ModelConfig, folder: Path, device: Literal["cpu", "cuda"] = "cuda") -> Transformer:
    """Make a model of random weights; `folder` is written to."""
    kinds = config.layer_types[:LAYERS]
    write_checkpoint(folder, replace(config, num_hidden_layers=LAYERS, layer_types=kinds))
    return build_model(Repeated(Checkpoint.open(folder), config), LoadOptions(device=device, kv="bf16"))


def measure(model: Transformer, batches: list[int], prompt: int, new: int) -> list[dict[str, Any]]:
    """Bench a model at some batch sizes; the prompt is timed with the first."""
    found = []
    for i, batch in enumerate(batches):
        plan = bench.Plan(prompt_tokens=1 if i else prompt, new_tokens=new, batch=batch)
        found.append(bench.run(model, plan))
    return found


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print a row for every model and batch."""
    table = Table("model", "batch", "tokens/s", "GB a step", "of the copy bandwidth", "prefill, tokens/s", "TFLOP/s")
    for size, runs in results.items():
        for i, run in enumerate(runs):
            decode, prefill = run["decode"], run["prefill"]
            step = decode["gb_per_token"] * run["batch"]
            ahead = ("", "") if i else (f"{prefill['tokens_per_s']:.0f}", f"{prefill['gflop_per_s'] / 1e3:.0f}")
            share = f"{decode['share_of_bandwidth']:.0%} of {run['ceilings']['read_gb_s']:.0f} GB/s"
            table.add_row(size, str(run["batch"]), f"{decode['tokens_per_s']:.1f}", f"{step:.2f}", share, *ahead)
    Console(width=120).print(table)


def main(
    size: Annotated[list[str], typer.Option(help=f"One of {', '.join(SIZES)}; more than once for more.")] = ["20b"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Sequences that decode together; more than once for more.")] = [1],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 8192,
    new: Annotated[int, typer.Option(help="Decoding steps.")] = 64,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured.")] = False,
) -> None:
    """Measure random models."""
    unknown = [name for name in size if name not in SIZES]
    if unknown or device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"came size {size} and device {device}; wanted {', '.join(SIZES)} and cuda or cpu")
    results = {}
    for name in size:
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(SIZES[name], Path(folder), device)  # type: ignore[arg-type]
            results[name] = measure(model, batch, prompt, new)
            del model  # another one may need its room
    if as_json:
        json.dump(results, sys.stdout)
    else:
        show(results)


if __name__ == "__main__":
    typer.run(main)
