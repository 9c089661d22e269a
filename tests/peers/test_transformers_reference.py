"""The oracle against transformers' own gpt-oss, both in float64 and in float32, on odd configurations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import checkpoints
from compare import relative_error
from mxmoe.checkpoint import Checkpoint
from mxmoe.config import RopeConfig
from mxmoe.reference import model as reference
from mxmoe.reference import ops

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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
    "other constants": replace(
        checkpoints.small_config(), swiglu_alpha=1.0, swiglu_limit=0.75, rms_norm_eps=1e-2, rope=SHORT_YARN
    ),
}


def load_transformers(checkpoint, dtype):
    """Build transformers' model with exactly the checkpoint's weights, the experts decoded."""
    data = json.loads((checkpoint.path / "config.json").read_text())
    data.pop("quantization_config")
    config = transformers.GptOssConfig.from_dict(data)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    state = {}

    def put(name, value):
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


def logits_of(model, ids):
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0].double().numpy()


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers") / "x"
    return Checkpoint.open(checkpoints.write(folder, config=request.param, seed=3))


@pytest.fixture
def ids(checkpoint):
    # Three windows long, so that sliding layers forget, and past the original context of the short YaRN.
    return np.random.default_rng(7).integers(0, checkpoint.config.vocab_size, 75)


def test_logits_agree_in_float64(checkpoint, ids):
    want = reference.forward(checkpoint, ids)
    got = logits_of(load_transformers(checkpoint, torch.float64), ids)
    # transformers forms frequencies, angles and the norm in float32 whatever the model's dtype.
    error = relative_error(got, want)
    assert np.median(error) < 1e-6
    assert error.max() < 5e-6


def test_logits_agree_in_float32(checkpoint, ids):
    want = reference.forward(checkpoint, ids)
    got = logits_of(load_transformers(checkpoint, torch.float32), ids)
    error = relative_error(got, want)
    assert np.median(error) < 2e-6
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.95


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 9},
        {"layer_types": ("full_attention", "sliding_attention")},
        {"swiglu_limit": 1.0},
        {"swiglu_alpha": 1.6},
        {"rope": PLAIN},
        {"rope": replace(YARN, truncate=True)},
        {"experts_per_token": 1},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_a_wrong_constant_is_seen(tmp_path, changes):
    right = checkpoints.small_config()
    checkpoint = Checkpoint.open(checkpoints.write(tmp_path / "x", config=right))
    ids = np.random.default_rng(7).integers(0, right.vocab_size, 75)
    got = logits_of(load_transformers(checkpoint, torch.float64), ids)
    assert np.median(relative_error(got, reference.forward(checkpoint, ids))) < 1e-6
    checkpoint.config = replace(right, **changes)
    assert np.median(relative_error(got, reference.forward(checkpoint, ids))) > 2e-5
