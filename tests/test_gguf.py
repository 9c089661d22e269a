"""The GGUF file that bench/make_checkpoint.py writes holds the weights of the checkpoint beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mxmoe
from checkpoints import small_config, write
from compare import assert_exact
from make_checkpoint import byte_tokenizer
from mxmoe.reference import ops as reference

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
# isort: split
from gguf_file import from_gguf_blocks, to_gguf_blocks, write_gguf  # noqa: E402

# 2880 in small: sizes that are no power of two; one projection whose input no block of 32 divides.
CONFIG = small_config(
    num_hidden_layers=3, hidden_size=96, vocab_size=300, num_attention_heads=6, head_dim=24, eos_token_ids=(299,)
)


@pytest.fixture(scope="module", params=["q8_0", "bf16"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    """A checkpoint, the reader of its GGUF twin, and how the dense weights are held there."""
    folder = write(tmp_path_factory.mktemp("gguf") / "m", config=CONFIG, seed=3)
    byte_tokenizer(CONFIG.vocab_size).save(str(folder / "tokenizer.json"))
    path = folder / "m.gguf"
    write_gguf(path, CONFIG, folder / "tokenizer.json", seed=3, dense=request.param)
    return mxmoe.Checkpoint.open(folder), gguf.GGUFReader(path), request.param


def values(reader: Any, name: str) -> Any:
    tensor = next(t for t in reader.tensors if t.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def kind(reader: Any, name: str) -> str:
    return str(next(t for t in reader.tensors if t.name == name).tensor_type.name)


def test_blocks_come_back() -> None:
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (5, 7, 16), np.uint8), rng.integers(0, 255, (5, 7), np.uint8)
    packed = to_gguf_blocks(blocks, scales)
    again, scales_again = from_gguf_blocks(packed)
    assert_exact(again, blocks)
    assert_exact(scales_again, scales)
    # Value 0 is the low nibble of the first byte after the scale, value 16 the high one.
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(5, 7, 32)
    assert_exact(packed[..., 1], codes[..., 0] | codes[..., 16] << 4)
    assert_exact(packed[..., 0], scales)


def test_experts_are_exactly_the_same(written: tuple[Any, Any, str]) -> None:
    checkpoint, reader, _ = written
    for i in range(CONFIG.num_hidden_layers):
        layer = checkpoint.layer(i)
        gate_up = reference.mxfp4_dequantize(layer.gate_up_blocks, layer.gate_up_scales).astype(np.float32)
        down = reference.mxfp4_dequantize(layer.down_blocks, layer.down_scales).astype(np.float32)
        want = {"gate": gate_up[:, 0::2], "up": gate_up[:, 1::2], "down": down}
        bias = layer.gate_up_bias.astype(np.float32)
        biases = {"gate": bias[:, 0::2], "up": bias[:, 1::2], "down": layer.down_bias.astype(np.float32)}
        for half in want:
            name = f"blk.{i}.ffn_{half}_exps"
            assert kind(reader, f"{name}.weight") == "MXFP4"
            # Adding 0 makes one zero of the two: the package decodes to integers first, which have but one.
            assert_exact(values(reader, f"{name}.weight"), want[half] + np.float32(0))
            assert_exact(values(reader, f"{name}.bias"), biases[half])


def test_the_rest_is_the_same_or_as_near_as_q8_0(written: tuple[Any, Any, str]) -> None:
    checkpoint, reader, dense = written
    names = {"token_embd.weight": checkpoint.embed_tokens, "output.weight": checkpoint.lm_head}
    exact = {"output_norm.weight": checkpoint.norm}
    for i in range(CONFIG.num_hidden_layers):
        layer = checkpoint.layer(i)
        for ours, theirs in {
            "q_proj": "attn_q",
            "k_proj": "attn_k",
            "v_proj": "attn_v",
            "o_proj": "attn_output",
        }.items():
            names[f"blk.{i}.{theirs}.weight"] = getattr(layer, f"{ours}_weight")
            exact[f"blk.{i}.{theirs}.bias"] = getattr(layer, f"{ours}_bias")
        exact |= {
            f"blk.{i}.attn_norm.weight": layer.input_layernorm,
            f"blk.{i}.post_attention_norm.weight": layer.post_attention_layernorm,
            f"blk.{i}.attn_sinks.weight": layer.sinks,
            f"blk.{i}.ffn_gate_inp.weight": layer.router_weight,
            f"blk.{i}.ffn_gate_inp.bias": layer.router_bias,
        }
    for name, want in exact.items():
        assert kind(reader, name) == "F32"
        assert_exact(values(reader, name), want.astype(np.float32))
    for name, weight in names.items():
        got, want = values(reader, name).astype(np.float64), weight.astype(np.float64)
        assert got.shape == want.shape
        if dense == "bf16" or want.shape[1] % 32:
            assert kind(reader, name) == "BF16" and (got == want).all()
            continue
        assert kind(reader, name) == "Q8_0"
        blocks = np.abs(want).reshape(want.shape[0], -1, 32).max(axis=-1)
        # Half a step, and float16's rounding of the step 127 times over.
        limit = blocks * (0.5 / 127 + 2.0**-11) * 1.01
        assert (np.abs(got - want).reshape(*blocks.shape, 32) <= limit[..., None]).all()
    assert len(reader.tensors) == len(names) + len(exact) + 6 * CONFIG.num_hidden_layers


def test_metadata(written: tuple[Any, Any, str]) -> None:
    _, reader, _ = written
    fields = {name: field.contents() for name, field in reader.fields.items()}
    want = {
        "general.architecture": "gpt-oss",
        "gpt-oss.block_count": 3,
        "gpt-oss.embedding_length": 96,
        "gpt-oss.expert_count": CONFIG.num_experts,
        "gpt-oss.expert_used_count": CONFIG.experts_per_token,
        "gpt-oss.expert_feed_forward_length": CONFIG.intermediate_size,
        "gpt-oss.attention.head_count": 6,
        "gpt-oss.attention.head_count_kv": CONFIG.num_key_value_heads,
        "gpt-oss.attention.key_length": 24,
        "gpt-oss.attention.sliding_window": CONFIG.sliding_window,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": 32.0,
        "gpt-oss.rope.scaling.original_context_length": 4096,
        "gpt-oss.rope.freq_base": 150000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.eos_token_id": 299,
    }
    assert {name: fields.get(name) for name in want} == want
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 300 and tokens[299] == "<|return|>"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("precious")
    with pytest.raises(FileExistsError, match=r"m\.gguf exists already"):
        write_gguf(tmp_path / "m.gguf", CONFIG, tmp_path / "tokenizer.json")
    assert (tmp_path / "m.gguf").read_text() == "precious"


def test_layers_that_do_not_alternate_are_refused(tmp_path: Path) -> None:
    config = small_config(layer_types=("full_attention", "sliding_attention"))
    with pytest.raises(ValueError, match="GGUF's gpt-oss alternates"):
        write_gguf(tmp_path / "m.gguf", config, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"dense is 'q4_0'; wanted 'q8_0' or 'bf16'"):
        write_gguf(tmp_path / "m.gguf", CONFIG, tmp_path / "tokenizer.json", dense="q4_0")
