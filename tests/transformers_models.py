"""transformers' gpt-oss with a checkpoint's very weights, plain or rounding where mxmoe's modes round."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

import checkpoints
from mxmoe.checkpoint import Checkpoint
from mxmoe.config import RopeConfig
from mxmoe.reference import ops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
modeling_gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")

YARN = RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, False)
SHORT_YARN = RopeConfig(10000.0, 4.0, 64, 8.0, 2.0, False)
ROUNDED_YARN = RopeConfig(10000.0, 8.0, 128, 32.0, 1.0, True)
PLAIN = RopeConfig(10000.0, original_max_position_embeddings=131072)

CONFIGS = {
    "published proportions": checkpoints.small_config(),
    "three layers, eight experts, four chosen": checkpoints.small_config(
        num_hidden_layers=3,
        hidden_size=96,
        num_experts=8,
        experts_per_token=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=4,
        rope=SHORT_YARN,
    ),
    "one expert chosen, no grouping": checkpoints.small_config(
        hidden_size=160,
        intermediate_size=32,
        num_experts=3,
        experts_per_token=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        sliding_window=7,
        rope=PLAIN,
    ),
    "one key head, all experts chosen": checkpoints.small_config(
        num_experts=3,
        experts_per_token=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=16,
        rope=ROUNDED_YARN,
    ),
    "full layers first": checkpoints.small_config(
        num_hidden_layers=3,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
        sliding_window=1,
    ),
    "heads of 80, thirty-two experts": checkpoints.small_config(
        hidden_size=160,
        intermediate_size=64,
        num_experts=32,
        experts_per_token=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=80,
        sliding_window=16,
    ),
    "the published window, an odd o_proj": checkpoints.small_config(
        hidden_size=96,
        intermediate_size=32,
        num_experts=8,
        experts_per_token=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        sliding_window=128,
        rope=PLAIN,
    ),
    "other constants": replace(
        checkpoints.small_config(), swiglu_alpha=1.0, swiglu_limit=0.75, rms_norm_eps=1e-2, rope=SHORT_YARN
    ),
}

BLOCK = 32


def load_transformers(checkpoint: Checkpoint, dtype: Any) -> Any:
    """Build transformers' model with exactly the checkpoint's weights, the experts decoded."""
    data = json.loads((checkpoint.path / "config.json").read_text())
    data.pop("quantization_config")
    config = transformers.GptOssConfig.from_dict(data)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    state = {}

    def put(name: str, value: Any) -> None:
        state[name] = torch.from_numpy(np.ascontiguousarray(np.asarray(value).astype(np.float64))).to(dtype)

    put("model.embed_tokens.weight", checkpoint.embed_tokens)
    put("model.norm.weight", checkpoint.norm)
    put("lm_head.weight", checkpoint.lm_head)
    for i in range(checkpoint.config.num_hidden_layers):
        w, prefix = checkpoint.layer(i), f"model.layers.{i}."
        for part in "qkvo":
            for kind in ("weight", "bias"):
                put(f"{prefix}self_attn.{part}_proj.{kind}", getattr(w, f"{part}_proj_{kind}"))
        put(f"{prefix}self_attn.sinks", w.sinks)
        put(f"{prefix}input_layernorm.weight", w.input_layernorm)
        put(f"{prefix}post_attention_layernorm.weight", w.post_attention_layernorm)
        put(f"{prefix}mlp.router.weight", w.router_weight)
        put(f"{prefix}mlp.router.bias", w.router_bias)
        for name in ("gate_up", "down"):
            decoded = ops.mxfp4_dequantize(getattr(w, f"{name}_blocks"), getattr(w, f"{name}_scales"))
            put(f"{prefix}mlp.experts.{name}_proj", decoded.swapaxes(1, 2))
            put(f"{prefix}mlp.experts.{name}_proj_bias", getattr(w, f"{name}_bias"))
    model.load_state_dict(state, strict=True, assign=True)
    # Frequencies are not weights, and those made on the meta device hold nothing.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def logits_of(model: Any, ids: Any, cache: Any = None) -> Any:
    """Run one prompt; (T, vocab_size) float64."""
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None], past_key_values=cache).logits[0].double().numpy()


def keep(x: Any) -> Any:
    """Round nothing."""
    return x


def round_bf16(x: Any) -> Any:
    """Round to bfloat16 and widen again."""
    return x.to(torch.bfloat16).to(x.dtype)


def _round_int8(x: Any, scale: Any) -> Any:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / safe).round().clamp(-127, 127) * scale


def round_int8_blocks(x: Any) -> Any:
    """Round to 127 steps of the largest magnitude of each 32 values of a row."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    return _round_int8(blocks, blocks.abs().amax(-1, keepdim=True) / 127).flatten(-2)


