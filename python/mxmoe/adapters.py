"""LoRA adapters as PEFT saves them: read, checked, and put beside the layers of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from mxmoe.checkpoint import weight_shapes
from mxmoe.config import ModelConfig, read_json
from mxmoe.devices import HOST, Device
from mxmoe.layers import DecoderLayer, Experts, Linear, LowRank
from mxmoe.shards import shown

__all__ = ["Adapter", "AdapterError", "apply_adapter"]

Array = NDArray[Any]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_LAYER = "model.layers.{}."
# What an adapter can stand beside, by PEFT's names within a layer, and the weight that tells its size.
_MODULES = {f"self_attn.{part}_proj": f"{part}_proj_weight" for part in "qkvo"} | {"mlp.experts": ""}
_PARAMETERS = {"mlp.router.weight": "router_weight"}
_SUPPORTED = (
    "plain LoRA (r, lora_alpha, use_rslora, layers_to_transform) on q_proj, k_proj, v_proj, o_proj, experts and "
    "lm_head in target_modules, mlp.router.weight in target_parameters"
)
# Fields that are read here, and those that say nothing about what the adapter computes. Whatever else a
# configuration holds must be empty, so that a variant of a later PEFT is an error and not a wrong answer.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "layers_to_transform"}
_READ |= {"bias", "init_lora_weights"}
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
}
_IGNORED |= {"peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
# The others begin by changing the base weights.
_INITS = (True, False, "gaussian", "orthogonal", "eva")
_MAX_RANK = 1 << 20
# A float32 is the sum of three bfloat16: 24 bits of mantissa, 8 in each.
_PARTS = 3


class AdapterError(ValueError):
    """An adapter that cannot be found, is damaged, or asks for something that is not supported."""


@dataclass(frozen=True)
class Adapter:
    """What a folder of PEFT's holds.

    Attributes
    ----------
    path : Path
    r : int
    scale : float
        What ``B A x`` is multiplied by.
    matrices : dict
        ``A`` (r, in) and ``B`` (out, r), float32, by the name of the module beside which they stand.
    """

    path: Path
    r: int
    scale: float
    matrices: dict[str, tuple[Array, Array]]

    @classmethod
    def open(cls, folder: str | Path, config: ModelConfig) -> Adapter:
        """Read a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

        Parameters
        ----------
        folder : str or Path
        config : ModelConfig
            Of the model that it is meant for.

        Returns
        -------
        Adapter

        Raises
        ------
        AdapterError
            A file is missing or damaged, a tensor is missing, too many, of another shape or not finite, or the
            configuration has something that is not supported.
        """
        path = Path(folder)
        if not path.is_dir():
            raise AdapterError(f"{path}: is not a folder, expected one with {_CONFIG} and {_WEIGHTS}")
        fields = read_json(path / _CONFIG, AdapterError)
        r, scale = _check_fields(path / _CONFIG, fields)
        sizes = dict(_places(config))
        header = _read_header(path / _WEIGHTS)
        targets = _targets(path / _CONFIG, fields, sizes, header)
        expected = {}
        for name in targets:
            out_features, in_features = sizes[name]
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            expected[f"{key}A.weight"], expected[f"{key}B.weight"] = (r, in_features), (out_features, r)
        _check_header(path / _WEIGHTS, header, expected)
        tensors = _read(path / _WEIGHTS, header)
        arrays = iter(tensors[key] for key in expected)
        matrices = {name.removesuffix(".weight"): (next(arrays), next(arrays)) for name in targets}
        return cls(path, r, scale, matrices)


def _check_fields(path: Path, fields: Mapping[str, Any]) -> tuple[int, float]:
    """Return rank and scale; raise for whatever changes the result in a way that is not known here."""

    def refuse(name: str, wanted: str = "it empty") -> AdapterError:
        return AdapterError(
            f"{path}: {name} is {shown(fields.get(name))}; wanted {wanted}. Supported is {_SUPPORTED}"
        )

    if fields.get("peft_type") != "LORA":
        raise refuse("peft_type", "LORA")
    if fields.get("bias", "none") != "none":
        raise refuse("bias", "none")
    if fields.get("init_lora_weights", True) not in _INITS:
        raise refuse("init_lora_weights", "one that leaves the base weights as they are")
    for name in sorted(fields.keys() - _READ - _IGNORED):
        if fields[name]:
            raise refuse(shown(name))
    r, alpha, rslora = fields.get("r"), fields.get("lora_alpha"), fields.get("use_rslora", False)
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= _MAX_RANK:
        raise refuse("r", f"a whole number from 1 to {_MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 2**53:
        raise refuse("lora_alpha", "a number")
    if not isinstance(rslora, bool):
        raise refuse("use_rslora", "true or false")
    return r, alpha / (math.sqrt(r) if rslora else r)


def _places(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield what an adapter can stand beside, and its (out, in)."""
    shapes = weight_shapes(config) | {"": (config.hidden_size, config.hidden_size)}
    for i in range(config.num_hidden_layers):
        for name, weight in (_MODULES | _PARAMETERS).items():
            out_features, in_features = shapes[weight]
            yield _LAYER.format(i) + name, (out_features, in_features)
    yield "lm_head", (config.vocab_size, config.hidden_size)


