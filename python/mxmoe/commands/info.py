"""``mxmoe info``."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mxmoe.config import ModelConfig
from mxmoe.generate import Model

__all__ = ["run", "show"]

_CONTEXTS = (4096, 8192, 32768, 131072)


def _parameters(config: ModelConfig) -> dict[str, int]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = hidden * (q + 2 * kv) + q + 2 * kv + q * hidden + hidden + config.num_attention_heads
    expert = 2 * inner * hidden + 2 * inner + inner * hidden + hidden
    router = config.num_experts * (hidden + 1)
    common = attention + router + 2 * hidden
    outside = 2 * config.vocab_size * hidden + hidden
    layers = config.num_hidden_layers
    return {
        "total": layers * (common + config.num_experts * expert) + outside,
        # As the model card counts: of the two vocabulary matrices only the output one is multiplied with.
        "active": layers * (common + config.experts_per_token * expert) + outside - config.vocab_size * hidden,
    }


def run(model: Model) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    config = model.config
    components = model.components
    weights = sum(int(c["bytes"]) for c in components.values())
    contexts = {}
    for tokens in sorted({min(n, config.max_position_embeddings) for n in _CONTEXTS}):
        cache = model.kv_cache_bytes(tokens)
        contexts[str(tokens)] = {"kv_cache_bytes": cache, "total_bytes": weights + cache}
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rope"}
    sliding = config.layer_types.count("sliding_attention")
    fields["layer_types"] = {"sliding": sliding, "full": config.num_hidden_layers - sliding}
    return {
        "model": str(model.path),
        "adapter": None if model.options.adapter is None else str(model.options.adapter),
        "config": fields | {"rope": vars(config.rope)},
        "parameters": _parameters(config),
        "tokenizer": None if model.tokenizer is None else model.tokenizer.vocab_size,
        "kv": model.options.kv,
        "activations": model.options.activations,
        "components": components,
        "weight_bytes": weights,
        "contexts": contexts,
    }


def _human(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.2f} {unit}" if unit != "B" else f"{int(n)} B"


def _summary(config: dict[str, Any], parameters: dict[str, int]) -> str:
    return (
        f"{parameters['total'] / 1e9:.3g} B parameters, {parameters['active'] / 1e9:.3g} B active; "
        f"{config['num_hidden_layers']} layers, {config['layer_types']['sliding']} of them with a sliding window of "
        f"{config['sliding_window']}; {config['num_experts']} experts, {config['experts_per_token']} per token; "
        f"hidden {config['hidden_size']}, intermediate {config['intermediate_size']}; "
        f"{config['num_attention_heads']} heads of {config['head_dim']}, {config['num_key_value_heads']} key/value; "
        f"vocabulary {config['vocab_size']}, context {config['max_position_embeddings']}"
    )


def show(result: dict[str, Any]) -> None:
    """Print the same for people."""
    config, console = result["config"], Console()
    console.print(f"[bold]{result['model']}[/bold]", soft_wrap=True)
    if result["adapter"] is not None:
        console.print(f"adapter {result['adapter']}", soft_wrap=True, highlight=False, markup=False)
    console.print(_summary(config, result["parameters"]))
    table = Table("component", "dtype", "bytes")
    for name, component in result["components"].items():
        table.add_row(name, component["dtype"], _human(component["bytes"]))
    table.add_row("[bold]weights[/bold]", "", _human(result["weight_bytes"]))
    console.print(table)
    table = Table("context", f"KV cache ({result['kv']})", "weights and cache")
    for tokens, memory in result["contexts"].items():
        table.add_row(tokens, _human(memory["kv_cache_bytes"]), _human(memory["total_bytes"]))
    console.print(table)