def round_int8_rows(x: Any) -> Any:
    """Round to 127 steps of the largest magnitude of a row: of a token and head in a cache."""
    return _round_int8(x, x.abs().amax(-1, keepdim=True) / 127)


def round_int8_weight(weight: Any) -> Any:
    """Round to int8 by 32 columns, their scale rounded up to bfloat16."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    exact = blocks.abs().amax(-1, keepdim=True) / 127
    # The next larger bfloat16: the upper half of the float32's bits, one more where the lower half is not zero.
    bits = exact.float().view(torch.int32)
    up = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return _round_int8(blocks, up.to(weight.dtype)).flatten(-2)


@dataclass(frozen=True)
class Mode:
    """Options of `mxmoe.load`, and what each of them rounds."""

    dense: str
    kv: str
    activations: str

    @property
    def options(self) -> dict[str, str]:
        return vars(self)

    def of_expert(self, x: Any) -> Any:
        """Round what meets an expert's weight."""
        return {"float32": keep, "bf16": round_bf16, "int8": round_int8_blocks}[self.activations](x)

    def of_dense(self, x: Any) -> Any:
        """Round what meets a dense weight: there are integer products only with integer weights."""
        whole_blocks = self.dense == "int8" and x.shape[-1] % BLOCK == 0
        return round_bf16(x) if self.activations == "int8" and not whole_blocks else self.of_expert(x)

    def of_cache(self, x: Any) -> Any:
        """Round keys or values (..., head_dim)."""
        return {"float32": keep, "bf16": round_bf16, "int8": round_int8_rows}[self.kv](x)

    def of_weight(self, weight: Any) -> Any:
        """Round a dense weight."""
        return round_int8_weight(weight) if self.dense == "int8" and weight.shape[1] % BLOCK == 0 else weight


class _RoundingCache(transformers.DynamicCache):
    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode = mode

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key_states, value_states = self.mode.of_cache(key_states), self.mode.of_cache(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _attention_in_bf16(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    """Attend as transformers' eager attention does, with queries and softmax weights rounded to bfloat16."""
    key = modeling_gpt_oss.repeat_kv(key, module.num_key_value_groups)
    value = modeling_gpt_oss.repeat_kv(value, module.num_key_value_groups)
    scores = round_bf16(query) @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask[..., : key.shape[-2]]
    sinks = module.sinks.reshape(1, -1, 1, 1).to(scores.dtype)
    largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    weights = round_bf16(torch.exp(scores - largest))
    shares = weights / (weights.sum(-1, keepdim=True) + torch.exp(sinks - largest))
    return (shares @ value).transpose(1, 2).contiguous(), shares


def rounded_logits(checkpoint: Checkpoint, ids: Any, mode: Mode, dtype: Any = None) -> Any:
    """Run transformers' model with the roundings of `mode` put in; (T, vocab_size) float64.

    In float32 this is what torch makes of that mode. The router rounds nothing.
    """
    model = load_transformers(checkpoint, dtype or torch.float32)
    linears = [getattr(layer.self_attn, f"{p}_proj") for layer in model.model.layers for p in "qkvo"]
    for linear in [*linears, model.lm_head]:
        linear.weight.data = mode.of_weight(linear.weight.data)
        linear.register_forward_pre_hook(lambda _, args: (mode.of_dense(args[0]), *args[1:]))
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.register_forward_pre_hook(lambda _, args: (mode.of_expert(args[0]), *args[1:]))
        apply_gate = experts._apply_gate
        experts._apply_gate = lambda gate_up, gate=apply_gate: mode.of_expert(gate(gate_up))
    attention = modeling_gpt_oss.eager_attention_forward
    if mode.kv == "bf16" and mode.activations != "float32":
        attention = _attention_in_bf16
    with mock.patch.object(modeling_gpt_oss, "eager_attention_forward", attention):
        return logits_of(model, ids, _RoundingCache(mode))
