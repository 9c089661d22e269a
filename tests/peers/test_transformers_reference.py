"""The oracle against transformers' own gpt-oss, both in float64 and in float32, on odd configurations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import checkpoints
from compare import relative_error
from mxmoe.checkpoint import Checkpoint
from mxmoe.reference import model as reference
from transformers_models import CONFIGS, PLAIN, YARN, load_transformers, logits_of, torch


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers") / "x"
    return Checkpoint.open(checkpoints.write(folder, config=request.param, seed=3))


@pytest.fixture
def ids(checkpoint):
    # Three windows long, so that sliding layers forget, and past the original context of the short YaRN.
    return np.random.default_rng(7).integers(0, checkpoint.config.vocab_size, 75)


def test_logits_agree_in_float64(checkpoint, ids):
    want = reference.forward(checkpoint, ids)
    got = logits_of(load_transformers(checkpoint, torch.float64), ids)
    # transformers forms frequencies, angles and the norm in float32 whatever the model's dtype.
    error = relative_error(got, want)
    assert np.median(error) < 1e-6
    assert error.max() < 5e-6


def test_logits_agree_in_float32(checkpoint, ids):
    want = reference.forward(checkpoint, ids)
    got = logits_of(load_transformers(checkpoint, torch.float32), ids)
    error = relative_error(got, want)
    assert np.median(error) < 2e-6
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.95


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 9},
        {"layer_types": ("full_attention", "sliding_attention")},
        {"swiglu_limit": 1.0},
        {"swiglu_alpha": 1.6},
        {"rope": PLAIN},
        {"rope": replace(YARN, truncate=True)},
        {"experts_per_token": 1},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_a_wrong_constant_is_seen(tmp_path, changes):
    right = checkpoints.small_config()
    checkpoint = Checkpoint.open(checkpoints.write(tmp_path / "x", config=right))
    ids = np.random.default_rng(7).integers(0, right.vocab_size, 75)
    got = logits_of(load_transformers(checkpoint, torch.float64), ids)
    assert np.median(relative_error(got, reference.forward(checkpoint, ids))) < 1e-6
    checkpoint.config = replace(right, **changes)
    assert np.median(relative_error(got, reference.forward(checkpoint, ids))) > 2e-5
