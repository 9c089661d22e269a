"""Decode and prefill of whole models on a GPU, on random weights of the true shapes.

    python bench/gpu_models.py --size 20b --size 120b --batch 1 --batch 32 --prompt 8192 [--depth 131072]

Two layers are drawn and copied on the GPU for every layer of the model, each to memory of its own. What a step costs
does not depend on what the weights are. Decode is timed twice: steps on tokens that the host sends, as `mxmoe bench`
times them, and one sequence as a user sees it, the time between the tokens of `generate`.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gpu_timing import choose_device, is_emulation, save
from make_checkpoint import SIZES, Weights
from mxmoe import cuda
from mxmoe.checkpoint import LayerWeights
from mxmoe.commands import bench
from mxmoe.config import ModelConfig
from mxmoe.generate import Model
from mxmoe.loading import build_model
from mxmoe.model import LoadOptions

LAYERS = 2  # a sliding and a full one


class RandomWeights:
    """Random weights where a checkpoint is wanted: a few layers that stand for all.

    Parameters
    ----------
    config : ModelConfig
    on_gpu : bool
        Hold the few layers on the GPU, to be copied there.
    """

    layout = "huggingface"

    def __init__(self, config: ModelConfig, on_gpu: bool) -> None:
        self.config, self.path = config, Path("random")
        self._weights, self._on_gpu = Weights(config, 0), on_gpu
        self._layers: dict[int, LayerWeights] = {}

    def _drawn(self, name: str, layer: int = 0) -> Any:
        shape = self._weights.shapes[name]
        return np.concatenate(list(self._weights.pieces(name, layer))).reshape(shape)

    embed_tokens = property(lambda self: self._drawn("embed_tokens"))
    lm_head = property(lambda self: self._drawn("lm_head"))
    norm = property(lambda self: self._drawn("norm"))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model."""
        once = ("embed_tokens", "lm_head", "norm")
        size = {name: int(np.prod(self._weights.shapes[name], dtype=object)) for name in (*once, *_names())}
        size |= {name: n * (1 if name.endswith(("blocks", "scales")) else 2) for name, n in size.items()}
        return sum(n * (1 if name in once else self.config.num_hidden_layers) for name, n in size.items())

    def layer(self, i: int) -> LayerWeights:
        """Return the weights that stand for layer `i`."""
        if i % LAYERS not in self._layers:
            drawn = {name: self._drawn(name, i % LAYERS) for name in _names()}
            there = {name: cuda.array(x) for name, x in drawn.items()} if self._on_gpu else drawn
            self._layers[i % LAYERS] = LayerWeights(**there)
        return self._layers[i % LAYERS]

    def release(self, *_: Any) -> None:
        """Keep what comes again."""


def _names() -> list[str]:
    return list(LayerWeights.__dataclass_fields__)


def random_model(
    config: ModelConfig, device: Literal["cpu", "cuda"] = "cuda", kv: Literal["float32", "bf16", "int8"] = "bf16"
) -> Model:
    """Make a model of random weights."""
    weights: Any = RandomWeights(config, device == "cuda")
    return build_model(weights, LoadOptions(device=device, kv=kv))


def generated_per_second(model: Model, prompt: int, new: int) -> float:
    """Return the tokens a second of greedy generation, the first few, which record graphs, left out."""
    ids, warm = np.arange(prompt) % model.config.vocab_size, 4
    times = []
    for _ in model.generate(ids, new + warm, stop_token_ids=[]):
        times.append(time.perf_counter())
    return (len(times) - warm) / max(times[-1] - times[warm - 1], 1e-9)


def measure(
    model: Model, batches: list[int], prompt: int, new: int, depth: int = 0, repetitions: int = 3
) -> list[dict[str, Any]]:
    """Bench a model at some batch sizes, the prompt with the first; with `depth`, a decode there comes last."""
    found = []
    for i, batch in enumerate(batches):
        plan = bench.Plan(prompt_tokens=1 if i else prompt, new_tokens=new, batch=batch, repetitions=repetitions)
        found.append(bench.run(model, plan))
    found[0]["generated_tokens_per_s"] = generated_per_second(model, min(prompt, 100), new)
    if depth:
        room = min(depth, model.config.max_position_embeddings) - new
        plan = bench.Plan(prompt_tokens=1, new_tokens=new, depth=room, repetitions=1)
        found.append(bench.run(model, plan))
    for run in found:
        run["free_bytes"] = memory_left()
    return found


def memory_left() -> int | None:
    """Bytes that the GPU has free while the model and its caches are there; None without a GPU."""
    return None if cuda.problem() else int(cuda.extension().memory_info()[0])


def show(results: dict[str, list[dict[str, Any]]], console: Console | None = None) -> None:
    """Print a row for every model, batch and depth."""
    table = Table("model", "batch", "depth", "tokens/s", "generate", "GB a step", "of the copy bandwidth", "prefill")
    table.add_column("TFLOP/s")
    for size, runs in results.items():
        for run in runs:
            decode, prefill = run["decode"], run["prefill"]
            step = decode["gb_per_token"] * run["batch"]
            ahead = ("", "")
            if prefill["tokens"] > 1:
                of_peak = f" ({prefill['share_of_peak']:.0%} of the peak)" if prefill["share_of_peak"] else ""
                ahead = f"{prefill['tokens_per_s']:.0f}", f"{prefill['gflop_per_s'] / 1e3:.0f}{of_peak}"
            share = f"{decode['share_of_bandwidth']:.0%} of {run['ceilings']['read_gb_s']:.0f} GB/s"
            own = run.get("generated_tokens_per_s")
            table.add_row(
                size, str(run["batch"]), str(run["depth"]), f"{decode['tokens_per_s']:.1f}",
                f"{own:.1f}" if own else "", f"{step:.2f}", share, *ahead,
            )  # fmt: skip
    (console or Console(width=140)).print(table)


def main(
    size: Annotated[list[str], typer.Option(help=f"One of {', '.join(SIZES)}; more than once for more.")] = ["20b"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Sequences that decode together; more than once for more.")] = [1],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 8192,
    new: Annotated[int, typer.Option(help="Decoding steps.")] = 64,
    depth: Annotated[int, typer.Option(help="Decode once more with the last step at so many tokens; 0 for not.")] = 0,
    repetitions: Annotated[int, typer.Option(help="How often; medians count.")] = 3,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    name: Annotated[str, typer.Option(help="Of the file with the figures.")] = "models",
) -> None:
    """Measure random models."""
    unknown = [one for one in size if one not in SIZES]
    if unknown or device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"came size {size} and device {device}; wanted {', '.join(SIZES)} and cuda or cpu")
    if device == "cuda":
        choose_device()
    results: dict[str, Any] = {}
    for one in size:
        begin = time.monotonic()
        model = random_model(SIZES[one], device)  # type: ignore[arg-type]
        print(f"{one}: made in {time.monotonic() - begin:.1f} s", flush=True)
        results[one] = measure(model, batch, prompt, new, depth, repetitions)
        if device == "cuda":
            save(name, results)  # the first one's figures, should the second be cut off
        print(f"{one}: measured after {time.monotonic() - begin:.1f} s", flush=True)
        del model  # another one may need its room
        gc.collect()
    show(results)
    if device == "cuda" and is_emulation():
        print("emulation: the times mean nothing")


if __name__ == "__main__":
    typer.run(main)
