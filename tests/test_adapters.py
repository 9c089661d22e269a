"""LoRA adapters in the native engine: reading what PEFT saves, and what is computed of it. PEFT is not needed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import mxmoe
import small_models
from compare import assert_exact, assert_model_close
from mxmoe.adapters import bfloat16_parts
from mxmoe.layers import side_by_side
from mxmoe.reference import ops as reference_ops

CONFIG = small_models.CONFIG
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIELDS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": False,
    "bias": "none",
    "target_modules": [*ATTENTION, "experts"],
    "target_parameters": ["mlp.router.weight"],
    "lora_dropout": 0.1,
    "loftq_config": {},
    "modules_to_save": None,
    "base_model_name_or_path": "somewhere",
}


def sizes(target: str) -> tuple[int, int]:
    """(out, in) of what stands under a name."""
    hidden, heads = CONFIG.hidden_size, CONFIG.num_attention_heads * CONFIG.head_dim
    kv = CONFIG.num_key_value_heads * CONFIG.head_dim
    return {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.experts": (hidden, hidden),
        "mlp.router": (CONFIG.num_experts, hidden),
    }[target]


def random_tensors(seed: int = 0, r: int = 4, dtype: Any = np.float32) -> dict[str, Any]:
    rng, tensors = np.random.default_rng(seed), {}
    names = [f"self_attn.{name}" for name in ATTENTION] + ["mlp.experts", "mlp.router"]
    for i in range(CONFIG.num_hidden_layers):
        for name in names:
            out_features, in_features = sizes(name)
            key = f"base_model.model.model.layers.{i}.{name}.lora_"
            tensors[f"{key}A.weight"] = (rng.standard_normal((r, in_features)) / 8).astype(dtype)
            tensors[f"{key}B.weight"] = (rng.standard_normal((out_features, r)) / 8).astype(dtype)
    return tensors


def write(folder: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | changes))
    save_file(random_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.write(tmp_path_factory.mktemp("base"), seed=5)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("adapter"))


def expected_logits(folder: Path, tensors: dict[str, Any], scale: float, ids: Any) -> Any:
    """The model in float64 with ``W + scale B A`` in each dense layer's place, and A, B before the experts."""
    model = mxmoe.load(folder, backend="reference")

    def delta(i: int, name: str) -> Any:
        key = f"base_model.model.model.layers.{i}.{name}.lora_"
        a, b = (tensors[f"{key}{side}.weight"].astype(np.float64) for side in "AB")
        return scale * b @ a

    for i, layer in enumerate(model.layers):
        for name in ATTENTION:
            linear = getattr(layer.self_attn, name)
            linear.weight = linear.weight.astype(np.float64) + delta(i, f"self_attn.{name}")
        layer.mlp.router.weight = layer.mlp.router.weight.astype(np.float64) + delta(i, "mlp.router")
        layer.mlp.experts.ops = Before(np.eye(CONFIG.hidden_size) + delta(i, "mlp.experts"))
    return model.forward(ids)


