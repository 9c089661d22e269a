"""Runs each op a thousand times on the same numbers and compares the bits with those of the first time.

    python bench/gpu_repeats.py [--size 20b] [--repeats 1000] [--seconds N] [--seed S]

A kernel that reads what another block or lane has not written yet, or that sums in the order in which blocks come,
gives other bits now and then. Shapes are the model's own and odd ones beside them; outputs are poisoned with ones in
every bit before each run, inputs are other ones for every seed. Decoding steps of a small model, recorded as graphs,
come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gpu_cases import KV_FORMS, Maker, Phase, attention, dense, experts, fused_qkv, head, routing
from gpu_models import random_model
from gpu_timing import choose_device, save
from make_checkpoint import SIZES
from mxmoe import cuda

# New tokens, sequences, keys: small enough that a thousand results come to the host in a few seconds.
REAL = (Phase("decode", 1, 1, 1000), Phase("decode x32", 32, 32, 700), Phase("prefill", 300, 1, 1300))
ODD = (Phase("3 tokens", 3, 3, 129), Phase("17 tokens", 17, 1, 17), Phase("70 tokens", 70, 2, 333))
ODD_SIZES = {"hidden_size": 224, "intermediate_size": 352, "num_experts": 7, "experts_per_token": 3}
TRY = (Phase("2 tokens", 2, 2, 20),)

Case = tuple[str, str, Callable[[], Any]]


def cases(size: str, seed: int) -> Iterator[Case]:
    """Yield op, shape and call of everything that sums, at true and at odd shapes."""
    config = SIZES[size]
    odd = replace(config, **ODD_SIZES, vocab_size=1021, eos_token_ids=())
    shapes = [(config, phase) for phase in (TRY if size == "tiny" else REAL)]
    for config, phase in [*shapes, *((odd, phase) for phase in (TRY if size == "tiny" else ODD))]:
        m = Maker(config, "odd" if config is odd else size, phase, seed)
        groups = [experts, dense, routing, *([head, fused_qkv] if phase.decodes else [])]
        for group in groups:
            for work in group(m):
                yield work.op, work.shape, work.calls[0]
        for window in (None, config.sliding_window):
            for kv in KV_FORMS:
                work = attention(m, window, kv)
                yield work.op, work.shape, work.calls[0]


def _bits(result: Any) -> list[Any]:
    parts = result if isinstance(result, tuple) else (result,)
    return [np.atleast_1d(part if isinstance(part, np.ndarray) else part.numpy()).view(np.uint8) for part in parts]


def repeat(call: Callable[[], Any], repeats: int, seconds: float) -> tuple[int, int]:
    """Return how often a call was repeated, and how many times its bits differed from the first."""
    want = _bits(call())
    ones = [cuda.array(np.full(part.nbytes, 0xFF, np.uint8)) for part in want]
    end, different = time.monotonic() + seconds, 0
    with cuda.pooled(cuda.extension().Pool()):
        for done in range(repeats):
            if time.monotonic() > end:
                return done, different
            poison = [part.copy() for part in ones]
            del poison  # the pool gives it to the next arrays of these sizes
            got = _bits(call())
            different += any(not np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    return repeats, different


def _generation(seed: int) -> Case:
    """Make a small model's logits over a prompt and recorded steps."""
    model = random_model(SIZES["tiny"], "cuda")
    prompt = np.random.default_rng(seed).integers(0, 512, 20)
    cache = model.new_cache(64)

    def call() -> Any:
        cache.reset()
        rows = [model.forward(prompt[:12], cache=cache)]
        rows += [model.forward(prompt[i : i + 1], cache=cache) for i in range(12, 20)]
        return np.concatenate(rows)

    return "model", "tiny: 12 tokens and 8 recorded steps", call


def run(size: str, repeats: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Repeat every case; each may take an eighth of the time that is left."""
    rows, end = [], time.monotonic() + seconds

    def one(op: str, shape: str, call: Callable[[], Any]) -> None:
        done, different = repeat(call, repeats, max(0.3, (end - time.monotonic()) / 8))
        rows.append({"op": op, "shape": shape, "repeats": done, "different": different})

    one(*_generation(seed))
    for op, shape, call in cases(size, seed):
        one(op, shape, call)
    return rows


def main(
    size: Annotated[str, typer.Option(help=f"Whose shapes: one of {', '.join(SIZES)}.")] = "20b",
    repeats: Annotated[int, typer.Option(help="How often.")] = 1000,
    seconds: Annotated[float, typer.Option(help="About how long all of it may take.")] = 240.0,
    seed: Annotated[int, typer.Option(help="Of the inputs; another one every time by default.")] = -1,
) -> None:
    """Repeat every op."""
    if size not in SIZES:
        raise typer.BadParameter(f"came size {size}; wanted {', '.join(SIZES)}")
    choose_device()
    seed = int(time.time()) if seed < 0 else seed
    found = run(size, repeats, seconds, seed)
    table = Table("op", "shape", "repeats", "other bits")
    for row in found:
        table.add_row(row["op"], row["shape"], str(row["repeats"]), str(row["different"]))
    console = Console(width=120)
    console.print(table)
    console.print(f"seed {seed}", highlight=False)
    save("repeats", found)
    if any(row["different"] for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
