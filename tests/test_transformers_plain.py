"""The transformers backend on plain weights: bfloat16 and float32 experts, and other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import checkpoints
from transformers_backend import (
    CONFIGS,
    EVERY_TOKEN,
    Case,
    assert_logits,
    assert_same_tensors,
    counted_attention,
    named_experts,
    padded,
    tensors,
    torch,
    transformers,
)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case") / "checkpoint", next(iter(CONFIGS)), 3)


def plain_model(case: Case, dtype: Any, **options: Any) -> Any:
    """Load the same weights out of a checkpoint whose experts are in bfloat16."""
    folder = case.path.parent / "plain"
    if not folder.exists():
        checkpoints.write(folder, layout="huggingface-bf16", seed=case.seed, config=case.config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


@named_experts
@pytest.mark.parametrize("name", list(CONFIGS))
def test_bfloat16_experts(tmp_path: Path, name: str) -> None:
    case = Case(tmp_path / "checkpoint", name, 5)
    ids = case.ids(2, 50)
    ours = plain_model(case, torch.bfloat16, experts_implementation="mxmoe", attn_implementation="mxmoe")
    theirs = plain_model(case, torch.bfloat16, experts_implementation="eager", attn_implementation="eager")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with torch.no_grad():
        want = case.eager(torch.float64)(ids).logits
        errors = [((m(ids).logits.double() - want).abs().amax(-1) / want.std(-1)).median() for m in (ours, theirs)]
    assert 0 < errors[0] <= 1.5 * errors[1]
    # The weights are laid out anew, but are the same.
    assert ours.model.layers[0].mlp.experts.gate_up_proj.stride(1) == 1
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    ours.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors(tmp_path / "saved"), {key: value.contiguous() for key, value in before.items()})


@named_experts
def test_float32_experts_and_all_gradients(first: Case) -> None:
    batch = padded(first, [20, 7], "left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    grads = []
    for name in ("eager", "mxmoe"):
        model = plain_model(first, torch.float32, experts_implementation=name, attn_implementation=name).train()
        with counted_attention() as kernel:
            model(**batch, labels=labels).loss.backward()
            assert kernel.call_count == (name == "mxmoe") * first.config.num_hidden_layers
        grads.append({key: p.grad for key, p in model.named_parameters()})
    for key, want in grads[0].items():
        assert want.norm() > 0, key
        assert (grads[1][key] - want).norm() < 2e-3 * want.norm(), key


@named_experts
def test_bfloat16_training_lowers_the_loss(first: Case) -> None:
    model = plain_model(first, torch.bfloat16, experts_implementation="mxmoe", attn_implementation="mxmoe").train()
    optimizer, ids = torch.optim.AdamW(model.parameters(), 1e-3), first.ids(4, 24)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


# Other models


@named_experts
def test_a_model_without_sinks(first: Case) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    batch = padded(first, [33, 9, 20], "left")
    with torch.no_grad(), counted_attention() as kernel:
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        want = model(**batch).logits
        text = model.generate(**batch, **EVERY_TOKEN, max_new_tokens=30)
        assert kernel.call_count == 0
        model.set_attn_implementation("mxmoe")
        model.set_experts_implementation("mxmoe")
        assert_logits(model(**batch).logits, want, batch["attention_mask"])
        assert model.generate(**batch, **EVERY_TOKEN, max_new_tokens=30).tolist() == text.tolist()
        assert kernel.call_count == 2 * 31


def test_what_other_models_ask_for_is_refused(first: Case) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "mxmoe"}
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, head_dim=264))
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, head_dim=32))
    packed = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    ids = first.ids(1, 6)
    for model, message, more in [
        (wide, "one head_dim of at most 256", {}),
        (capped, "got softcap", {}),
        (packed, "came and_masks", {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}),
    ]:
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model.eval()(ids, **more)