def _targets(path: Path, fields: Mapping[str, Any], sizes: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """Return the places that the configuration names."""
    chosen: list[str] = []
    for field in ("target_modules", "target_parameters"):
        wanted = fields.get(field) or []
        known = [name for name in sizes if name.endswith(".weight") == (field == "target_parameters")]
        if isinstance(wanted, str):
            # A pattern: which places it means is told by the tensors, and no pattern of a stranger's is run.
            keys = {name: f"base_model.model.{name}.lora_" for name in known}
            chosen += [name for name, key in keys.items() if {f"{key}A.weight", f"{key}B.weight"} & header.keys()]
            continue
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise AdapterError(f"{path}: {field} is {shown(wanted)}; wanted a list of names, or a pattern")
        for target in wanted:
            found = [name for name in known if name == target or name.endswith(f".{target}")]
            if not found:
                came = f"{field} names {shown(target)}, which is not supported"
                raise AdapterError(f"{path}: {came}. Supported is {_SUPPORTED}")
            if field == "target_modules":
                found = _in_layers(path, fields.get("layers_to_transform"), found)
            chosen += found
    return [name for name in sizes if name in chosen]


def _in_layers(path: Path, layers: Any, names: list[str]) -> list[str]:
    """Keep the places that are in some layers; None and an empty list are all of them."""
    if layers is None or layers == []:
        return names
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise AdapterError(f"{path}: layers_to_transform is {shown(layers)}; wanted numbers of layers")
    return [name for name in names if any(name.startswith(_LAYER.format(n)) for n in numbers)]


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor; the safetensors library judges the file."""
    if not path.is_file():
        raise AdapterError(f"{path}: is missing, expected the adapter's weights as safetensors")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    except (safetensors.SafetensorError, OSError) as problem:
        raise AdapterError(f"{path}: not a readable safetensors file ({shown(problem)})") from None


def _check_header(
    path: Path, header: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, tuple[int, int]]
) -> None:
    """Raise unless the file has the expected tensors and no others."""
    if not expected:
        raise AdapterError(f"{path}: the configuration targets no layer of the model. Supported is {_SUPPORTED}")
    for key, shape in expected.items():
        if key not in header:
            raise AdapterError(f"{path}: tensor {key} is missing, expected {list(shape)}")
        dtype, came = header[key]
        if came != shape or dtype not in _DTYPES:
            wanted = f"{', '.join(_DTYPES)} {list(shape)}"
            raise AdapterError(f"{path}: tensor {key} is {shown(dtype)} {list(came)}, expected {wanted}")
    for key in sorted(header.keys() - expected.keys()):
        raise AdapterError(f"{path}: unexpected tensor {shown(key)}. Supported is {_SUPPORTED}")


def _read(path: Path, header: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Array]:
    """Read all tensors as float32."""
    tensors = {}
    for key, entry in safetensors.deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        dtype, shape = header[key]
        tensors[key] = np.frombuffer(entry["data"], _DTYPES[dtype]).reshape(shape).astype(np.float32)
        if not np.isfinite(tensors[key]).all():
            raise AdapterError(f"{path}: tensor {key} holds a value that is not finite")
    return tensors


def bfloat16_parts(matrix: Array, exact: bool) -> tuple[Array, ...]:
    """Round a float32 matrix to bfloat16 or, if it is to be `exact`, split it into some that sum to it."""
    parts: list[Array] = []
    while not parts or (exact and len(parts) < _PARTS and matrix.any()):
        parts.append(matrix.astype(ml_dtypes.bfloat16))
        matrix = matrix - parts[-1].astype(np.float32)
    return tuple(parts)


def apply_adapter(adapter: Adapter, layers: list[DecoderLayer], lm_head: Linear, device: Device = HOST) -> None:
    """Put an adapter's matrices beside a model's layers, on their device; their own weights stay as they are.

    Where activations are float32 the adapter counts to its last bit; else it is rounded to bfloat16, as they are.

    Raises
    ------
    AdapterError
        The scaled matrices have no finite bfloat16.
    """
    for name, (a, b) in adapter.matrices.items():
        layer = _layer(name, layers, lm_head)
        exact = layer.activations == "float32"
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
            scaled = (b * np.float64(adapter.scale)).astype(np.float32)
            narrow, wide = bfloat16_parts(a, exact), bfloat16_parts(scaled, exact)
        if not all(np.isfinite(part.astype(np.float32)).all() for part in (*narrow, *wide)):
            raise AdapterError(f"{adapter.path}: the matrices of {name}, times {adapter.scale:g}, exceed bfloat16")
        there = [tuple(device.put(part, f"the adapter of {name}") for part in parts) for parts in (narrow, wide)]
        layer.adapter = LowRank(layer.ops, there[0], there[1], layer.activations)


def _layer(name: str, layers: list[DecoderLayer], lm_head: Linear) -> Linear | Experts:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)", name)
    if match is None:
        return lm_head
    part: Linear | Experts = getattr(getattr(layers[int(match[1])], match[2]), match[3])
    return part
