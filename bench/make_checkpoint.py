"""Write a checkpoint of random weights at true shapes, in any layout, to load, run and time.

    python bench/make_checkpoint.py --size 20b OUT
    python bench/make_checkpoint.py --size 120b --layers 2 --layout original OUT
    python bench/make_checkpoint.py --size 20b --gguf OUT.gguf OUT

The statistics are those of a freshly initialised network: activations stay near 1, logits near a standard
deviation of 2, the router's choices vary. The same seed gives the same weights in every layout. Bytes come
from pools of random numbers that are walked from a different place for every tensor, because drawing 13 GB of
fresh ones would take ten times as long as writing them; a pool's length is prime, so no two rows of a matrix
are the same. Memory stays under 400 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from mxmoe.checkpoint import TENSOR_NAMES, is_packed, weight_shapes
from mxmoe.config import ModelConfig, RopeConfig
from mxmoe.reference.ops import E2M1_VALUES

YARN = RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, False)
EOS = (200002, 199999, 200012)
HARMONY_IDS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}

BIG = ModelConfig(
    num_hidden_layers=24,
    hidden_size=2880,
    intermediate_size=2880,
    num_experts=32,
    experts_per_token=4,
    vocab_size=201088,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    sliding_window=128,
    layer_types=("sliding_attention", "full_attention") * 12,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=YARN,
    eos_token_ids=EOS,
)
SMALL = ModelConfig(
    num_hidden_layers=4,
    hidden_size=96,
    intermediate_size=160,
    num_experts=8,
    experts_per_token=4,
    vocab_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=16,
    layer_types=("sliding_attention", "full_attention") * 2,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=YARN,
    eos_token_ids=(511,),
)
_ALTERNATING = ("sliding_attention", "full_attention")
BIGGEST = replace(BIG, num_hidden_layers=36, num_experts=128, layer_types=_ALTERNATING * 18)
SIZES = {"tiny": SMALL, "20b": BIG, "120b": BIGGEST}
LAYOUTS = tuple(TENSOR_NAMES)

# Primes: a walk of any stride through a pool comes back to its start only after the whole pool.
_SMALL_POOL, _BIG_POOL = 65537, 4194301
# e2m1 values of uniformly random codes have this root mean square.
_E2M1_RMS = float(np.sqrt(np.mean(E2M1_VALUES**2)))


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its name, its dtype in safetensors' words, its shape, its bytes in pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Any]]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return int(np.prod(self.shape, dtype=object)) * (2 if self.dtype == "BF16" else 1)


class Weights:
    """Random weights of a model, generated in pieces and the same at every call.

    Parameters
    ----------
    config : ModelConfig
    seed : int
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.shapes = weight_shapes(config)
        largest = max(int(np.prod(shape, dtype=object)) for shape in self.shapes.values())
        rng = np.random.default_rng(seed)
        self._length = _BIG_POOL if largest > 1 << 22 else _SMALL_POOL
        self._normal = rng.standard_normal(self._length, dtype=np.float32)
        self._bytes = rng.integers(0, 256, self._length, dtype=np.uint8)
        self._offsets = rng.integers(-1, 2, self._length, dtype=np.int8)
        self._pools: dict[tuple[float, float] | int, NDArray[Any]] = {}

    def _pool(self, name: str) -> NDArray[Any]:
        if name.endswith("_blocks"):
            return self._bytes
        columns = self.shapes[name][-1]
        key: tuple[float, float] | int
        if name.endswith("_scales"):
            # The power of two that brings the weights nearest to unit gain, and its two neighbours.
            key = 127 - round(np.log2(_E2M1_RMS * np.sqrt(32 * columns)))
            if key not in self._pools:
                self._pools[key] = (self._offsets + np.int16(key)).astype(np.uint8)
            return self._pools[key]
        mean, std = 0.0, 1.0 / float(np.sqrt(columns))
        if "norm" in name:
            mean, std = 1.0, 0.1
        elif name.endswith("_bias"):
            std = 0.1
        elif name in ("embed_tokens", "sinks"):
            std = 1.0
        elif name in ("router_weight", "lm_head"):
            std *= 2.0
        key = (mean, std)
        if key not in self._pools:
            self._pools[key] = (self._normal * np.float32(std) + np.float32(mean)).astype(ml_dtypes.bfloat16)
        return self._pools[key]

    def pieces(self, name: str, layer: int, start: int = 0, count: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield elements `start` to `start + count` (all by default) of a weight, flat and in order."""
        pool = self._pool(name)
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), layer])
        left = int(np.prod(self.shapes[name], dtype=object)) if count is None else count
        at = (int(rng.integers(self._length)) + start) % self._length
        while left:
            piece = pool[at : at + left]
            yield piece
            left, at = left - piece.size, 0

    def expert(self, name: str, layer: int, e: int) -> NDArray[Any]:
        """Decode expert `e` of "gate_up" or "down" as bfloat16 (K, N), the input dimension first."""
        parts = []
        for stored in (f"{name}_blocks", f"{name}_scales"):
            shape = self.shapes[stored][1:]
            size = int(np.prod(shape))
            parts.append(np.concatenate(list(self.pieces(stored, layer, e * size, size))).reshape(shape))
        codes = np.arange(256)
        pairs = E2M1_VALUES[np.stack([codes & 15, codes >> 4], axis=1)].astype(np.float32)
        scale = np.ldexp(np.float32(1), parts[1].astype(np.int32) - 127)
        values = pairs[parts[0]] * scale[..., None, None]
        rows = values.astype(ml_dtypes.bfloat16).reshape(parts[0].shape[0], -1)
        return np.ascontiguousarray(rows.T)

    def tensor(self, name: str, template: str, layer: int) -> Tensor:
        """Describe one stored weight."""

        def pieces() -> Iterator[Any]:
            if name in ("gate_up", "down"):
                for e in range(self.config.num_experts):
                    yield self.expert(name, layer, e)
            elif name in ("qkv_weight", "qkv_bias"):
                for part in "qkv":
                    yield from self.pieces(f"{part}_proj_{name[4:]}", layer)
            else:
                yield from self.pieces(name, layer)

        dtype = "U8" if is_packed(name) else "BF16"
        return Tensor(template.format(layer), dtype, self.shapes[name], pieces)

    def tensors(self, layout: str) -> Iterator[Tensor]:
        """Describe every tensor of a checkpoint, layer by layer."""
        names = TENSOR_NAMES[layout]  # type: ignore[index]
        for layer in range(self.config.num_hidden_layers):
            yield from (self.tensor(name, t, layer) for name, t in names.items() if "{}" in t)
        yield from (self.tensor(name, t, 0) for name, t in names.items() if "{}" not in t)


def write_shard(file: BinaryIO, tensors: list[Tensor]) -> None:
    """Write one safetensors file, holding one piece of one tensor in memory at a time."""
    # Two-byte values first, as the library orders them, so that everything stays aligned.
    tensors = sorted(tensors, key=lambda tensor: (tensor.dtype != "BF16", tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for piece in tensor.pieces():
            file.write(np.ascontiguousarray(piece).view(np.uint8).data)


def config_json(config: ModelConfig, layout: str) -> dict[str, Any]:
    """Return ``config.json`` with the keys that the published checkpoints of this layout have."""
    sizes = (
        "num_hidden_layers hidden_size intermediate_size experts_per_token vocab_size num_attention_heads "
        "num_key_value_heads head_dim sliding_window swiglu_limit"
    )
    common = {key: getattr(config, key) for key in sizes.split()}
    rope = config.rope
    if layout == "original":
        return common | {
            "num_experts": config.num_experts,
            "initial_context_length": rope.original_max_position_embeddings,
            "rope_theta": rope.theta,
            "rope_scaling_factor": rope.factor,
            "rope_ntk_alpha": rope.beta_slow,
            "rope_ntk_beta": rope.beta_fast,
        }
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope.factor > 1.0:
        scaling = {key: value for key, value in vars(rope).items() if key != "theta"} | {"rope_type": "yarn"}
    result = common | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "layer_types": list(config.layer_types),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "swiglu_alpha": config.swiglu_alpha,
        "rope_parameters": scaling | {"rope_theta": rope.theta},
        "attention_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
    }
    if layout == "huggingface":
        result["quantization_config"] = {"quant_method": "mxfp4"}
    return result


def write_checkpoint(
    out: Path,
    config: ModelConfig,
    *,
    layout: str = "huggingface",
    seed: int = 0,
    shard_bytes: int = 4 << 30,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a whole checkpoint.

    Parameters
    ----------
    out : Path
        The folder; made if needed, and must not hold a checkpoint yet.
    config : ModelConfig
    layout : {"huggingface", "original", "huggingface-bf16"}
    seed : int
    shard_bytes : int
        A new shard begins when the next tensor would take the current one past this; one shard needs no
        index.
    report : callable
        Told about every file.
    """
    if any(out.glob("*.safetensors*")) or (out / "config.json").exists():
        raise FileExistsError(f"{out} already holds a checkpoint; remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    shards: list[list[Tensor]] = [[]]
    sizes = [0]
    for tensor in Weights(config, seed).tensors(layout):
        if shards[-1] and sizes[-1] + tensor.nbytes > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tensor)
        sizes[-1] += tensor.nbytes
    if sum(sizes) > shutil.disk_usage(out).free:
        raise OSError(f"{out} has {shutil.disk_usage(out).free} bytes free, the checkpoint takes {sum(sizes)}")
    dash = "--" if layout == "original" else "-"
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model{dash}{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        with (out / name).open("wb") as file:
            write_shard(file, shard)
        weight_map |= {tensor.name: name for tensor in shard}
        report(f"{out / name}  {sizes[i - 1] / 2**30:.2f} GiB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", index)
    if layout != "original":
        _write_json(out / "generation_config.json", {"eos_token_id": list(config.eos_token_ids)})
    _write_json(out / "config.json", config_json(config, layout))


def byte_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """Make a tokenizer for random weights: every byte of a text is a token, every other id a made-up word.

    The harmony format's special tokens have their published ids where the vocabulary is gpt-oss's, else the last
    ones, ``<|return|>`` the very last.
    """
    special = HARMONY_IDS
    if vocab_size != BIG.vocab_size:
        names = [*(name for name in HARMONY_IDS if name != "<|return|>"), "<|return|>"]
        special = {name: vocab_size - len(names) + i for i, name in enumerate(names)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"vocab_size is {vocab_size}; wanted at least {len(alphabet) + len(special)}")
    spelling = dict(zip(special.values(), special, strict=True)) | dict(enumerate(alphabet))
    vocab = {spelling.get(i, f"\u0120w{i}"): i for i in range(vocab_size)}
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="shapes (default: tiny)")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--layout", choices=LAYOUTS, default="huggingface", help="default: huggingface")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--shard-gib", type=float, default=4.0, metavar="G", help="largest shard (default: 4)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json to copy in (default: one that spells bytes)"
    )
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="also write the same weights as GGUF (needs the gguf package)"
    )
    parser.add_argument(
        "--gguf-dense", choices=("q8_0", "bf16"), default="q8_0", help="its dense weights (default: q8_0)"
    )
    args = parser.parse_args()
    config = SIZES[args.size]
    if args.layers is not None:
        if not 1 <= args.layers <= config.num_hidden_layers:
            parser.error(f"--layers is {args.layers}, expected 1 to {config.num_hidden_layers}")
        types = config.layer_types[: args.layers]
        config = replace(config, num_hidden_layers=args.layers, layer_types=types)
    if args.tokenizer is not None and not args.tokenizer.is_file():
        parser.error(f"--tokenizer: {args.tokenizer} is not a file")
    try:
        shard_bytes = int(args.shard_gib * 2**30)
        write_checkpoint(args.out, config, layout=args.layout, seed=args.seed, shard_bytes=shard_bytes, report=print)
        if args.tokenizer is not None:
            shutil.copyfile(args.tokenizer, args.out / "tokenizer.json")
        else:
            byte_tokenizer(config.vocab_size).save(str(args.out / "tokenizer.json"), pretty=False)
        if args.gguf is not None:
            from gguf_file import write_gguf

            tokenizer = args.out / "tokenizer.json"
            write_gguf(args.gguf, config, tokenizer, seed=args.seed, dense=args.gguf_dense, report=print)
    except (OSError, ImportError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
