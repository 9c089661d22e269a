"""Configurations: every spelling reads the same, everything wrong is one clear error."""

from __future__ import annotations

import json
import math

import pytest

import checkpoints
from checkpoints import assert_clear
from make_checkpoint import config_json
from mxmoe.config import ConfigError, ModelConfig, RopeConfig

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
# The keys and values of openai/gpt-oss-20b as first published.
PUBLISHED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
ORIGINAL = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def without(data, *keys):
    return {key: value for key, value in data.items() if key not in keys}


def test_published_config():
    config = ModelConfig.from_dict(PUBLISHED)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (24, 2880, 2880)
    assert (config.num_experts, config.experts_per_token, config.vocab_size) == (32, 4, 201088)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (64, 8, 64)
    assert config.rope == RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, False)
    assert (config.swiglu_alpha, config.swiglu_limit, config.rms_norm_eps) == (1.702, 7.0, 1e-5)
    assert config.max_position_embeddings == 131072
    assert config.eos_token_ids == (200002,)
    assert config.sm_scale == 0.125
    assert [config.window(i) for i in range(4)] == [128, None, 128, None]


@pytest.mark.parametrize(
    "spelling",
    [
        without(PUBLISHED, "rope_scaling", "rope_theta") | {"rope_parameters": YARN | {"rope_theta": 150000.0}},
        without(PUBLISHED, "rope_scaling") | {"rope_parameters": YARN},
        PUBLISHED | {"rope_parameters": YARN | {"rope_theta": 150000.0}},
        PUBLISHED | {"rope_scaling": {("type" if k == "rope_type" else k): v for k, v in YARN.items()}},
        PUBLISHED | {"rope_scaling": YARN | {"attention_factor": 0.1 * math.log(32) + 1}},
        PUBLISHED | {"rope_scaling": YARN | {"attention_factor": None, "mscale": None}},
        without(PUBLISHED, "layer_types"),
        PUBLISHED | {"layer_types": None},
        without(PUBLISHED, "num_local_experts") | {"num_experts": 32},
        PUBLISHED | {"num_experts": 32},
        without(PUBLISHED, "num_experts_per_tok"),
        without(PUBLISHED, "experts_per_token"),
        without(PUBLISHED, "quantization_config", "tie_word_embeddings", "attention_bias", "hidden_act"),
        without(PUBLISHED, "swiglu_limit", "rms_norm_eps"),
        PUBLISHED | {"swiglu_alpha": 1.702},
        PUBLISHED | {"unknown_key": {"anything": [1, 2]}},
        without(ORIGINAL, "eos_token_id") | {"eos_token_id": [200002]},
        without(ORIGINAL, "swiglu_limit") | {"eos_token_id": 200002},
    ],
)
def test_every_spelling_reads_the_same(spelling):
    assert ModelConfig.from_dict(spelling) == ModelConfig.from_dict(PUBLISHED)


def test_original_layout_ends_at_the_harmony_tokens():
    assert ModelConfig.from_dict(ORIGINAL).eos_token_ids == (200002, 199999, 200012)
    assert ModelConfig.from_dict(ORIGINAL | {"vocab_size": 512}).eos_token_ids == ()


def test_plain_rope_is_factor_one():
    plain = without(PUBLISHED, "rope_scaling") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert ModelConfig.from_dict(plain).rope.factor == 1.0
    assert ModelConfig.from_dict(plain).rope.theta == 1e4


def test_truncate_is_true_where_hugging_face_leaves_it_out():
    scaling = without(YARN, "truncate")
    assert ModelConfig.from_dict(PUBLISHED | {"rope_scaling": scaling}).rope.truncate is True


def test_a_model_of_full_layers_needs_no_window():
    config = ModelConfig.from_dict(PUBLISHED | {"layer_types": ["full_attention"] * 24, "sliding_window": None})
    assert config.sliding_window is None
    assert config.window(0) is None


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
@pytest.mark.parametrize("changes", [{}, {"rope": RopeConfig(1e4, original_max_position_embeddings=131072)}])
def test_written_configs_read_back(layout, changes):
    if layout == "original":
        changes = {}
    config = checkpoints.small_config(eos_token_ids=(127,), **changes)
    data = json.loads(json.dumps(config_json(config, layout) | {"eos_token_id": 127}))
    assert ModelConfig.from_dict(data) == config


