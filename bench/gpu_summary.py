"""Print what the parts of gpu.sh found, beside what is wanted of one H100: python bench/gpu_summary.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["rows", "show"]

# Tokens a second of one sequence, context under 1000: at least, and hoped for.
DECODE = {"20b": (550, 700), "120b": (400, 520)}
OF_THE_BYTES = 0.7  # of what the bandwidth allows 32 sequences
DEPTH = 131072
Row = tuple[str, str, str]


def _read(folder: Path, name: str) -> Any:
    path = folder / f"{name}.json"
    return json.loads(path.read_text())[name] if path.exists() else None


def _verdict(seen: float, goal: float) -> str:
    return "reached" if seen >= goal else f"{seen / goal:.0%} of it"


def _models(models: dict[str, list[dict[str, Any]]]) -> list[Row]:
    found: list[Row] = []
    for size, runs in models.items():
        for run in runs:
            decode, prefill, batch = run["decode"], run["prefill"], run["batch"]
            rate, share = decode["tokens_per_s"], decode["share_of_bandwidth"]
            cost = f"{rate:.0f} tokens/s, {decode['gb_per_token']:.2f} GB a token, {share:.0%} of the bandwidth"
            what = f"{size} decode, batch {batch}" + (f", depth {run['depth']}" if run["depth"] else "")
            if batch > 1:
                found.append((what, cost, f"{OF_THE_BYTES:.0%}: {_verdict(share, OF_THE_BYTES)}"))
            elif run["depth"]:
                fits = run["depth"] + decode["tokens"] >= DEPTH
                left = "" if run["free_bytes"] is None else f"; {run['free_bytes'] / 1e9:.1f} GB left"
                found.append((what, cost + left, f"{DEPTH} tokens fit" + (": they do" if fits else "")))
            else:
                own = run.get("generated_tokens_per_s", rate)
                least, hope = DECODE.get(size, (0, 0))
                goal = f"{least}: {_verdict(own, least)} ({hope} hoped for)" if least else ""
                found.append((what, f"{cost}; generate {own:.0f} tokens/s", goal))
            if prefill["tokens"] > 1:
                of = f", {prefill['share_of_peak']:.0%} of the peak" if prefill["share_of_peak"] else ""
                what = f"{size} prefill of {prefill['tokens']}"
                found.append((what, f"{prefill['tokens_per_s']:.0f} tokens/s{of}", ""))
    return found


def _ops(ops: dict[str, Any]) -> list[Row]:
    ceilings, found = ops["ceilings"], []
    peak = ceilings["bf16_gflop_s"]
    found.append(("copy bandwidth", f"{ceilings['read_gb_s']:.0f} GB/s", ""))
    product = f"{peak / 1e3:.0f} TFLOP/s" if peak else "not measured: no torch"
    found.append(("bf16 product of 8192 x 8192", product, ""))
    for row in ops["results"]:
        if "problem" in row:
            found.append((f"{row['op']} {row['shape']}", f"failed: {row['problem'][:80]}", ""))
        elif row["goal"]:
            share = row["share_of_floor"]
            seen = f"{row['gflop_s'] / 1e3:.0f} TFLOP/s, {share:.0%} of the floor"
            found.append((f"{row['op']} {row['shape']}", seen, f"{row['goal']:.0%}: {_verdict(share, row['goal'])}"))
    return found


def rows(folder: Path) -> list[Row]:
    """Return what was measured, what was seen, and the goal with how near it is; of the parts that ran."""
    found: list[Row] = []
    if repeats := _read(folder, "repeats"):
        wrong = [f"{row['op']} {row['shape']}" for row in repeats if row["different"]]
        fewest = min(row["repeats"] for row in repeats)
        seen = f"{len(repeats)} cases, {fewest} to {max(row['repeats'] for row in repeats)} times"
        verdict = f"not in {', '.join(wrong)}" if wrong else "reached"
        found.append(("the same bits again", seen, f"always: {verdict}"))
    if ops := _read(folder, "ops"):
        found += _ops(ops)
    for path in sorted(folder.glob("models*.json"), key=lambda p: (len(p.name), p.name)):
        found += _models(_read(folder, path.stem))
    return found


def show(folder: Path, console: Console) -> None:
    """Print the table."""
    table = Table("what", "seen", "goal")
    for row in rows(folder):
        table.add_row(*row)
    console.print(table)
    parts = folder / "parts.txt"
    if parts.exists():
        console.print(parts.read_text().rstrip(), highlight=False)
    emulated = [p.name for p in folder.glob("*.json") if json.loads(p.read_text())["emulation"]]
    if emulated:
        console.print("emulation: the times mean nothing")


if __name__ == "__main__":
    show(Path(sys.argv[1]), Console(width=160))
