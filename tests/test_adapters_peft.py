"""Adapters made by PEFT itself: trained before packed experts, saved, and the same in transformers and natively."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mxmoe
from compare import as_numpy, assert_exact, assert_model_close
from mxmoe.harmony import render_conversation
from mxmoe.tiny.problems import make_problem

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from mxmoe.integrations.peft import ExpertsLora, with_experts  # noqa: E402
from transformers_backend import NOISE, TINY, Case, load_mxmoe  # noqa: E402

# PEFT asks transformers under a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]


def lora(**changes: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "target_parameters": ["mlp.router.weight"]}
    return with_experts(peft.LoraConfig(task_type="CAUSAL_LM", **options | changes))


def randomized(base: Any, config: Any, seed: int = 0) -> Any:
    """Put an adapter on a model, and random numbers where PEFT begins with zeros."""
    model = peft.get_peft_model(base, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 6)
    return model.eval()


def reloaded(base: Any, folder: Path) -> Any:
    config = with_experts(peft.LoraConfig.from_pretrained(folder))
    return peft.PeftModel.from_pretrained(base, folder, config=config).eval()


def logits_of(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(ids).logits[0].double().numpy()


@pytest.mark.parametrize("name", ["short windows, two groups", "three layers, eight experts, odd heads"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "r": 5, "lora_alpha": 3}, {"layers_to_transform": [1]}])
def test_native_logits_are_those_of_transformers(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Of its own attention and experts, on decoded weights, in float32."""
    case = Case(tmp_path / "base", name, seed=3)
    model = randomized(case.eager(), lora(**changes))
    assert isinstance(model.base_model.model.model.layers[1].mlp.experts, ExpertsLora)
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = case.ids(1, 40)
    want = logits_of(model, ids)
    for kind in ("kernels", "reference"):
        native = mxmoe.load(case.path, activations="float32", backend=kind, adapter=tmp_path / "adapter")
        assert_model_close(native.forward(ids[0].numpy()), want, limit=NOISE)
    packed = reloaded(load_mxmoe(case.path), tmp_path / "adapter")
    assert_model_close(logits_of(packed, ids), want, limit=NOISE)
    with model.disable_adapter(), pytest.raises(AssertionError):
        assert_model_close(logits_of(model, ids), want, limit=0.05)


def packed_bytes(model: Any) -> dict[str, Any]:
    held = {name: p for name, p in model.named_parameters() if name.endswith(("_blocks", "_scales"))}
    assert held
    return {name: as_numpy(p).copy() for name, p in held.items()}


