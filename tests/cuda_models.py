"""The small random model on a GPU, as its tests run it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mxmoe
from mxmoe.kv_cache import KVCache
from small_models import CONFIG, MODES, random_ids

IDS = random_ids(90)
GPU_MODES = {name: MODES[name] | {"device": "cuda"} for name in ("float32", "bf16")}


def loader(folder: Path) -> Callable[[ModuleType, str], mxmoe.Model]:
    """Models by the extension they run on and their mode, loaded once."""

    @functools.cache
    def cached(module: ModuleType, mode: str) -> mxmoe.Model:
        return mxmoe.load(folder, **GPU_MODES[mode])

    return cached


def plain(model: mxmoe.Model) -> Any:
    """Keep a model from replaying graphs: somebody watches."""
    return model.hook("logits", lambda value, context: None)


def small_pages(model: mxmoe.Model, max_tokens: int, num_sequences: int = 1) -> KVCache:
    """A cache of many blocks, so that sequences grow into new ones and past what a graph was made for."""
    options = {"num_sequences": num_sequences, "dtype": model.options.kv, "step_tokens": 64}
    return KVCache(CONFIG, max_tokens, block_size=8, device=model.new_cache(1).device, **options)