class Before:
    """The reference's ops, with a matrix before the experts."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix

    def mxfp4_moe(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return reference_ops.mxfp4_moe(x @ self.matrix.T, *args, **kwargs)


@pytest.mark.parametrize("backend", ["reference", "kernels"])
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_those_of_merged_weights(folder: Path, tmp_path: Path, backend: Any, rslora: bool) -> None:
    ids = small_models.random_ids(40)
    tensors = random_tensors(seed=1)
    path = write(tmp_path / "a", tensors, use_rslora=rslora)
    want = expected_logits(folder, tensors, 6 / (2 if rslora else 4), ids)
    plain = mxmoe.load(folder, activations="float32", backend=backend)
    model = mxmoe.load(folder, activations="float32", backend=backend, adapter=path)
    assert_model_close(model.forward(ids), want, limit=1e-4 if backend == "kernels" else 1e-6)
    with pytest.raises(AssertionError):
        assert_model_close(plain.forward(ids), want, limit=0.05)


@pytest.mark.parametrize("target", [*(f"self_attn.{name}" for name in ATTENTION), "mlp.experts", "mlp.router"])
def test_every_target_counts(folder: Path, adapter: Path, tmp_path: Path, target: str) -> None:
    """Without its adapter in one place, the model is another."""
    tensors = random_tensors()
    for key in tensors:
        if f"{target}.lora_B" in key:
            tensors[key] = np.zeros_like(tensors[key])
    ids = small_models.random_ids(20)
    got, without = (
        mxmoe.load(folder, activations="float32", adapter=path).forward(ids)
        for path in (adapter, write(tmp_path / "b", tensors))
    )
    assert np.abs(got - without).max() > 1e-3 * got.std()


@pytest.mark.parametrize("mode", small_models.MODES)
def test_reduced_modes_stay_near(folder: Path, adapter: Path, mode: str) -> None:
    """As near to the float64 answer as the same mode without an adapter is to its own."""
    ids, options = small_models.random_ids(60), small_models.MODES[mode]
    errors = []
    for path in (None, adapter):
        model = mxmoe.load(folder, adapter=path, **options)
        want = mxmoe.load(folder, backend="reference", dense=options["dense"], adapter=path, activations="float32")
        errors.append(np.median(np.abs(model.forward(ids) - want.forward(ids)).max(axis=1)))
    assert errors[1] <= 3 * errors[0]


def test_base_weights_stay_as_stored(folder: Path, adapter: Path) -> None:
    plain, model = mxmoe.load(folder), mxmoe.load(folder, adapter=adapter)
    for a, b in zip(plain.layers, model.layers, strict=True):
        for p, q in zip(a.self_attn.projections, b.self_attn.projections, strict=True):
            assert_exact(q.weight, p.weight)
        for name in ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales"):
            assert_exact(getattr(b.mlp.experts, name), getattr(a.mlp.experts, name))


@pytest.mark.parametrize("activations", ["float32", "bf16", "int8"])
def test_adapters_of_a_group_run_as_those_of_its_layers(folder: Path, adapter: Path, activations: Any) -> None:
    attention = mxmoe.load(folder, activations=activations, adapter=adapter).layers[1].self_attn
    attention.k_proj.adapter = None  # one of the three without
    x = np.random.default_rng(0).standard_normal((7, CONFIG.hidden_size), np.float32)
    group = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert_exact(side_by_side(x, group), np.concatenate([layer(x) for layer in group], axis=1))


def test_chunks_and_batches_change_no_bit(folder: Path, adapter: Path) -> None:
    model = mxmoe.load(folder, adapter=adapter)
    ids = small_models.random_ids(33)
    whole = model.forward(ids)
    assert_exact(small_models.in_chunks(model, ids, [1, 2, 13]), whole)
    both = model.forward(np.concatenate([ids[:20], ids]), cu_seqlens=[0, 20, 53])
    assert_exact(both[20:], whole)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_dtypes(folder: Path, tmp_path: Path, dtype: Any) -> None:
    """Read without loss: the same as the same values in float32."""
    tensors = random_tensors(dtype=dtype)
    wide = {key: value.astype(np.float32) for key, value in tensors.items()}
    ids = small_models.random_ids(9)
    logits = [
        mxmoe.load(folder, activations="float32", adapter=write(tmp_path / name, held)).forward(ids)
        for name, held in (("narrow", tensors), ("wide", wide))
    ]
    assert_exact(*logits)


def test_float32_is_the_sum_of_its_parts() -> None:
    x = np.random.default_rng(0).standard_normal((50, 40), np.float32) * np.float32(10) ** np.arange(-20, 20)
    parts = bfloat16_parts(x.astype(np.float32), exact=True)
    assert len(parts) == 3
    total = sum(part.astype(np.float64) for part in parts)
    assert_exact(total.astype(np.float32), x.astype(np.float32))
    assert len(bfloat16_parts(x, exact=False)) == 1
    assert len(bfloat16_parts(np.ones((2, 2), np.float32), exact=True)) == 1
    assert len(bfloat16_parts(np.zeros((2, 2), np.float32), exact=True)) == 1


def test_what_a_model_says_of_its_adapter(folder: Path, adapter: Path) -> None:
    plain, model = mxmoe.load(folder), mxmoe.load(folder, adapter=adapter)
    r, layers = FIELDS["r"], CONFIG.num_hidden_layers
    names = [*(f"self_attn.{name}" for name in ATTENTION), "mlp.experts"]
    values = layers * r * sum(sum(sizes(name)) for name in names)
    router = model.layers[0].mlp.router.adapter
    assert router is not None and [part.shape for part in router.a] == 3 * [(r, CONFIG.hidden_size)]
    assert model.components["adapter"] == {"dtype": "bf16", "bytes": 2 * values + layers * router.nbytes}
    assert "adapter" not in plain.components
    assert {k: v for k, v in model.components.items() if k != "adapter"} == plain.components
    assert model.options.adapter == adapter and f"adapter={adapter.name}" in repr(model)
    assert plain.options.adapter is None and "adapter" not in repr(plain)


def test_patterns_and_some_layers(folder: Path, tmp_path: Path) -> None:
    """A pattern as target, and layers_to_transform: tensors of those layers alone."""
    one = {key: value for key, value in random_tensors().items() if ".layers.1.self_attn.q_proj." in key}
    ids, shared = small_models.random_ids(9), {"target_parameters": None}
    by_number = write(tmp_path / "n", one, target_modules=["self_attn.q_proj"], layers_to_transform=[1], **shared)
    by_pattern = write(tmp_path / "p", one, target_modules=r".*\.1\..*q_proj", **shared)
    models = [mxmoe.load(folder, adapter=path) for path in (by_number, by_pattern)]
    assert_exact(*(model.forward(ids) for model in models))
    held = [layer.self_attn.q_proj.adapter is not None for layer in models[0].layers]
    assert held == [False, True, False]


def test_lm_head(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, CONFIG.hidden_size)).astype(np.float32)
    b = rng.standard_normal((CONFIG.vocab_size, 4)).astype(np.float32)
    tensors = {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
    path = write(tmp_path / "h", tensors, target_modules=["lm_head"], target_parameters=None)
    ids = small_models.random_ids(9)
    model = mxmoe.load(folder, adapter=path, backend="reference", activations="float32")
    got, seen = model.forward(ids, capture=["final_norm"])
    want = mxmoe.load(folder, backend="reference").forward(ids) + 1.5 * seen["final_norm"] @ (b.astype(float) @ a).T
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


Change = Callable[[dict[str, Any]], object]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; wanted LORA"),
        ({"bias": "all"}, "bias is all; wanted none"),
        ({"use_dora": True}, "use_dora is True; wanted it empty. Supported is plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*lm_head.*; wanted it empty"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is .*q_proj.*; wanted it empty"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"of_next_year": {"x": 1}}, "of_next_year is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa; wanted one that leaves the base weights"),
        ({"r": 0}, "r is 0; wanted a whole number from 1"),
        ({"r": True}, "r is True"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": "16"}, "lora_alpha is 16; wanted a number"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": 1}, "use_rslora is 1; wanted true or false"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names embed_tokens, which is not supported"),
        ({"target_modules": ["router"]}, "target_modules names router"),
        ({"target_modules": 3}, "target_modules is 3; wanted a list of names"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters names mlp.experts.gate_up_proj"),
        ({"target_modules": [], "target_parameters": []}, "targets no layer of the model"),
        ({"layers_to_transform": ["x"]}, "layers_to_transform is .*wanted numbers of layers"),
        ({"layers_to_transform": [0, 1]}, "unexpected tensor .*layers.2.mlp.experts"),
        ({"target_modules": ATTENTION}, "unexpected tensor .*experts"),
        ({"r": 8}, r"q_proj.lora_A.weight is F32 \[4, 96\], expected F32, F16, BF16 \[8, 96\]"),
    ],
)
def test_wrong_configurations(folder: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "a", **change)
    with pytest.raises(mxmoe.AdapterError, match=says) as raised:
        mxmoe.load(folder, adapter=path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def _drop(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def _put(key: str, value: Any) -> Change:
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop(f"{FIRST}A.weight"), r"lora_A.weight is missing, expected \[4, 96\]"),
        (_drop(f"{FIRST}B.weight"), r"lora_B.weight is missing, expected \[192, 4\]"),
        (_put(f"{FIRST}B.bias", np.zeros(192, np.float32)), "unexpected tensor .*lora_B.bias"),
        (_put(f"{FIRST}magnitude_vector", np.zeros(192, np.float32)), "unexpected tensor .*magnitude_vector"),
        (_put("base_model.model.lm_head.weight", np.zeros((2, 2), np.float32)), "unexpected tensor .*lm_head"),
        (_put(f"{FIRST}A.weight", np.zeros((96, 4), np.float32)), r"is F32 \[96, 4\], expected .* \[4, 96\]"),
        (_put(f"{FIRST}A.weight", np.zeros((4, 96), np.int8)), r"is I8 \[4, 96\], expected F32, F16, BF16"),
        (_put(f"{FIRST}A.weight", np.full((4, 96), np.nan, np.float32)), "lora_A.weight holds a value that is not"),
        (_put(f"{FIRST}B.weight", np.full((192, 4), 3.4e38, np.float32)), "q_proj, times 1.5, exceed bfloat16"),
    ],
)
def test_wrong_tensors(folder: Path, tmp_path: Path, change: Change, says: str) -> None:
    tensors = random_tensors()
    change(tensors)
    with pytest.raises(mxmoe.AdapterError, match=says):
        mxmoe.load(folder, adapter=write(tmp_path / "a", tensors))


def test_wrong_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mxmoe.AdapterError, match=r"is not a folder, expected one with adapter_config\.json"):
        mxmoe.load(folder, adapter=tmp_path / "none")
    path = write(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1], b"version https://git-lfs.github.com/spec/v1\n", b"", b"\xff" * 64):
        weights.write_bytes(content)
        with pytest.raises(mxmoe.AdapterError, match="not a readable safetensors file"):
            mxmoe.load(folder, adapter=path)
    weights.unlink()
    with pytest.raises(mxmoe.AdapterError, match="is missing, expected the adapter's weights as safetensors"):
        mxmoe.load(folder, adapter=path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(mxmoe.AdapterError, match=r"adapter_config\.json"):
        mxmoe.load(folder, adapter=path)


def test_another_models_adapter(adapter: Path) -> None:
    with pytest.raises(mxmoe.AdapterError, match=r"is F32 \[4, 96\], expected .* \[4, 160\]"):
        mxmoe.load("tiny", adapter=adapter)


def test_command_line(folder: Path, adapter: Path) -> None:
    command = [sys.executable, "-m", "mxmoe", "info", "-m", str(folder), "--json", "--adapter"]
    result = subprocess.run([*command, str(adapter)], capture_output=True, text=True, check=True)
    shown = json.loads(result.stdout)
    assert shown["adapter"] == str(adapter)
    assert shown["components"]["adapter"] == mxmoe.load(folder, adapter=adapter).components["adapter"]
    assert shown["weight_bytes"] == sum(c["bytes"] for c in shown["components"].values())
    failed = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert failed.returncode == 2 and "adapter_config.json" in failed.stderr and failed.stdout == ""


def test_scale_of_rslora(folder: Path, tmp_path: Path) -> None:
    """alpha / sqrt(r), which for r = 4 is twice alpha / r."""
    tensors, ids = random_tensors(), small_models.random_ids(5)
    stable = write(tmp_path / "s", tensors, use_rslora=True)
    doubled = write(tmp_path / "d", tensors, lora_alpha=6 * math.sqrt(4))
    assert_exact(*(mxmoe.load(folder, adapter=path).forward(ids) for path in (stable, doubled)))
