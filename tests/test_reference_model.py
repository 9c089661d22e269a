"""The oracle of the whole model: its attention, its order, what it shows and refuses."""

from __future__ import annotations

import numpy as np
import pytest

import checkpoints
from compare import assert_exact
from mxmoe.checkpoint import Checkpoint
from mxmoe.reference import model as reference_model
from mxmoe.reference import ops
from reference_cases import Batch, same


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Checkpoint.open(checkpoints.write(tmp_path_factory.mktemp("reference") / "x", num_hidden_layers=3))


def test_model_attention_is_the_paged_op():
    batch = Batch([23], [23])
    for window in (None, 7):
        share = np.empty((23, 4))
        paged = batch.run(window, sink_share=share)
        args = (batch.q, batch.k[0], batch.v[0], batch.sinks)
        dense, dense_share = reference_model.attention(*(a.astype(float) for a in args), 0.25, window)
        same(dense, paged)
        same(dense_share, share)


def test_model_is_causal(small):
    ids = np.arange(20) * 37 % 128
    logits = reference_model.forward(small, ids)
    assert logits.shape == (20, 128)
    assert logits.dtype == np.float64
    same(reference_model.forward(small, ids[:13]), logits[:13])
    changed = ids.copy()
    changed[12] += 1
    again = reference_model.forward(small, changed)
    same(again[:12], logits[:12])
    assert np.abs(again[12:] - logits[12:]).min(axis=1).max() > 0


def test_model_captures_every_stage(small):
    capture = {}
    logits = reference_model.forward(small, np.array([5, 3, 5]), capture=capture)
    config = small.config
    shapes = {
        "residual": (3, config.hidden_size),
        "attention_residual": (3, config.hidden_size),
        "sink_share": (3, config.num_attention_heads),
        "router_logits": (3, config.num_experts),
        "topk_ids": (3, config.experts_per_token),
        "topk_weights": (3, config.experts_per_token),
    }
    assert capture["embedding"].shape == (3, config.hidden_size)
    for i in range(3):
        for name, shape in shapes.items():
            assert capture[f"layers.{i}.{name}"].shape == shape
    assert len(capture) == 1 + 3 * len(shapes)
    last = ops.rmsnorm(capture["layers.2.residual"], small.norm, config.rms_norm_eps)
    assert_exact(ops.linear(last, small.lm_head), logits)


@pytest.mark.parametrize("ids", [[], [[1, 2]], [0.5], [-1], [128], 3, ["a"]])
def test_model_refuses_what_is_no_prompt(small, ids):
    with pytest.raises(ValueError, match="token_ids"):
        reference_model.forward(small, ids)
