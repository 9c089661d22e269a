"""Small random models for the tests of the whole model: sizes that are no power of two, and every mode."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import checkpoints  # which makes bench/ importable
import mxmoe

# isort: split
from make_checkpoint import BIG, byte_tokenizer

__all__ = ["BIG", "CONFIG", "MODES", "byte_tokenizer", "in_chunks", "random_ids", "write"]

# Three experts of eight, heads in groups of three, a window that ends within a block of the cache.
CONFIG = checkpoints.small_config(
    num_hidden_layers=3,
    hidden_size=96,
    intermediate_size=160,
    num_experts=8,
    experts_per_token=3,
    vocab_size=200,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=20,
    eos_token_ids=(199, 198),
)

MODES: dict[str, dict[str, Any]] = {
    "float32": {"dense": "bf16", "kv": "float32", "activations": "float32"},
    "bf16": {"dense": "bf16", "kv": "bf16", "activations": "bf16"},
    "int8": {"dense": "int8", "kv": "int8", "activations": "int8"},
}


def write(folder: Path, **changes: Any) -> Path:
    """Write a checkpoint of `CONFIG`, or of another size."""
    config = changes.pop("config", CONFIG)
    return checkpoints.write(folder, config=config, **changes)


def random_ids(count: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> NDArray[np.int64]:
    """Draw token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def in_chunks(
    model: mxmoe.Model, ids: NDArray[Any], sizes: Iterable[int], cache: mxmoe.KVCache | None = None, sequence: int = 0
) -> NDArray[Any]:
    """Run a prompt in chunks of the given sizes, the last of which takes what is left; logits of every token."""
    cache = cache or model.new_cache(len(ids))
    rows, begin = [], 0
    for size in sizes:
        if begin >= len(ids):
            break
        chunk = ids[begin : begin + size]
        rows.append(model.forward(chunk, cache=cache, sequences=[sequence]))
        begin += len(chunk)
    if begin < len(ids):
        rows.append(model.forward(ids[begin:], cache=cache, sequences=[sequence]))
    return np.concatenate(rows)
