"""What a token costs, against figures counted by hand and against what the model holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import mxmoe
from checkpoints import small_config, write
from make_checkpoint import SIZES
from mxmoe.costs import Costs, distinct_experts

B20, B120 = SIZES["20b"], SIZES["120b"]


def test_published_figures() -> None:
    assert Costs(B20, "int8").decode_bytes() == pytest.approx(2.57e9, rel=2e-3)
    assert Costs(B20, "bf16").decode_bytes() == pytest.approx(3.7e9, rel=5e-3)
    assert Costs(B120, "bf16").decode_bytes() == pytest.approx(5.0e9, rel=2e-2)
    assert Costs(B20).prefill_operations(512) / 512 == pytest.approx(6.13e9, rel=1e-3)
    # With logits for every token instead of the last one, as a decoded token has them.
    for config, want in ((B20, 7.2e9), (B120, 10.2e9)):
        assert Costs(config).token_operations + Costs(config).lm_head_operations == pytest.approx(want, rel=1e-2)
    # 24 KiB a token of context in bf16, and 3.2 GB of it at the end (36 KiB and 4.8 GB for 120b).
    for config, want in ((B20, 24 << 10), (B120, 36 << 10)):
        costs = Costs(config)
        assert costs.kv_bytes(5000) - costs.kv_bytes(4999) == want
        assert costs.kv_bytes(131071) == pytest.approx(want * 131072, rel=2e-3)


def test_goals_at_depth_and_in_a_batch() -> None:
    """How much slower the bytes alone make a deep token, and how much faster a batch is."""
    costs = Costs(B20, "int8", "int8")
    start = costs.decode_bytes()
    assert start / Costs(B20, "int8", "bf16").decode_bytes(4096) == pytest.approx(0.96, abs=0.005)
    assert start / costs.decode_bytes(32768) == pytest.approx(0.86, abs=0.005)
    assert distinct_experts(32, 4, 16) == pytest.approx(28.2, abs=0.05)
    assert 16 * start / costs.decode_bytes(batch=16) == pytest.approx(4.0, abs=0.05)


def test_distinct_experts() -> None:
    assert distinct_experts(32, 4, 1) == pytest.approx(4.0)
    assert distinct_experts(8, 8, 3) == pytest.approx(8.0)
    rng = np.random.default_rng(0)
    drawn = [len({e for _ in range(5) for e in rng.permutation(12)[:3]}) for _ in range(4000)]
    assert distinct_experts(12, 3, 5) == pytest.approx(np.mean(drawn), rel=0.01)


@pytest.mark.parametrize("dense", ["bf16", "int8"])
@pytest.mark.parametrize("head_dim", [32, 24])
def test_bytes_are_those_that_a_model_holds(tmp_path: Path, dense: str, head_dim: int) -> None:
    """With every expert chosen, a token reads the whole model but for the other rows of the embedding."""
    config = small_config(
        num_experts=4, experts_per_token=4, num_attention_heads=5, num_key_value_heads=1, head_dim=head_dim
    )
    model = mxmoe.load(write(tmp_path / "m", config=config), dense=dense)  # type: ignore[arg-type]
    held = sum(int(part["bytes"]) for part in model.components.values())
    embedding = 2 * config.vocab_size * config.hidden_size - 2 * config.hidden_size
    costs = Costs(config, dense)  # type: ignore[arg-type]
    assert costs.decode_bytes() - costs.kv_bytes(0) == held - embedding


@pytest.mark.parametrize("kv", ["float32", "bf16", "int8"])
def test_kv_bytes_are_those_of_a_cache(kv: str) -> None:
    config = small_config(layer_types=("full_attention",) * 2, sliding_window=None)
    cache = mxmoe.KVCache(config, 128, dtype=kv, block_size=64)  # type: ignore[arg-type]
    assert Costs(config, kv=kv).kv_bytes(127) == cache.nbytes  # type: ignore[arg-type]


@pytest.mark.parametrize(("new", "depth"), [*itertools.product([1, 3, 8, 20], [0, 1, 5, 7, 8, 9, 30])])
def test_attention_counts_every_key(new: int, depth: int) -> None:
    config = small_config()
    assert config.layer_types == ("sliding_attention", "full_attention") and config.sliding_window == 8
    seen = sum(min(t + 1, 8) + t + 1 for t in range(depth, depth + new))
    want = 4 * config.num_attention_heads * config.head_dim * seen
    assert Costs(config).attention_operations(new, depth) == want


def test_operations_add_up() -> None:
    costs = Costs(small_config())
    whole = costs.prefill_operations(20)
    parts = costs.prefill_operations(12) + costs.prefill_operations(8, depth=12) - costs.lm_head_operations
    assert whole == parts
    assert costs.decode_operations(7) == costs.prefill_operations(1, 7)
    chosen = costs.config.experts_per_token * 3 * costs.config.intermediate_size * costs.config.hidden_size
    more = Costs(small_config(experts_per_token=costs.config.experts_per_token + 1))
    assert more.token_operations - costs.token_operations == 2 * 2 * chosen // costs.config.experts_per_token