def test_generation_config_names_the_ends(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (200002,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [200002, 199999, 200012, 199999]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (200002, 199999, 200012)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 199998}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (200002,)


def test_the_original_folder_finds_generation_config_above(tmp_path):
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert ModelConfig.from_folder(folder).eos_token_ids == (7,)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        ModelConfig.from_dict(PUBLISHED).hidden_size = 1


def rope(**changes):
    return {"rope_scaling": YARN | changes}


# (changes to the published config, the key that the message must name). None as change set: the key is
# removed.
WRONG_VALUES = [
    ({"model_type": "llama"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["gpt_oss"]}, "model_type"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
    ({"attention_bias": False}, "attention_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method"),
    ({"quantization_config": "mxfp4"}, "quantization_config"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 24.0}, "num_hidden_layers"),
    ({"num_hidden_layers": "24"}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ({"num_hidden_layers": 23}, "layer_types"),
    ({"hidden_size": 2881}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": 2**40}, "hidden_size"),
    ({"intermediate_size": 100}, "intermediate_size"),
    ({"intermediate_size": [2880]}, "intermediate_size"),
    ({"intermediate_size": -2880}, "intermediate_size"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 2**63}, "vocab_size"),
    ({"vocab_size": False}, "vocab_size"),
    ({"num_local_experts": 0}, "num_local_experts"),
    ({"num_local_experts": {"n": 32}}, "num_local_experts"),
    ({"num_experts": 64}, "num_experts"),
    ({"num_experts_per_tok": 33, "experts_per_token": 33}, "experts_per_token"),
    ({"num_experts_per_tok": 2}, "experts_per_token"),
    ({"num_experts_per_tok": 0, "experts_per_token": 0}, "num_experts_per_tok"),
    ({"num_attention_heads": 65}, "num_key_value_heads"),
    ({"num_attention_heads": 1e2}, "num_attention_heads"),
    ({"num_key_value_heads": 7}, "num_key_value_heads"),
    ({"num_key_value_heads": 128}, "num_key_value_heads"),
    ({"num_key_value_heads": None}, "num_key_value_heads"),
    ({"head_dim": 63}, "head_dim"),
    ({"head_dim": 0}, "head_dim"),
    ({"head_dim": 1 << 20}, "head_dim"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"sliding_window": None}, "sliding_window"),
    ({"sliding_window": -128}, "sliding_window"),
    ({"sliding_window": 128.5}, "sliding_window"),
    ({"layer_types": "sliding_attention"}, "layer_types"),
    ({"layer_types": []}, "layer_types"),
    ({"layer_types": ["full_attention"] * 25}, "layer_types"),
    ({"layer_types": ["full_attention"] * 23 + ["linear_attention"]}, "layer_types[23]"),
    ({"layer_types": ["full_attention"] * 23 + [["full_attention"]]}, "layer_types[23]"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"max_position_embeddings": 2**31}, "max_position_embeddings"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rms_norm_eps": True}, "rms_norm_eps"),
    ({"swiglu_limit": -7.0}, "swiglu_limit"),
    ({"swiglu_limit": [7.0]}, "swiglu_limit"),
    ({"swiglu_alpha": 0.0}, "swiglu_alpha"),
    ({"swiglu_alpha": 10**400}, "swiglu_alpha"),
    ({"rope_scaling": None}, "rope_parameters"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": [YARN]}, "rope_scaling"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": 1.0}, "rope_theta"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": "150000"}, "rope_theta"),
    ({"rope_parameters": YARN | {"factor": 16.0}}, "rope_scaling"),
    (rope(rope_type="llama3"), "rope_scaling.rope_type"),
    (rope(rope_type=None), "rope_scaling.rope_type"),
    (rope(rope_type=3), "rope_scaling.rope_type"),
    (rope(factor=0.5), "rope_scaling.factor"),
    (rope(factor=None), "rope_scaling.factor"),
    (rope(factor=True), "rope_scaling.factor"),
    (rope(original_max_position_embeddings=None), "rope_scaling.original_max_position_embeddings"),
    (rope(original_max_position_embeddings=4096.5), "rope_scaling.original_max_position_embeddings"),
    (rope(beta_fast=0.5), "rope_scaling.beta_fast"),
    (rope(beta_slow=-1), "rope_scaling.beta_slow"),
    (rope(truncate=0), "rope_scaling.truncate"),
    (rope(truncate="false"), "rope_scaling.truncate"),
    (rope(attention_factor=2.0), "rope_scaling.attention_factor"),
    (rope(mscale=0.7, mscale_all_dim=0.7), "rope_scaling.mscale"),
    (rope(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor"),
    ({"eos_token_id": -1}, "eos_token_id"),
    ({"eos_token_id": 201088}, "eos_token_id"),
    ({"eos_token_id": "<|return|>"}, "eos_token_id"),
    ({"eos_token_id": [200002, True]}, "eos_token_id"),
    ({"eos_token_id": {"id": 1}}, "eos_token_id"),
    ({"hidden_size": 1 << 20, "intermediate_size": 1 << 20, "num_local_experts": 1 << 16}, "hidden_size"),
]
REQUIRED = [
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_local_experts",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "max_position_embeddings",
    "rope_theta",
]
REQUIRED_ORIGINAL = without(ORIGINAL, "swiglu_limit", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")


@pytest.mark.parametrize(("changes", "key"), WRONG_VALUES, ids=lambda value: str(value)[:60])
def test_wrong_values_are_refused(tmp_path, changes, key):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED | changes))
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_folder(tmp_path)
    assert_clear(problem, str(path), key)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys_are_refused(key):
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_dict(without(PUBLISHED, key), "here/config.json")
    assert_clear(problem, "here/config.json", key, "missing")


@pytest.mark.parametrize("key", REQUIRED_ORIGINAL)
def test_missing_original_keys_are_refused(key):
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_dict(without(ORIGINAL, key), "original/config.json")
    assert_clear(problem, "original/config.json", key, "missing")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_scaling_factor": 0}, "rope_scaling_factor"),
        ({"rope_ntk_alpha": 64}, "rope_ntk_beta"),
        ({"rope_ntk_beta": None}, "rope_ntk_beta"),
        ({"initial_context_length": 2**31 - 1}, "initial_context_length"),
        ({"num_experts": "32"}, "num_experts"),
    ],
)
def test_wrong_original_values_are_refused(changes, key):
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_dict(ORIGINAL | changes, "original/config.json")
    assert_clear(problem, key)


