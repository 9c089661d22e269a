"""``mxmoe bench``."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from mxmoe.generate import Model

__all__ = ["check", "run", "show"]


def check(prompt_tokens: int, new_tokens: int, depth: int) -> None:
    """Find what is wrong before a model is loaded; ValueError says what."""
    for name, value, low in (("-p", prompt_tokens, 1), ("-n", new_tokens, 1), ("--depth", depth, 0)):
        if value < low:
            raise ValueError(f"{name} is {value}; wanted {low} or more")


def _peak_rss_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def run(model: Model, prompt_tokens: int, new_tokens: int, depth: int) -> dict[str, Any]:
    """Measure on random tokens, after a warm-up; return what ``--json`` prints."""
    rng = np.random.default_rng(0)
    vocab_size = model.config.vocab_size
    model.forward(rng.integers(0, vocab_size, 8), logits="last")
    cache = model.new_cache(depth + prompt_tokens + new_tokens)
    if depth:
        model.forward(rng.integers(0, vocab_size, depth), cache=cache, logits="none")
    begin = time.perf_counter()
    logits = model.forward(rng.integers(0, vocab_size, prompt_tokens), cache=cache, logits="last")
    prefill = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(new_tokens):
        logits = model.forward([int(np.argmax(logits[0]))], cache=cache, logits="last")
    decode = time.perf_counter() - begin
    options = model.options
    return {
        "prefill": {"tokens": prompt_tokens, "seconds": prefill, "tokens_per_s": prompt_tokens / prefill},
        "decode": {"tokens": new_tokens, "seconds": decode, "tokens_per_s": new_tokens / decode},
        "depth": depth,
        "dense": options.dense,
        "kv": options.kv,
        "activations": options.activations,
        "threads": options.num_threads,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    for part in ("prefill", "decode"):
        figures = result[part]
        print(f"{part:8} {figures['tokens']:6} tokens  {figures['tokens_per_s']:10.2f} tokens/s")
    print(f"peak resident memory {result['peak_rss_bytes'] / 2**30:.2f} GiB")
