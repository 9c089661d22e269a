"""The sizes and constants of a model, read from ``config.json`` and checked before anything uses them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["ConfigError", "ModelConfig", "RopeConfig", "read_json"]

LayerType = Literal["sliding_attention", "full_attention"]

# Ceilings far above any mixture-of-experts model there is: a size past them is a mistake or an attack, and
# with them every product of two sizes stays inside 64 bits.
_MAX_LAYERS = 4096
_MAX_WIDTH = 1 << 20
_MAX_EXPERTS = 1 << 16
_MAX_HEADS = 1 << 14
_MAX_VOCAB = 1 << 24
_MAX_POSITIONS = (1 << 31) - 1
# x86-64 and AArch64 processes address 2^47 bytes; a model past that cannot be mapped.
_MAX_MODEL_BYTES = 1 << 47
# A config or an index is text of some kilobytes, the index of a huge model a few megabytes.
_MAX_JSON_BYTES = 64 << 20

# The o200k_harmony ids at which generation ends: <|return|>, <|endoftext|>, <|call|>. OpenAI's original
# layout has no key for them and is always used with that vocabulary.
_HARMONY_EOS = (200002, 199999, 200012)

_MISSING = object()


class ConfigError(ValueError):
    """A configuration that is missing, malformed, or asks for something mxmoe does not do."""


def _shown(value: object) -> str:
    """Return `value` as it would stand in JSON, cut so that a hostile file cannot flood the message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: Path, error: type[ValueError] = ConfigError) -> dict[str, Any]:
    """Read a JSON object from a file that nobody vouches for.

    Parameters
    ----------
    path : Path
        The file; at most 64 MiB of UTF-8.
    error : type of ValueError, default ConfigError
        What to raise.

    Returns
    -------
    dict
        The object. Duplicate keys, NaN and infinities are rejected rather than resolved.

    Raises
    ------
    ConfigError
        (or `error`) when the file is missing, unreadable, too large, not JSON, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"key {_shown(twice)} stands twice")
        return result

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is not a JSON number")

    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        text = path.read_bytes().decode("utf-8")
        data = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except RecursionError:
        raise error(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as problem:
        raise error(f"{path}: not valid JSON ({problem})") from None
    if not isinstance(data, dict):
        raise error(f"{path}: holds {_shown(data)}, expected a JSON object")
    return data


class _Reader:
    """Takes checked values out of one JSON object; every refusal names the source and the key."""

    def __init__(self, data: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.data, self.source, self.prefix = data, source, prefix

    def fail(self, key: str, value: object, wanted: str) -> ConfigError:
        came = "missing" if value is _MISSING else _shown(value)
        return ConfigError(f"{self.source}: {self.prefix}{key} is {came}, expected {wanted}")

    def find(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """Return the first of `keys` that is present, with its value; synonyms must agree."""
        present = [key for key in keys if self.data.get(key) is not None]
        if not present:
            return keys[0], self.data.get(keys[0], _MISSING)
        first = present[0]
        for other in present[1:]:
            if self.data[other] != self.data[first]:
                raise self.fail(other, self.data[other], f"{_shown(self.data[first])} as in {first}")
        return first, self.data[first]

    def integer(self, *keys: str, low: int = 1, high: int, default: int | None = None) -> int:
        key, value = self.find(keys)
        if default is not None and (value is _MISSING or value is None):
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, *keys: str, low: float, high: float, default: float | None = None) -> float:
        key, value = self.find(keys)
        if default is not None and (value is _MISSING or value is None):
            return default
        # JSON integers may have thousands of digits, so compare before converting to float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.fail(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def only(self, key: str, wanted: object) -> None:
        """Refuse a feature of other models: `key` may be absent, else it must be `wanted`."""
        value = self.data.get(key)
        if value is not None and (value != wanted or isinstance(value, bool) != isinstance(wanted, bool)):
            raise self.fail(key, value, f"{_shown(wanted)}, the only one supported")

    def section(self, key: str) -> _Reader | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, value, "an object")
        return _Reader(value, self.source, f"{self.prefix}{key}.")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding with YaRN's scaling (arXiv 2309.00071).

    Attributes
    ----------
    theta : float
        Base of the geometric series of frequencies.
    factor : float
        How far the context was stretched; 1 is plain rotary embedding.
    original_max_position_embeddings : int
        Context length before stretching, in tokens.
    beta_fast, beta_slow : float
        Rotations over the original context above which a frequency is kept, and below which it is divided by
        `factor`; between them the two are blended.
    truncate : bool
        Whether the blend's ends are rounded outwards to whole dimensions.
    """

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that is not a weight.

    Attributes
    ----------
    num_hidden_layers, hidden_size, vocab_size : int
        Layers, width of the residual stream, rows of the embedding.
    intermediate_size, num_experts, experts_per_token : int
        Inner width of an expert, experts in a layer, experts a token visits.
    num_attention_heads, num_key_value_heads, head_dim : int
        Query heads, key/value heads (a divisor of the former), values a head.
    sliding_window : int or None
        Keys that a sliding layer sees, the query's own included; None only where no layer slides.
    layer_types : tuple of {"sliding_attention", "full_attention"}
        One for each layer.
    max_position_embeddings : int
        Longest context, in tokens.
    rms_norm_eps, swiglu_alpha, swiglu_limit : float
        Constants of the normalisation and of the experts' activation.
    rope : RopeConfig
        Rotary position embedding.
    eos_token_ids : tuple of int
        Tokens at which generation ends; empty where the checkpoint does not say.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None
    layer_types: tuple[LayerType, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    eos_token_ids: tuple[int, ...] = ()

    @property
    def sm_scale(self) -> float:
        """Factor of the attention scores, ``head_dim ** -0.5``."""
        return float(self.head_dim**-0.5)

    def window(self, layer: int) -> int | None:
        """Return the sliding window of `layer` in keys, or None where the layer sees the whole context."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read and check a configuration in any of its three spellings.

        Parameters
        ----------
        data : mapping
            ``config.json`` of Hugging Face (``rope_parameters``, or the older ``rope_scaling`` with
            ``rope_theta``) or of OpenAI's original layout.
        source : str
            Where `data` came from, for messages.

        Returns
        -------
        ModelConfig

        Raises
        ------
        ConfigError
            When a key is missing, of the wrong type, out of range, contradicts another, or asks for something
            that gpt-oss does not have.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: holds {_shown(data)}, expected a JSON object")
        reader = _Reader(data, source)
        # OpenAI's keys for the rotary embedding exist nowhere else; Hugging Face's always name the model
        # type.
        original = "model_type" not in data and any(
            key in data for key in ("rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")
        )
        # Both spellings are read from either; the layout's own comes first, as it is the one that messages
        # name.
        experts, per_token = (
            ("num_local_experts", "num_experts"),
            ("num_experts_per_tok", "experts_per_token"),
        )
        if original:
            experts, per_token = experts[::-1], per_token[::-1]
        else:
            _refuse_other_models(reader)
        heads = reader.integer("num_attention_heads", high=_MAX_HEADS)
        layers = reader.integer("num_hidden_layers", high=_MAX_LAYERS)
        layer_types = _layer_types(reader, layers)
        slides = "sliding_attention" in layer_types
        vocab_size = reader.integer("vocab_size", high=_MAX_VOCAB)
        rope, positions = _original_rope(reader) if original else _hugging_face_rope(reader)
        config = cls(
            num_hidden_layers=layers,
            hidden_size=reader.integer("hidden_size", high=_MAX_WIDTH),
            intermediate_size=reader.integer("intermediate_size", high=_MAX_WIDTH),
            num_experts=reader.integer(*experts, high=_MAX_EXPERTS),
            experts_per_token=reader.integer(*per_token, high=_MAX_EXPERTS),
            vocab_size=vocab_size,
            num_attention_heads=heads,
            num_key_value_heads=reader.integer("num_key_value_heads", high=_MAX_HEADS),
            head_dim=reader.integer("head_dim", high=4096),
            sliding_window=reader.integer("sliding_window", high=_MAX_POSITIONS) if slides else None,
            layer_types=layer_types,
            max_position_embeddings=positions,
            rms_norm_eps=reader.number("rms_norm_eps", low=1e-12, high=1.0, default=1e-5),
            rope=rope,
            swiglu_alpha=reader.number("swiglu_alpha", low=1e-3, high=1e3, default=1.702),
            swiglu_limit=reader.number("swiglu_limit", low=1e-3, high=1e4, default=7.0),
            eos_token_ids=_eos_token_ids(reader, vocab_size, original),
        )
        _check_relations(config, reader)
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read ``config.json`` of a checkpoint, and ``generation_config.json`` where there is one.

        Parameters
        ----------
        folder : str or Path
            The checkpoint. In OpenAI's layout ``generation_config.json`` is also looked for one folder up,
            which is where a full download has it.

        Returns
        -------
        ModelConfig

        Raises
        ------
        ConfigError
            As `from_dict`, and when a file cannot be read.
        """
        folder = Path(folder)
        source = folder / "config.json"
        data = read_json(source)
        config = cls.from_dict(data, str(source))
        places = [folder, folder.parent] if folder.name == "original" else [folder]
        for path in (place / "generation_config.json" for place in places):
            if path.is_file():
                reader = _Reader(read_json(path), str(path))
                if reader.data.get("eos_token_id") is not None:
                    # Generation's own list wins: the model's config names a single one of them.
                    ids = _eos_token_ids(reader, config.vocab_size, original=False)
                    return cls(**{**config.__dict__, "eos_token_ids": ids})
                break
        return config


def _refuse_other_models(reader: _Reader) -> None:
    if reader.data.get("model_type") != "gpt_oss":
        raise reader.fail("model_type", reader.data.get("model_type", _MISSING), '"gpt_oss"')
    reader.only("tie_word_embeddings", False)
    reader.only("attention_bias", True)
    reader.only("hidden_act", "silu")
    quantization = reader.section("quantization_config")
    if quantization is not None:
        quantization.only("quant_method", "mxfp4")


def _layer_types(reader: _Reader, layers: int) -> tuple[LayerType, ...]:
    value = reader.data.get("layer_types")
    if value is None:
        return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(layers))
    wanted = f'a list of {layers} strings, each "sliding_attention" or "full_attention"'
    if not isinstance(value, list) or len(value) != layers:
        raise reader.fail("layer_types", value, wanted)
    for i, kind in enumerate(value):
        if kind not in ("sliding_attention", "full_attention"):
            raise reader.fail(f"layer_types[{i}]", kind, '"sliding_attention" or "full_attention"')
    return tuple(value)