def lessons(count: int) -> Any:
    """Tokens of some problems with their solutions, padded on the right, and what is to be learnt of them."""
    tokenizer, rng = mxmoe.Tokenizer.from_file(TINY / "tokenizer.json"), random.Random(0)
    rows = []
    for _ in range(count):
        problem = make_problem("sort", rng, "train", "low")
        messages = [*problem.messages(), *problem.worked()]
        rows.append(render_conversation(messages, tokenizer, next_role=None, drop_analysis=False)[-60:])
    longest = max(map(len, rows))
    ids = torch.tensor([row[::-1] + [0] * (longest - len(row)) for row in rows])  # backwards: something new
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_before_packed_experts(tmp_path: Path, dtype: Any) -> None:
    """The loss falls, the packed bytes stay, gradients reach the first layer, and the adapter outlives its maker."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load_mxmoe(TINY, dtype=dtype), lora())
    before, batch = packed_bytes(model), lessons(4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    for name, parameter in trained.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    for name, value in packed_bytes(model).items():
        assert_exact(value, before[name])

    model.eval().save_pretrained(str(tmp_path))
    ids = batch["input_ids"][:1, :40]
    want = logits_of(model, ids)
    assert_exact(logits_of(reloaded(load_mxmoe(TINY, dtype=dtype), tmp_path), ids), want)
    exact = mxmoe.load("tiny", activations="float32", adapter=tmp_path).forward(ids[0].numpy())
    plain = mxmoe.load("tiny", activations="float32").forward(ids[0].numpy())
    if dtype == torch.float32:
        assert_model_close(exact, want, limit=NOISE)
    else:  # transformers rounds all it computes to bfloat16
        correlations = [np.corrcoef(*rows)[0, 1] for rows in zip(exact, want, strict=True)]
        assert np.median(correlations) > 0.999, np.median(correlations)
    moved = np.abs(plain - want).max(axis=-1) / want.std(axis=-1)
    assert np.median(moved) > 0.1  # the adapter matters


def test_gradients_through_packed_experts_are_those_of_decoded_ones(tmp_path: Path) -> None:
    case = Case(tmp_path / "base", "short windows, two groups", seed=4)
    ids = case.ids(2, 24)
    grads = []
    for base in (case.eager(), load_mxmoe(case.path)):
        model = randomized(base, lora(target_parameters=None))
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * len(TARGETS) * case.config.num_hidden_layers
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_what_cannot_be_done_is_said() -> None:
    model = peft.get_peft_model(load_mxmoe(TINY), lora(target_modules=["experts"], target_parameters=None))
    with pytest.raises(ValueError, match="cannot be merged into MXFP4"):
        model.merge_and_unload()
    with pytest.raises(TypeError, match=r"config is of type dict; wanted a peft\.LoraConfig"):
        with_experts({})
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'; wanted one of True, False, 'gaussian'"):
        lora(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="use_dora"):
        peft.get_peft_model(load_mxmoe(TINY), lora(use_dora=True, target_modules=["experts"], target_parameters=None))


@pytest.mark.parametrize("safe", [False, True])
def test_attention_s_adapters_merge_into_packed_layers(safe: bool) -> None:
    ids, merged = torch.arange(20)[None], []
    for dense in ("torch", "mxmoe"):
        config = lora(target_modules=["q_proj", "o_proj"], target_parameters=None)
        base = load_mxmoe(TINY, dtype=torch.bfloat16, dense=dense)
        model = randomized(base, config).eval()
        before = logits_of(model, ids)
        whole = model.merge_and_unload(safe_merge=safe)
        assert not any("lora" in name for name, _ in whole.named_parameters())
        rows = zip(logits_of(whole, ids), before, strict=True)
        # The sum is rounded to bfloat16, and a router's near tie may fall the other way.
        assert np.median([np.corrcoef(*pair)[0, 1] for pair in rows]) > 0.98
        merged.append(whole.state_dict())
    assert merged[0].keys() == merged[1].keys()
    for name, want in merged[0].items():
        assert torch.equal(merged[1][name], want), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_beside_layers_rounded_to_int8(tmp_path: Path, dtype: Any) -> None:
    ids = torch.arange(20)[None]
    config = lora(target_modules=["q_proj", "o_proj"], target_parameters=None)
    model = randomized(load_mxmoe(TINY, dtype=dtype, dense="int8"), config)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert grads and all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads)
    want = logits_of(model.eval(), ids)
    model.save_pretrained(tmp_path)
    again = reloaded(load_mxmoe(TINY, dtype=dtype, dense="int8"), tmp_path)
    assert_exact(logits_of(again, ids), want)


@pytest.mark.parametrize("isa", mxmoe._core.available_isas())
@pytest.mark.parametrize("helped", [True, False])
def test_nothing_merges_into_layers_rounded_to_int8(isa: str, helped: bool) -> None:
    """Packed or not, PEFT's configuration or ours: the error is the same, and the model goes on as it was."""
    ids, targets = torch.arange(20)[None], ["q_proj", "lm_head"]
    config = lora(target_modules=targets, target_parameters=None)
    if not helped:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    with mxmoe.ops.isa(isa):
        model = randomized(load_mxmoe(TINY, dtype=torch.bfloat16, dense="int8"), config)
        want = logits_of(model, ids)
        for merge in (
            model.merge_and_unload,
            model.merge_adapter,
            lambda: model.merge_and_unload(safe_merge=True),
            lambda: model.merge_adapter(safe_merge=True),
        ):
            with pytest.raises(ValueError, match=r"rounded to int8, and an adapter cannot be merged.*dense='mxmoe'"):
                merge()
            assert_exact(logits_of(model, ids), want)
        with model.disable_adapter():
            base = logits_of(model, ids)
        assert_exact(logits_of(model.unload(), ids), base)


def test_merging_can_be_taken_back() -> None:
    model = randomized(
        load_mxmoe(TINY, dtype=torch.bfloat16), lora(target_modules=["k_proj"], target_parameters=None)
    )
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    stored = layer.base_layer.state_dict()["weight"].clone()
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.state_dict()["weight"], stored)
    logits_of(model, torch.arange(20)[None])  # packs
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.state_dict()["weight"], stored, rtol=2**-7, atol=2**-9)


def test_without_its_adapter_the_model_is_the_base() -> None:
    ids = torch.arange(20)[None]
    want = logits_of(load_mxmoe(TINY).eval(), ids)
    model = randomized(load_mxmoe(TINY), lora())
    assert not np.array_equal(logits_of(model, ids), want)
    with model.disable_adapter():
        assert_exact(logits_of(model, ids), want)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"], "target_parameters": None}, "use_dora is True"),
        ({"bias": "all"}, "bias is all; wanted none"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"target_modules": ["embed_tokens"], "target_parameters": None}, "embed_tokens, which is not supported"),
    ],
)
def test_what_peft_can_and_mxmoe_cannot(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    peft.get_peft_model(load_mxmoe(TINY), lora(**changes)).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(mxmoe.AdapterError, match=says):
        mxmoe.load("tiny", adapter=tmp_path)
