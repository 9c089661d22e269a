"""The random weights of `make_checkpoint` as one GGUF file, which llama.cpp and its kin read.

Experts stay MXFP4 with exactly the same values, in the file format's own order: 17 bytes for 32 values, the scale
first, then byte j with value j in its low nibble and value j + 16 in its high one; gate and up rows, which alternate
in the checkpoint, in two tensors. Dense weights are bf16, or Q8_0: 32 int8 values and, as a float16 scale, their
largest magnitude over 127. Vectors and the router are float32.

The layout follows the GGUF specification and what llama.cpp's loader of the architecture "gpt-oss" asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from make_checkpoint import Weights
from mxmoe.config import ModelConfig

__all__ = ["DENSE", "from_gguf_blocks", "to_gguf_blocks", "write_gguf"]

DENSE = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "bf16": gguf.GGMLQuantizationType.BF16}
_FLOAT32, _MXFP4 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.MXFP4
_BLOCK = 32
# Values converted at a time: 16 MB of float32.
_CHUNK = 1 << 22

# Name in the file -> name in the checkpoint. Of a whole model, then of a layer.
_DENSE_OUTSIDE = {"token_embd.weight": "embed_tokens", "output.weight": "lm_head"}
_DENSE_LAYER = {
    "attn_q.weight": "q_proj_weight",
    "attn_k.weight": "k_proj_weight",
    "attn_v.weight": "v_proj_weight",
    "attn_output.weight": "o_proj_weight",
}
_FLOAT32_LAYER = {
    "attn_norm.weight": "input_layernorm",
    "post_attention_norm.weight": "post_attention_layernorm",
    "attn_q.bias": "q_proj_bias",
    "attn_k.bias": "k_proj_bias",
    "attn_v.bias": "v_proj_bias",
    "attn_output.bias": "o_proj_bias",
    "attn_sinks.weight": "sinks",
    "ffn_gate_inp.weight": "router_weight",
    "ffn_gate_inp.bias": "router_bias",
    "ffn_down_exps.bias": "down_bias",
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: rows of values, the fastest axis last, and its bytes in pieces."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    pieces: Callable[[], Iterator[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape, dtype=object)) // values * size


def to_gguf_blocks(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put MXFP4 blocks (..., 16), low nibble first, in the file's order: (..., 17), scale first."""
    low, high = blocks & 15, blocks >> 4
    codes = np.stack([low, high], axis=-1).reshape(*blocks.shape[:-1], _BLOCK)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([scales[..., None], packed], axis=-1)