def _hugging_face_rope(reader: _Reader) -> tuple[RopeConfig, int]:
    positions = reader.integer("max_position_embeddings", high=_MAX_POSITIONS)
    new, old = reader.section("rope_parameters"), reader.section("rope_scaling")
    section = new or old
    if section is None:
        # Releases of transformers disagree on what an absent section means: published YaRN, or plain RoPE.
        raise reader.fail("rope_parameters", reader.data.get("rope_parameters", _MISSING), "an object")
    rope = _rope_section(section, reader, positions)
    if new is not None and old is not None and _rope_section(old, reader, positions) != rope:
        raise reader.fail("rope_scaling", reader.data["rope_scaling"], "the same as rope_parameters")
    return rope, positions


def _rope_section(section: _Reader, top: _Reader, positions: int) -> RopeConfig:
    theta_from = section if section.data.get("rope_theta") is not None else top
    theta = theta_from.number("rope_theta", low=1.001, high=1e12)
    key, kind = section.find(("rope_type", "type"))
    if kind not in ("yarn", "default"):
        raise section.fail(key, kind, '"yarn" or "default"')
    section.only("partial_rotary_factor", 1.0)
    if kind == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=positions)
    section.only("mscale", 0)
    section.only("mscale_all_dim", 0)
    rope = RopeConfig(
        theta=theta,
        factor=section.number("factor", low=1.0, high=1e6),
        original_max_position_embeddings=section.integer("original_max_position_embeddings", high=_MAX_POSITIONS),
        beta_fast=section.number("beta_fast", low=1e-3, high=1e6, default=32.0),
        beta_slow=section.number("beta_slow", low=1e-3, high=1e6, default=1.0),
        truncate=section.boolean("truncate", default=True),
    )
    attention = section.number("attention_factor", low=0.0, high=1e6, default=math.nan)
    expected = 0.1 * math.log(rope.factor) + 1.0
    if not math.isnan(attention) and not math.isclose(attention, expected, rel_tol=1e-6):
        raise section.fail("attention_factor", attention, f"0.1 ln(factor) + 1 = {expected:.6f}")
    if rope.beta_fast < rope.beta_slow:
        raise section.fail("beta_fast", rope.beta_fast, f"at least beta_slow = {rope.beta_slow:g}")
    return rope


