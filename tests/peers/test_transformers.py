"""The kernels' whole model against transformers' gpt-oss: logits in every mode, and greedy text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import MODEL_NOISE, assert_model_close, row_errors
from mxmoe.checkpoint import Checkpoint
from mxmoe.reference import model as reference
from transformers_models import CONFIGS, Mode, load_transformers, logits_of, rounded_logits, torch

# Past every window, the published one included, and past the original context of the short YaRN.
NUM_TOKENS = 150
PROMPT_TOKENS, NEW_TOKENS = 20, 50

FLOAT32 = Mode("bf16", "float32", "float32")
ROUNDING = [
    Mode("bf16", "bf16", "bf16"),
    Mode("int8", "int8", "int8"),
    Mode("bf16", "bf16", "int8"),
    Mode("int8", "bf16", "bf16"),
]
# What is rounded here is a weight or a cache: the same values, whoever rounds, but for a cached one now and then that
# lies on the edge between two steps and is tipped over by float32's noise.
EXACTLY_ROUNDED = [
    Mode("int8", "float32", "float32"),
    Mode("bf16", "bf16", "float32"),
    Mode("bf16", "int8", "float32"),
]


@dataclass(frozen=True, eq=False)
class Case:
    """A checkpoint, a prompt and the float64 reference's logits."""

    checkpoint: Checkpoint
    ids: Any
    want: Any

    def load(self, mode: Mode) -> mxmoe.Model:
        return mxmoe.load(self.checkpoint.path, **mode.options)

    @cache  # noqa: B019 - as long as the module's fixture
    def torch_logits(self, mode: Mode) -> Any:
        return rounded_logits(self.checkpoint, self.ids, mode)

    @cache  # noqa: B019
    def torch_text(self) -> list[int]:
        peer = load_transformers(self.checkpoint, torch.float32)
        # Every id is an ordinary token here. No cache: that of transformers keeps too much of a window of one.
        peer.generation_config.eos_token_id = None
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "use_cache": False}
        prompts = torch.from_numpy(self.ids[:PROMPT_TOKENS])[None]
        with torch.inference_mode():
            whole = peer.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return whole[0, PROMPT_TOKENS:].tolist()


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def case(request, tmp_path_factory):
    folder = checkpoints.write(tmp_path_factory.mktemp("peers") / "x", config=request.param, seed=11)
    checkpoint = Checkpoint.open(folder)
    ids = np.random.default_rng(5).integers(0, request.param.vocab_size, NUM_TOKENS)
    return Case(checkpoint, ids, reference.forward(checkpoint, ids))


def test_float32_agrees_to_its_own_noise(case, isa):
    peer = logits_of(load_transformers(case.checkpoint, torch.float32), case.ids)
    got = case.load(FLOAT32).forward(case.ids)
    assert got.dtype == np.float32
    assert np.median(row_errors(got, peer)) < MODEL_NOISE
    assert_model_close(got, case.want, peer, limit=MODEL_NOISE)


@pytest.mark.parametrize("mode", ROUNDING, ids=str)
def test_rounding_modes_err_as_torch_does(case, mode, isa):
    peer = case.torch_logits(mode)
    got = case.load(mode).forward(case.ids)
    assert_model_close(got, case.want, peer)
    # Rounding at the very same places leaves us nearer to one another than either is to the truth.
    assert np.median(row_errors(got, peer)) < 0.9 * np.median(row_errors(peer, case.want))


@pytest.mark.parametrize("mode", EXACTLY_ROUNDED, ids=str)
def test_rounded_weights_and_caches_are_torch_s(case, mode, isa):
    peer = case.torch_logits(mode)
    rounding = np.median(row_errors(peer, case.want))
    assert rounding > 10 * MODEL_NOISE, "torch rounded nothing"
    assert_model_close(case.load(mode).forward(case.ids), peer, limit=0.1 * rounding)


def test_greedy_text_is_transformers(case, isa):
    want = case.torch_text()
    steps = case.load(FLOAT32).generate(case.ids[:PROMPT_TOKENS], NEW_TOKENS, stop_token_ids=[])
    assert [step.token_id for step in steps] == want
    assert len(set(want)) > 5, "a text that repeats itself proves little"


def _swap_nibbles(model):
    experts = model.layers[0].mlp.experts
    experts.gate_up_blocks = (experts.gate_up_blocks >> 4) | (experts.gate_up_blocks << 4)


def _swap_experts(model):
    experts = model.layers[1].mlp.experts
    order = np.roll(np.arange(len(experts.down_blocks)), 1)
    experts.down_blocks = np.ascontiguousarray(experts.down_blocks[order])


def _set(path, change):
    """Change one attribute of the first layer, by its path."""

    def apply(model):
        *owners, name = path.split(".")
        owner = model.layers[0]
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, change(getattr(owner, name)))

    return apply


BREAKS = {
    "a longer window": _set("self_attn.window", lambda window: window + 1),
    "a shorter window": _set("self_attn.window", lambda window: window - 1),
    "no sinks": _set("self_attn.sinks", lambda sinks: np.full_like(sinks, -100)),
    "another scale of scores": _set("self_attn.sm_scale", lambda scale: scale * 1.01),
    "keys without bias": _set("self_attn.k_proj.bias", np.zeros_like),
    "output without bias": _set("self_attn.o_proj.bias", np.zeros_like),
    "router without bias": _set("mlp.router.bias", np.zeros_like),
    "experts without bias": _set("mlp.experts.down_bias", np.zeros_like),
    "one expert fewer": _set("mlp.experts_per_token", lambda k: k - 1),
    "another limit": _set("mlp.experts.swiglu_limit", lambda _: 1.0),
    "another alpha": _set("mlp.experts.swiglu_alpha", lambda alpha: alpha * 1.01),
    "another epsilon": _set("input_layernorm.eps", lambda _: 1e-3),
    "bf16 projections": _set("self_attn.q_proj.activations", lambda _: "bf16"),
    "bf16 experts": _set("mlp.experts.activations", lambda _: "bf16"),
    "nibbles swapped": _swap_nibbles,
    "experts swapped": _swap_experts,
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS.keys())
def test_what_is_broken_is_seen(tmp_path, broken):
    checkpoint = Checkpoint.open(checkpoints.write(tmp_path / "x", seed=11))
    ids = np.random.default_rng(5).integers(0, checkpoint.config.vocab_size, 75)
    peer = logits_of(load_transformers(checkpoint, torch.float32), ids)
    model = mxmoe.load(checkpoint.path, **FLOAT32.options)
    assert_model_close(model.forward(ids), peer, limit=MODEL_NOISE)
    broken(model)
    with pytest.raises(AssertionError, match="median row is off"):
        assert_model_close(model.forward(ids), peer, limit=MODEL_NOISE)
