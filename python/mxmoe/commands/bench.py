"""``mxmoe bench``."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mxmoe import _core
from mxmoe.ceilings import CeilingMeter, GpuMeter
from mxmoe.costs import Costs
from mxmoe.generate import Model
from mxmoe.kv_cache import KVCache

__all__ = ["Plan", "Runs", "run", "show"]

_SEED = 0


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    prompt_tokens : int
        Tokens of the prompt that is timed, one sequence.
    new_tokens : int
        Decoding steps that are timed.
    depth : int
        Tokens in the cache before either.
    batch : int
        Sequences that decode together.
    repetitions : int
        How often all of it is done, with the ceilings measured before, between and after.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    depth: int = 0
    batch: int = 1
    repetitions: int = 3

    def check(self) -> None:
        """Find what is wrong before a model is loaded; ValueError says what."""
        lowest = {
            "-p": (self.prompt_tokens, 1),
            "-n": (self.new_tokens, 1),
            "--depth": (self.depth, 0),
            "--batch": (self.batch, 1),
            "--repetitions": (self.repetitions, 1),
        }
        for name, (value, low) in lowest.items():
            if value < low:
                raise ValueError(f"{name} is {value}; wanted {low} or more")


class _Memory:
    """The most memory that the process had resident, leaving out what the meter of the ceilings holds.

    Made before the meter is; `held` is what the meter then takes.
    """

    def __init__(self) -> None:
        self._before = self._peak()
        self.held = 0

    @staticmethod
    def _peak() -> int:
        try:
            # getrusage's figure begins with that of the process which started this one.
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):  # not Linux
            pass
        try:
            import resource
        except ImportError:  # not POSIX
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) if sys.platform == "darwin" else int(peak) * 1024

    def peak(self) -> int:
        """Bytes."""
        return max(self._before, self._peak() - self.held)


def _fill(model: Model, cache: KVCache, sequences: list[int], depth: int) -> None:
    """Put `depth` made-up keys and values in some sequences, as if that many tokens had passed.

    Time depends on how many there are, not on what they are; computing them would take as long as a prefill.
    """
    config, ops = model.config, model.embed_tokens.ops
    rng, put = np.random.default_rng(_SEED), cache.device.put
    shape = (min(depth, cache.step_tokens), config.num_key_value_heads, config.head_dim)
    k, v = (put(rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)) for _ in range(2))
    for sequence in sequences:
        for begin in range(0, depth, cache.step_tokens):
            count = min(cache.step_tokens, depth - begin)
            pages = cache.reserve([sequence], [count])
            for held, kind in zip(cache.layers, config.layer_types, strict=True):
                scales = {"k_scales": held.k_scales, "v_scales": held.v_scales}
                ops.kv_cache_write(k[:count], v[:count], held.k, held.v, put(pages[kind].slots), **scales)
            cache.commit([sequence], [count])


class Runs:
    """Timed runs of one model, on random tokens that are the same every time.

    Attributes
    ----------
    prefill_seconds, decode_seconds : list of float
        One for each call of `prefill` and `decode`.
    experts_read : float
        Experts of a layer that get work in a decoding step, on average.
    """

    def __init__(self, model: Model, plan: Plan) -> None:
        self.model, self.plan = model, plan
        room = plan.depth + max(plan.prompt_tokens, plan.new_tokens)
        self._cache = model.new_cache(room, num_sequences=plan.batch)
        rng = np.random.default_rng(_SEED)
        vocab_size = model.config.vocab_size
        self._prompt = rng.integers(0, vocab_size, plan.prompt_tokens)
        self._steps = rng.integers(0, vocab_size, (plan.new_tokens, plan.batch))
        self.prefill_seconds: list[float] = []
        self.decode_seconds: list[float] = []
        self.experts_read = float(model.config.experts_per_token)

    def _restart(self, sequences: list[int]) -> None:
        for sequence in range(self.plan.batch):
            self._cache.reset(sequence)
        _fill(self.model, self._cache, sequences, self.plan.depth)

    def warm_up(self) -> None:
        """Touch every weight and all working memory; in a batch, count the experts that get work."""
        plan = self.plan
        self._restart([0])
        self.model.forward(self._prompt[: self._cache.step_tokens], cache=self._cache, logits="last")
        if plan.batch > 1:
            self._restart(list(range(plan.batch)))
            bounds = list(range(plan.batch + 1))
            options: dict[str, Any] = {"cache": self._cache, "cu_seqlens": bounds, "logits": "last"}
            _, chosen = self.model.forward(self._steps[0], capture=["layers.*.topk_ids"], **options)
            self.experts_read = statistics.mean(len(np.unique(ids)) for ids in chosen.values())

    def prefill(self) -> None:
        """Time one prompt."""
        self._restart([0])
        begin = time.perf_counter()
        self.model.forward(self._prompt, cache=self._cache, logits="last")
        self.prefill_seconds.append(time.perf_counter() - begin)

    def decode(self) -> None:
        """Time all decoding steps."""
        self._restart(list(range(self.plan.batch)))
        bounds = list(range(self.plan.batch + 1))
        begin = time.perf_counter()
        if self.model.chooses_on_device:
            # As greedy generation does it: logits do not come to the host, and a step is on its way while the tokens
            # of the one before are read.
            token_ids, last = self._steps[0], len(self._steps) - 1
            for i in range(len(self._steps)):
                token_ids, _ = self.model.likeliest(token_ids, cache=self._cache, cu_seqlens=bounds, ahead=i < last)
        else:
            for token_ids in self._steps:
                self.model.forward(token_ids, cache=self._cache, cu_seqlens=bounds, logits="last")
        self.decode_seconds.append(time.perf_counter() - begin)


def _rates(tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens a second: the median of the repetitions, and the slowest and fastest."""
    middle = statistics.median(seconds)
    return {
        "tokens": tokens,
        "seconds": middle,
        "tokens_per_s": tokens / middle,
        "tokens_per_s_min": tokens / max(seconds),
        "tokens_per_s_max": tokens / min(seconds),
    }