def _original_rope(reader: _Reader) -> tuple[RopeConfig, int]:
    initial = reader.integer("initial_context_length", high=_MAX_POSITIONS)
    rope = RopeConfig(
        theta=reader.number("rope_theta", low=1.001, high=1e12),
        factor=reader.number("rope_scaling_factor", low=1.0, high=1e6),
        original_max_position_embeddings=initial,
        beta_fast=reader.number("rope_ntk_beta", low=1e-3, high=1e6),
        beta_slow=reader.number("rope_ntk_alpha", low=1e-3, high=1e6),
        truncate=False,
    )
    if rope.beta_fast < rope.beta_slow:
        raise reader.fail("rope_ntk_beta", rope.beta_fast, f"at least rope_ntk_alpha = {rope.beta_slow:g}")
    positions = int(initial * rope.factor)
    if positions > _MAX_POSITIONS:
        raise reader.fail("initial_context_length", initial, f"at most {_MAX_POSITIONS} once scaled")
    return rope, positions


def _eos_token_ids(reader: _Reader, vocab_size: int, original: bool) -> tuple[int, ...]:
    value = reader.data.get("eos_token_id")
    if value is None:
        return _HARMONY_EOS if original and vocab_size > max(_HARMONY_EOS) else ()
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise reader.fail("eos_token_id", value, f"token ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _check_relations(config: ModelConfig, reader: _Reader) -> None:
    """Refuse sizes that are fine alone and impossible together."""
    if config.num_attention_heads % config.num_key_value_heads:
        wanted = f"a divisor of num_attention_heads = {config.num_attention_heads}"
        raise reader.fail("num_key_value_heads", config.num_key_value_heads, wanted)
    if config.head_dim % 2:
        raise reader.fail("head_dim", config.head_dim, "an even number (rotary embedding turns pairs)")
    for key in ("hidden_size", "intermediate_size"):
        if getattr(config, key) % 32:
            raise reader.fail(key, getattr(config, key), "a multiple of 32 (an MXFP4 block holds 32 values)")
    if config.experts_per_token > config.num_experts:
        wanted = f"at most the number of experts, {config.num_experts}"
        raise reader.fail("experts_per_token", config.experts_per_token, wanted)
    # Python integers do not overflow, so the sum may be formed before it is judged.
    heads = config.num_attention_heads * 2 + config.num_key_value_heads * 2
    attention = 2 * config.hidden_size * heads * config.head_dim
    experts = 3 * config.num_experts * config.hidden_size * config.intermediate_size * 17 // 32
    total = config.num_hidden_layers * (attention + experts) + 4 * config.vocab_size * config.hidden_size
    if total > _MAX_MODEL_BYTES:
        raise ConfigError(
            f"{reader.source}: num_hidden_layers, hidden_size and the other sizes multiply to {total} "
            f"bytes of weights, expected at most {_MAX_MODEL_BYTES}"
        )
