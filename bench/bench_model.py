"""Prefill and decode of a whole model: two layers of 20b's shapes, or the checkpoint that --model names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mxmoe
from harness import Harness
from make_checkpoint import BIG, write_checkpoint
from mxmoe.commands import bench as command
from shapes import Shape

MODES = [
    Shape("20b", "prefill 512", mode=f"{dense} {kv} {activations}", full=full)
    for dense, kv, activations, full in (
        ("int8", "int8", "int8", False),
        ("bf16", "bf16", "bf16", False),
        ("int8", "bf16", "int8", True),
        ("int8", "bf16", "bf16", True),
        ("bf16", "float32", "float32", True),
    )
]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    given = request.config.getoption("--model")
    if given is not None:
        yield Path(given)
        return
    made = tmp_path_factory.mktemp("two-layers")
    write_checkpoint(made, replace(BIG, num_hidden_layers=2, layer_types=BIG.layer_types[:2]))
    yield made
    for path in made.iterdir():  # 3 GB that nobody wants to keep
        path.unlink()


@pytest.mark.parametrize("shape", MODES, ids=str)
def bench_model(
    shape: Shape, folder: Path, harness: Harness, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, kv, activations = shape.mode.split()
    modes: dict[str, Any] = {"dense": dense, "kv": kv, "activations": activations}
    model = mxmoe.load(folder, num_threads=harness.meter.num_threads, **modes)
    plan = command.Plan(prompt_tokens=512, new_tokens=16, repetitions=3)
    result = benchmark.pedantic(command.run, (model, plan), rounds=1, iterations=1)
    benchmark.extra_info.update(result)
    with capsys.disabled():
        print()
        command.show(result)