def _report(runs: Runs, meter: CeilingMeter | GpuMeter, memory: _Memory) -> dict[str, Any]:
    plan, options, config = runs.plan, runs.model.options, runs.model.config
    costs = Costs(config, options.dense, options.kv)
    ceilings = meter.median()
    prefill = _rates(plan.prompt_tokens, runs.prefill_seconds)
    operations = costs.prefill_operations(plan.prompt_tokens, plan.depth)
    prefill["gflop_per_token"] = operations / plan.prompt_tokens / 1e9
    prefill["gflop_per_s"] = operations / prefill["seconds"] / 1e9
    peak = ceilings.peak(options.activations)
    prefill["share_of_peak"] = None if peak is None else prefill["gflop_per_s"] / peak

    decode = _rates(plan.new_tokens * plan.batch, runs.decode_seconds)
    steps = [costs.decode_bytes(plan.depth + i, plan.batch, runs.experts_read) for i in range(plan.new_tokens)]
    beside = runs.model.components.get("adapter", {"bytes": 0})["bytes"]
    steps = [nbytes + beside for nbytes in steps]
    decode["gb_per_token"] = sum(steps) / decode["tokens"] / 1e9
    decode["gb_per_s"] = sum(steps) / decode["seconds"] / 1e9
    decode["share_of_bandwidth"] = decode["gb_per_s"] / ceilings.read_gb_s
    typical = statistics.median(meter.passes)
    decode["share_of_typical_bandwidth"] = decode["gb_per_s"] / typical
    decode["experts_read"] = runs.experts_read
    reads = [sample.read_gb_s for sample in meter.samples]
    return {
        "prefill": prefill,
        "decode": decode,
        "ceilings": asdict(ceilings)
        | {"samples": len(reads), "read_gb_s_min": min(reads), "read_gb_s_max": max(reads)}
        | {"read_gb_s_typical": typical},
        "peak_rss_bytes": memory.peak(),
        "model": str(runs.model.path),
        "device": options.device,
        "adapter": None if options.adapter is None else str(options.adapter),
        "depth": plan.depth,
        "batch": plan.batch,
        "repetitions": plan.repetitions,
        "dense": options.dense,
        "kv": options.kv,
        "activations": options.activations,
        "threads": meter.num_threads or _core.hardware_threads(),
        "isa": _core.active_isa(),
    }


def run(model: Model, plan: Plan, progress: bool = False) -> dict[str, Any]:
    """Measure on random tokens and return what ``--json`` prints.

    Prefill and decode each begin with `plan.depth` tokens in the cache. With `progress`, a bar on stderr.
    """
    plan.check()
    runs = Runs(model, plan)
    runs.warm_up()
    memory = _Memory()
    meter = GpuMeter() if model.options.device == "cuda" else CeilingMeter(model.options.num_threads)
    memory.held = meter.buffer_bytes
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("Measuring", total=2 * plan.repetitions)
        meter.sample()
        for _ in range(plan.repetitions):
            for part in (runs.prefill, runs.decode):
                part()
                meter.sample()
                bar.advance(task)
    return _report(runs, meter, memory)


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    prefill, decode, ceilings = result["prefill"], result["decode"], result["ceilings"]
    console = Console()
    console.print(
        f"{result['model']}: {result['device']}, dense {result['dense']}, kv {result['kv']}, "
        f"activations {result['activations']}; "
        f"{result['threads']} threads, {result['isa']}; depth {result['depth']}, batch {result['batch']}; "
        f"median of {result['repetitions']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", "tokens", "tokens/s", "slowest to fastest", "a token costs", "rate", "share of the ceiling")
    peak = {"int8": "int8_gop_s", "bf16": "bf16_gflop_s", "float32": "float32_gflop_s"}[result["activations"]]
    cost = (f"{prefill['gflop_per_token']:.3g} GFLOP", f"{decode['gb_per_token']:.3g} GB")
    rate = (f"{prefill['gflop_per_s']:.4g} GFLOP/s", f"{decode['gb_per_s']:.3g} GB/s")
    unknown = "not measured: that takes torch with CUDA"
    share = (
        f"{prefill['share_of_peak']:.0%} of {ceilings[peak]:.4g} GFLOP/s" if ceilings[peak] else unknown,
        f"{decode['share_of_bandwidth']:.0%} of {ceilings['read_gb_s']:.3g} GB/s at best, "
        f"{decode['share_of_typical_bandwidth']:.0%} of {ceilings['read_gb_s_typical']:.3g}",
    )
    for i, (name, part) in enumerate({"prefill": prefill, "decode": decode}.items()):
        spread = f"{part['tokens_per_s_min']:.4g} to {part['tokens_per_s_max']:.4g}"
        table.add_row(name, str(part["tokens"]), f"{part['tokens_per_s']:.4g}", spread, cost[i], rate[i], share[i])
    console.print(table)
    console.print(f"peak resident memory {result['peak_rss_bytes'] / 2**30:.2f} GiB", highlight=False)
