"""The bits of a model with the true sizes of a layer: whatever the chunks, the company and the threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import assert_exact
from small_models import MODES, in_chunks, random_ids

VOCAB_SIZE, PROMPT = 300, 180  # past the sliding window of 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a sliding and a full layer of gpt-oss-20b, with eight of the experts and few tokens."""
    config = checkpoints.small_config(
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=8,
        experts_per_token=4,
        vocab_size=VOCAB_SIZE,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
        eos_token_ids=(VOCAB_SIZE - 1,),
    )
    return checkpoints.write(tmp_path_factory.mktemp("layers") / "model", config=config)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_same_bits_at_the_true_sizes(folder: Path, mode: dict[str, Any]) -> None:
    ids = random_ids(PROMPT, vocab_size=VOCAB_SIZE)
    model = mxmoe.load(folder, **mode, num_threads=2)
    want = model.forward(ids)
    for sizes in ([1, 63, 100], [128] + [1] * 10, [7, 150]):
        assert_exact(in_chunks(model, ids, sizes), want)
    other = random_ids(70, seed=1, vocab_size=VOCAB_SIZE)
    together = model.forward(np.concatenate([other, ids]), cu_seqlens=[0, 70, 70 + PROMPT])
    assert_exact(together[70:], want)
    assert_exact(together[:70], model.forward(other))
    for num_threads in (1, 3):
        assert_exact(mxmoe.load(folder, **mode, num_threads=num_threads).forward(ids), want)
