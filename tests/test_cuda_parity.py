"""The model on a GPU against transformers, and on the tiny model's held-out problems."""

from __future__ import annotations

import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import MODEL_NOISE, assert_exact, assert_model_close, row_errors
from mxmoe import cuda
from mxmoe.checkpoint import Checkpoint
from mxmoe.evaluation import evaluate
from mxmoe.reference import model as reference
from mxmoe.tiny.problems import eval_problems
from small_models import in_chunks
from transformers_models import CONFIGS, Mode, load_transformers, logits_of, rounded_logits, torch

FLOAT32 = Mode("bf16", "float32", "float32")
ROUNDING = [Mode("bf16", "bf16", "bf16"), Mode("bf16", "int8", "bf16")]
# The emulation takes the longest of these alone; a GPU takes them all.
EMULATED = "three layers, eight experts, four chosen"
NAMES = list(CONFIGS) if cuda.problem() is None else [EMULATED]
# Past the window, on the emulation, and past the original context of the short YaRN.
TOKENS = {True: 24, False: 150}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("peers") / "x"
            made[name] = Checkpoint.open(checkpoints.write(folder, config=CONFIGS[name], seed=11))
        return made[name]

    return make


@pytest.fixture(params=NAMES)
def case(request, gpu, checkpoint_of):
    """A checkpoint, a prompt and the float64 reference's logits."""
    emulated = gpu.architectures() == "emulation"
    if emulated and request.param != EMULATED:
        pytest.skip("for a GPU")
    checkpoint = checkpoint_of(request.param)
    ids = np.random.default_rng(5).integers(0, checkpoint.config.vocab_size, TOKENS[emulated])
    return checkpoint, ids, reference.forward(checkpoint, ids)


def test_float32_agrees_to_its_own_noise(case):
    checkpoint, ids, want = case
    peer = logits_of(load_transformers(checkpoint, torch.float32), ids)
    got = mxmoe.load(checkpoint.path, **FLOAT32.options, device="cuda").forward(ids)
    assert np.median(row_errors(got, peer)) < MODEL_NOISE
    assert_model_close(got, want, peer, limit=MODEL_NOISE)


@pytest.mark.parametrize("mode", ROUNDING, ids=str)
def test_rounding_modes_err_as_torch_does(case, mode):
    checkpoint, ids, want = case
    peer = rounded_logits(checkpoint, ids, mode)
    got = mxmoe.load(checkpoint.path, **mode.options, device="cuda").forward(ids)
    assert_model_close(got, want, peer)
    # Rounding at the very same places leaves us nearer to one another than either is to the truth.
    assert np.median(row_errors(got, peer)) < 0.9 * np.median(row_errors(peer, want))


def test_greedy_text_is_transformers(case):
    checkpoint, ids, _ = case
    new = 6 if len(ids) < 100 else 50
    peer = load_transformers(checkpoint, torch.float32)
    peer.generation_config.eos_token_id = None
    prompts = torch.from_numpy(ids[:16])[None]
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "use_cache": False}
    with torch.inference_mode():
        want = peer.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[0, 16:].tolist()
    model = mxmoe.load(checkpoint.path, **FLOAT32.options, device="cuda")
    assert [step.token_id for step in model.generate(ids[:16], new, stop_token_ids=[])] == want
    assert len(set(want)) > 2, "a text that repeats itself proves little"


def test_a_mixed_mode_gives_the_same_bits_in_chunks_and_company(gpu, checkpoint_of):
    checkpoint = checkpoint_of(EMULATED)
    model = mxmoe.load(checkpoint.path, device="cuda", kv="float32")
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 14)
    want = model.forward(ids)
    assert_exact(in_chunks(model, ids, [6, *[1] * 8]), want)
    together = model.forward(np.concatenate([ids[:5], ids]), cu_seqlens=[0, 5, 19])
    assert_exact(together, np.concatenate([want[:5], want]))


def test_problems_are_solved_as_on_the_cpu(gpu, monkeypatch):
    problems = eval_problems(2)
    if gpu.architectures() == "emulation":  # those with the shortest answers
        problems = [p for p in problems if p.task == "count_items"][1:]
    monkeypatch.setattr("mxmoe.evaluation.eval_problems", lambda n, seed: problems)
    want, got = evaluate(mxmoe.load("tiny")), evaluate(mxmoe.load("tiny", device="cuda"))
    assert want.total.correct >= 0.8 * want.total.n
    assert abs(got.total.correct - want.total.correct) <= 0.1 * want.total.n