def from_gguf_blocks(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Undo `to_gguf_blocks`: blocks (..., 16) and scales (...)."""
    codes = np.concatenate([packed[..., 1:] & 15, packed[..., 1:] >> 4], axis=-1)
    return codes[..., 0::2] | codes[..., 1::2] << 4, packed[..., 0]


class _File:
    """The tensors of a file, made of the weights piece by piece."""

    def __init__(self, config: ModelConfig, seed: int, dense: str) -> None:
        self.config, self.weights, self.dense = config, Weights(config, seed), DENSE[dense]

    def _values(self, name: str, layer: int, kind: gguf.GGMLQuantizationType) -> _Tensor:
        """Describe a tensor that holds the same values in another dtype."""
        shape = self.weights.shapes[name]
        if kind == gguf.GGMLQuantizationType.Q8_0 and shape[-1] % _BLOCK:
            kind = gguf.GGMLQuantizationType.BF16  # which no block divides
        size = int(np.prod(shape, dtype=object))

        def pieces() -> Iterator[NDArray[Any]]:
            # Whole rows, and with them whole blocks.
            step = max(1, _CHUNK // shape[-1]) * shape[-1]
            for start in range(0, size, step):
                parts = self.weights.pieces(name, layer, start, min(step, size - start))
                values = np.concatenate(list(parts)).astype(np.float32)
                yield gguf.quants.quantize(values.reshape(-1, shape[-1]), kind)

        return _Tensor("", shape, kind, pieces)

    def _half_bias(self, layer: int, odd: int) -> _Tensor:
        """Describe the biases of the even (gate) or odd (up) rows of gate_up."""
        experts, rows = self.weights.shapes["gate_up_bias"]

        def pieces() -> Iterator[NDArray[Any]]:
            values = np.concatenate(list(self.weights.pieces("gate_up_bias", layer))).astype(np.float32)
            yield np.ascontiguousarray(values.reshape(experts, rows)[:, odd::2])

        return _Tensor("", (experts, rows // 2), _FLOAT32, pieces)

    def _experts(self, name: str, layer: int, rows: slice) -> _Tensor:
        """Describe some rows of every expert's matrix."""
        experts, height, blocks, _ = self.weights.shapes[f"{name}_blocks"]
        chosen = len(range(height)[rows])

        def stored(kind: str, e: int) -> NDArray[np.uint8]:
            shape = self.weights.shapes[f"{name}_{kind}"][1:]
            size = int(np.prod(shape))
            parts = self.weights.pieces(f"{name}_{kind}", layer, e * size, size)
            return np.concatenate(list(parts)).reshape(shape)[rows]

        def pieces() -> Iterator[NDArray[Any]]:
            for e in range(experts):
                yield to_gguf_blocks(stored("blocks", e), stored("scales", e))

        return _Tensor("", (experts, chosen, blocks * _BLOCK), _MXFP4, pieces)

    def tensors(self) -> Iterator[_Tensor]:
        """Yield every tensor with its name."""

        def named(name: str, tensor: _Tensor) -> _Tensor:
            return _Tensor(name, tensor.shape, tensor.kind, tensor.pieces)

        for name, source in _DENSE_OUTSIDE.items():
            yield named(name, self._values(source, 0, self.dense))
        yield named("output_norm.weight", self._values("norm", 0, _FLOAT32))
        for i in range(self.config.num_hidden_layers):
            for name, source in _DENSE_LAYER.items():
                yield named(f"blk.{i}.{name}", self._values(source, i, self.dense))
            for name, source in _FLOAT32_LAYER.items():
                yield named(f"blk.{i}.{name}", self._values(source, i, _FLOAT32))
            for odd, half in enumerate(("gate", "up")):
                yield named(f"blk.{i}.ffn_{half}_exps.bias", self._half_bias(i, odd))
                rows = slice(odd, None, 2)
                yield named(f"blk.{i}.ffn_{half}_exps.weight", self._experts("gate_up", i, rows))
            yield named(f"blk.{i}.ffn_down_exps.weight", self._experts("down", i, slice(None)))


def _write_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    rope = config.rope
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(rope.theta)
    if rope.factor > 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: ModelConfig) -> None:
    """Write byte-level BPE from the contents of a tokenizer.json."""
    spelled: dict[int, str] = {id_: token for token, id_ in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    spelled |= special
    tokens = [spelled.get(i, f"<|unused_{i}|>") for i in range(config.vocab_size)]
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL if i in spelled else gguf.TokenType.UNUSED
        for i in range(config.vocab_size)
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # Readers ask for a list, and the format has no empty one: this pair never stands side by side in a text.
    writer.add_token_merges(merges or [f"{tokens[-1]} {tokens[-2]}"])
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_add_bos_token(False)


def write_gguf(
    path: Path,
    config: ModelConfig,
    tokenizer: Path,
    *,
    seed: int = 0,
    dense: str = "q8_0",
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the weights that `write_checkpoint` writes for the same configuration and seed.

    Parameters
    ----------
    path : Path
        The file; must not exist yet.
    config : ModelConfig
        Layers must alternate as gpt-oss's do, a sliding one first: the format does not say otherwise.
    tokenizer : Path
        ``tokenizer.json``.
    seed : int
    dense : {"q8_0", "bf16"}
        Attention projections, embedding and lm_head.
    report : callable
        Told about the file.
    """
    alternating = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(config.num_hidden_layers))
    if config.layer_types != alternating:
        raise ValueError(f"layer_types is {config.layer_types}; GGUF's gpt-oss alternates, a sliding layer first")
    if dense not in DENSE:
        raise ValueError(f"dense is {dense!r}; wanted {' or '.join(map(repr, DENSE))}")
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS])
    writer.add_name(f"random weights, seed {seed}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_config(writer, config)
    _write_tokenizer(writer, json.loads(tokenizer.read_text()), config)
    tensors = list(_File(config, seed, dense).tensors())
    for tensor in tensors:
        # A float dtype tells the writer that the shape counts values, not bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for tensor in tensors:
        for piece in tensor.pieces():
            piece.tofile(file)
        writer.write_padding(file, tensor.nbytes)
    writer.close()
    report(f"{path}  {path.stat().st_size / 2**30:.2f} GiB")
