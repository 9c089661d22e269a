"""The benches' own machinery: what it checks, counts and compares."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import gpu_models
from checkpoints import write
from compare import assert_exact
from harness import Harness, Peer, Result, Work, copies
from make_checkpoint import SIZES
from mxmoe.ceilings import CeilingMeter, Ceilings
from peers import agreement, rounded_range
from shapes import shapes


def work(**changes: Any) -> Work:
    fields = {"op": "op", "shape": "s", "calls": [lambda: None], "nbytes": 2e9, "operations": 1e9}
    return Work(**(fields | {"activations": "int8", "check": lambda: None} | changes))


def test_a_result_is_held_against_the_larger_floor() -> None:
    ceilings = Ceilings(10.0, 100.0, 50.0, 20.0)
    reading = Result(work(), 0.4, 0.8, ceilings)
    assert (reading.bound, reading.gb_s, reading.gflop_s) == ("read", 5.0, 2.5)
    assert reading.share == pytest.approx(0.5) and reading.ratio == pytest.approx(2.0)
    busy = Result(work(operations=1e11), 4.0, None, ceilings)
    assert busy.bound == "peak" and busy.share == pytest.approx(0.25) and busy.ratio is None
    assert busy.to_dict()["share_of_floor"] == pytest.approx(0.25) and busy.to_dict()["peer"] is None


def test_nothing_wrong_is_timed() -> None:
    ran = []

    def wrong() -> None:
        raise AssertionError("element (0, 0) is 1, expected 2")

    harness = Harness(CeilingMeter(1, 1 << 20))
    with pytest.raises(AssertionError, match="expected 2"):
        harness.run(work(check=wrong, calls=[lambda: ran.append(1)]))
    assert not ran and not harness.results


def test_calls_take_turns_and_the_peer_runs_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.ROUND_SECONDS", 1e-5)
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    harness = Harness(CeilingMeter(1, 1 << 20))
    result = harness.run(work(calls=calls, peer=Peer("other", [lambda: order.append("-")])))
    ours = "".join(order).replace("-", "")
    assert ours.startswith("abcabc") and ours == ("abc" * len(ours))[: len(ours)]
    rounds = [part for part in "".join(order).split("-") if part]
    assert len(rounds) >= 7  # the peer stands between them
    assert harness.results == [result] and result.seconds > 0 and result.peer_seconds is not None
    console = Console(width=160, record=True, file=io.StringIO())
    harness.show(console)
    assert "other" in console.export_text()


def test_inputs_go_round_more_memory_than_a_cache_holds() -> None:
    assert copies(1 << 30) == 1
    assert copies(12 << 20) * (12 << 20) >= 256 << 20
    assert copies(10) == copies(0) == 64


def test_the_quick_selection_is_part_of_the_full_one() -> None:
    everything = shapes(("a", "b"), ("m",), full_whats=("c",), full_modes=("n",))
    quick = {str(shape) for shape in everything if not shape.full}
    assert quick == {f"20b, {phase}, {what}, m" for phase in ("decode", "prefill 512") for what in "ab"}
    assert len({str(shape) for shape in everything}) == len(everything) == 2 * 4 * 3 * 2


def test_agreement_tells_same_from_different() -> None:
    rng = np.random.default_rng(0)
    a, noise = rng.standard_normal((5, 100)) * 2, rng.standard_normal((5, 100))
    same = agreement(a, a + 3.0)  # a constant changes no probability
    assert same["correlation_mean"] == pytest.approx(1) and same["same_top_token"] == 1.0
    assert same["kl_there_mean"] == pytest.approx(0, abs=1e-9) == same["kl_back_median"]
    near, far = agreement(a, a + 0.01 * noise), agreement(a, noise)
    assert 0 < near["kl_there_mean"] < 1e-3 < far["kl_there_mean"]
    assert far["correlation_median"] < 0.5 < near["correlation_median"] < 1
    assert near["kl_there_mean"] != near["kl_back_mean"]


def test_the_rounded_twin_differs_in_one_word(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    before = json.loads((folder / "config.json").read_text())
    with rounded_range(folder) as twin:
        config = json.loads((twin / "config.json").read_text())
        assert config["rope_parameters"].pop("truncate") is True
        assert before["rope_parameters"].pop("truncate") is False
        assert config == before
        assert (twin / "model.safetensors").samefile(folder / "model.safetensors")
    assert not twin.exists() and (folder / "model.safetensors").is_file()


def test_two_layers_stand_for_all() -> None:
    model = gpu_models.random_model(SIZES["tiny"], "cpu")
    assert len(model.layers) == SIZES["tiny"].num_hidden_layers == 4
    queries = [layer.self_attn.q_proj.weight for layer in model.layers]
    assert_exact(queries[2], queries[0])
    assert_exact(queries[3], queries[1])
    assert (queries[0] != queries[1]).any()
    assert [layer.self_attn.window for layer in model.layers] == [16, None, 16, None]
    assert np.isfinite(model.forward(np.arange(20))).all()
