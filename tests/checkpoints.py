"""Small random checkpoints in every layout, and tools to break them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mxmoe.checkpoint import Checkpoint
from mxmoe.config import ModelConfig, RopeConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from make_checkpoint import write_checkpoint

LAYOUTS = ("huggingface", "original", "huggingface-bf16")

SMALL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_experts=5,
    experts_per_token=2,
    vocab_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=8,
    layer_types=("sliding_attention", "full_attention"),
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, False),
    eos_token_ids=(127, 126),
)


def small_config(**changes: Any) -> ModelConfig:
    """Return a small configuration; layers alternate, beginning with a sliding one, unless told otherwise."""
    layers = changes.get("num_hidden_layers", SMALL.num_hidden_layers)
    alternating = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(layers))
    return replace(SMALL, **({"layer_types": alternating} | changes))


def write(
    folder: Path,
    layout: str = "huggingface",
    *,
    seed: int = 0,
    config: ModelConfig | None = None,
    shard_bytes: int = 1 << 30,
    **changes: Any,
) -> Path:
    """Write a checkpoint of `small_config` with `changes` (or of `config`) and return its folder."""
    config = config or small_config(**changes)
    write_checkpoint(folder, config, layout=layout, seed=seed, shard_bytes=shard_bytes)
    return folder


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place; `edit` changes its argument or returns what to write instead."""
    data = json.loads(path.read_text())
    result = edit(data)
    path.write_text(json.dumps(data if result is None else result))


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file in header and data."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_safetensors(path: Path, header: Any, data: bytes, *, align: int = 8) -> None:
    """Join header (a JSON value, or bytes as they are) and data, which begins at a multiple of `align`."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % align)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def everything(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return every weight of a checkpoint by name."""
    found = {name: getattr(checkpoint, name) for name in ("embed_tokens", "norm", "lm_head")}
    for i in range(checkpoint.config.num_hidden_layers):
        found |= {f"{i}.{name}": value for name, value in vars(checkpoint.layer(i)).items()}
    return found


def assert_clear(problem: Any, *parts: str) -> None:
    """Check that an error is one short line that names `parts`, without a chain of causes."""
    text = str(problem.value)
    assert "\n" not in text
    assert len(text) < 700
    assert problem.value.__cause__ is None
    assert problem.value.__context__ is None or problem.value.__suppress_context__
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
