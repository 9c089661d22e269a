"""Every kernel on a GPU: its time, its share of its floor, and torch's time at the same work in the same run.

    python bench/gpu_ops.py [--size 20b --size 120b] [--quick] [--only TEXT] [--seconds N]

The floor is the longer of bytes over the bandwidth of a copy and operations over the rate of torch's 8192 x 8192
bfloat16 product, both measured in this run before, between and after. What is in no cache in a model is in none here:
see `gpu_timing`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gpu_cases import PHASES, GpuWork, Phase, works
from gpu_peers import Torch
from gpu_timing import choose_device, is_emulation, save, seconds_of, time_text
from make_checkpoint import SIZES
from mxmoe import cuda
from mxmoe.ceilings import GpuCeilings, GpuMeter

CEILINGS_EVERY_SECONDS = 5.0
# Of the model that the tests try this on.
TINY_PHASES = (Phase("decode", 1, 1, 20), Phase("decode x3", 3, 3, 20), Phase("prefill 9", 9, 1, 9))


@dataclass
class Bench:
    """Times works and keeps what came out.

    Attributes
    ----------
    results : list of dict
        A row for each work; `problem` where it failed.
    """

    meter: GpuMeter
    torch: Torch | None
    results: list[dict[str, Any]] = field(default_factory=list)
    _sampled: float = -1e9

    def _sample(self) -> None:
        if time.monotonic() - self._sampled > CEILINGS_EVERY_SECONDS:
            self.meter.sample()
            self._sampled = time.monotonic()

    def run_all(self, make: Callable[[], Iterable[GpuWork]], only: str) -> None:
        """Run the works of one group whose names contain a text."""
        try:
            for work in make():
                if only in f"{work.op} {work.shape}":
                    self.run(work)
        except (MemoryError, RuntimeError, TypeError, ValueError) as error:
            self.results.append({"op": str(make), "shape": "", "problem": f"{type(error).__name__}: {error}"})

    def run(self, work: GpuWork) -> None:
        """Check and time a work; one that fails is told of, and the others go on."""
        row: dict[str, Any] = {"op": work.op, "shape": work.shape, "nbytes": work.nbytes, "goal": work.goal}
        row |= {"operations": work.operations, "activations": work.activations, "calls": len(work.calls)}
        self.results.append(row)
        try:
            self._sample()
            work.check()
            row["seconds"] = seconds_of(work.calls)
            row["kernel"] = cuda.extension().last_kernels().get(work.op)
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}"
            return
        if self.torch is not None and work.peer is not None:
            row["peers"] = self._peers(work)

    def _peers(self, work: GpuWork) -> dict[str, Any]:
        found: dict[str, Any] = {}
        try:
            for peer in work.peer(self.torch):  # type: ignore[misc]
                found[peer.name] = self.torch.seconds(peer)  # type: ignore[union-attr]
        except Exception as error:  # no room, or another version of torch
            found["problem"] = f"{type(error).__name__}: {error}"
        self.torch.free()  # type: ignore[union-attr]
        return found

    def finish(self) -> dict[str, Any]:
        """Hold all times against the ceilings of the whole run."""
        self.meter.sample()
        ceilings: GpuCeilings = self.meter.median()
        for row in self.results:
            if "seconds" in row:
                floor = ceilings.seconds(row["nbytes"], row["operations"], row["activations"])
                row["gb_s"] = row["nbytes"] / row["seconds"] / 1e9
                row["gflop_s"] = row["operations"] / row["seconds"] / 1e9
                row["share_of_floor"] = floor / row["seconds"]
        reads = [sample.read_gb_s for sample in self.meter.samples]
        return {"ceilings": vars(ceilings) | {"read_gb_s_min": min(reads), "read_gb_s_max": max(reads)},
                "results": self.results}  # fmt: skip


def show(found: dict[str, Any], console: Console) -> None:
    """Print a row for each work."""
    c = found["ceilings"]
    peak = f"{c['bf16_gflop_s'] / 1e3:.0f} TFLOP/s" if c["bf16_gflop_s"] else "no peak: that takes torch with CUDA"
    console.print(f"copy {c['read_gb_s']:.0f} GB/s; product of 8192 x 8192 bf16 {peak}", highlight=False)
    table = Table("op", "shape", "time", "GB/s", "TFLOP/s", "of the floor", "goal", "torch")
    for row in found["results"]:
        if "problem" in row:
            table.add_row(row["op"], row["shape"], "failed", row["problem"][:60])
            continue
        peers = row.get("peers", {}).items()
        beside = [
            f"{name.removeprefix('torch ')}: {t[:50] if isinstance(t, str) else time_text(t)}" for name, t in peers
        ]
        table.add_row(
            row["op"], row["shape"], time_text(row["seconds"]), f"{row['gb_s']:.0f}", f"{row['gflop_s'] / 1e3:.1f}",
            f"{row['share_of_floor']:.0%}", f"{row['goal']:.0%}" if row["goal"] else "", "\n".join(beside),
        )  # fmt: skip
    console.print(table)


def run(sizes: list[str], *, quick: bool, only: str, seconds: float, torch: Torch | None) -> dict[str, Any]:
    """Bench the ops of some models until the time is up."""
    begin, bench, left_out = time.monotonic(), Bench(GpuMeter(), torch), 0
    for size in sizes:
        phases = TINY_PHASES if size == "tiny" else PHASES
        for make in works(size, SIZES[size], phases, quick=quick):
            if time.monotonic() - begin > seconds:
                left_out += 1
                continue
            bench.run_all(make, only)
            gc.collect()  # arrays on the GPU in reference cycles
    found = bench.finish()
    if left_out:
        found["left_out"] = left_out
    return found


def main(
    size: Annotated[list[str], typer.Option(help=f"One of {', '.join(SIZES)}; more than once for more.")] = ["20b"],  # noqa: B006
    quick: Annotated[bool, typer.Option(help="Leave out what says little.")] = False,
    only: Annotated[str, typer.Option(help="Ops and shapes that contain this text.")] = "",
    seconds: Annotated[float, typer.Option(help="Begin nothing new after so long.")] = 480.0,
) -> None:
    """Bench every op."""
    if unknown := [name for name in size if name not in SIZES]:
        raise typer.BadParameter(f"came size {unknown}; wanted {', '.join(SIZES)}")
    choose_device()
    console = Console(width=160)
    found = run(size, quick=quick, only=only, seconds=seconds, torch=Torch.find())
    show(found, console)
    if found.get("left_out"):
        console.print(f"{found['left_out']} groups of shapes left out: {seconds:.0f} s were up")
    if is_emulation():
        console.print("emulation: the times mean nothing")
    save("ops", found)
    if any("problem" in row for row in found["results"]):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