WRONG_JSON = {
    "empty": b"",
    "blank": b"  \n",
    "cut off": b'{"eos_token_id": 1, "model_ty',
    "followed by more": b'{"eos_token_id": 1}{}',
    "an array": b"[1, 2]",
    "a string": b'"gpt_oss"',
    "a number": b"42",
    "null": b"null",
    "true": b"true",
    "not JSON": b"hidden_size: 2880",
    "single quotes": b"{'model_type': 'gpt_oss'}",
    "a trailing comma": b'{"model_type": "gpt_oss",}',
    "a comment": b'{"model_type": "gpt_oss"} // gpt-oss',
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"eos_token_id": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"eos_token_id": 1}',
    "binary": bytes(range(256)),
    "NaN": b'{"eos_token_id": NaN}',
    "Infinity": b'{"eos_token_id": Infinity}',
    "an overflowing number": b'{"model_type": "gpt_oss", "eos_token_id": 1e999, "num_attention_heads": 1e999}',
    "a number of 5000 digits": b'{"eos_token_id": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"model_type": "gpt_oss", "model_type": "gpt_oss"}',
    "a key twice inside": b'{"model_type": "gpt_oss", "rope_scaling": {"factor": 1, "factor": 32}}',
    "nested objects": b'{"a":' * 100_000,
    "nested arrays": b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("content", WRONG_JSON.values(), ids=WRONG_JSON.keys())
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_wrong_json_is_refused(tmp_path, name, content):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_folder(tmp_path)
    assert_clear(problem, str(tmp_path / name))


def test_missing_unreadable_and_oversized_files(tmp_path):
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_folder(tmp_path)
    assert_clear(problem, "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_folder(tmp_path)
    assert_clear(problem, "config.json")
    big = tmp_path / "big"
    big.mkdir()
    with (big / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_folder(big)
    assert_clear(problem, "config.json", "larger")


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_from_dict_wants_a_mapping(data):
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(data, "somewhere")


def test_messages_do_not_repeat_a_flood():
    with pytest.raises(ConfigError) as problem:
        ModelConfig.from_dict(PUBLISHED | {"hidden_act": "x" * 100_000})
    assert_clear(problem, "hidden_act")
