"""What bench/gpu.sh runs, on the emulation and tiny shapes: that it works and tells what it should, not how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import checkpoints  # which makes bench/ importable
import gpu_cases
import gpu_models
import gpu_ops
import gpu_repeats
import gpu_summary
from compare import assert_exact
from cuda_helpers import EMULATION
from gpu_peers import Torch
from make_checkpoint import SIZES
from mxmoe import ceilings, cuda
from mxmoe.ceilings import GpuCeilings, GpuMeter, TorchProducts
from mxmoe.commands import bench

SMALL = {"bfloat16": 48, "float32": 48}
SCRIPT = Path(checkpoints.__file__).parents[1] / "bench" / "gpu.sh"


@pytest.fixture(autouse=True)
def _small_meter(monkeypatch):
    monkeypatch.setattr(ceilings, "_BUFFER_BYTES", 1 << 20)


def text_of(show, *args):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(*args, console)
    return console.export_text()


# Ceilings


def test_the_meter_takes_products_where_torch_has_them(gpu):
    meter = GpuMeter(TorchProducts("cpu", SMALL))
    with pytest.raises(ValueError, match="no samples"):
        meter.median()
    for _ in range(2):
        sample = meter.sample()
    assert sample.read_gb_s > 0 and sample.bf16_gflop_s > 0 and sample.float32_gflop_s > 0
    middle = meter.median()
    assert middle.bf16_gflop_s == pytest.approx(np.mean([s.bf16_gflop_s for s in meter.samples]))
    bare = GpuMeter(None)
    assert bare.sample() == GpuCeilings(bare.samples[0].read_gb_s) == bare.median()


def test_a_gpus_floor_is_the_longer_of_the_two():
    known = GpuCeilings(100.0, 800.0, 50.0)
    assert [known.peak(a) for a in ("bf16", "float32", "int8")] == [800.0, 50.0, None]
    assert known.seconds(1e11, 8e10, "bf16") == pytest.approx(1.0)
    assert known.seconds(1e9, 8e11, "bf16") == pytest.approx(1.0)
    assert known.seconds(1e9, 8e11, "float32") == pytest.approx(16.0)
    assert GpuCeilings(100.0).seconds(1e9, 8e11, "bf16") == pytest.approx(0.01)


@pytest.mark.parametrize("with_torch", [True, False])
def test_bench_tells_the_shares(emulation, monkeypatch, with_torch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    found = TorchProducts("cpu", SMALL) if with_torch else None
    monkeypatch.setattr(TorchProducts, "find", classmethod(lambda cls: found))
    model = gpu_models.random_model(SIZES["tiny"])
    result = bench.run(model, bench.Plan(prompt_tokens=9, new_tokens=2, depth=20, batch=2, repetitions=1))
    assert result["device"] == "cuda" and result["decode"]["share_of_bandwidth"] > 0
    assert result["ceilings"]["read_gb_s"] > 0 and result["decode"]["tokens_per_s"] > 0
    share = result["prefill"]["share_of_peak"]
    assert share == (
        pytest.approx(result["prefill"]["gflop_per_s"] / result["ceilings"]["bf16_gflop_s"]) if with_torch else None
    )
    bench.show(result)
    assert ("not measured" in capsys.readouterr().out) == (not with_torch)


# Ops


def test_every_op_is_timed_beside_torch(emulation):
    found = gpu_ops.run(["tiny"], quick=False, only="", seconds=1e9, torch=Torch("cpu"))
    assert [row for row in found["results"] if "problem" in row or "problem" in row.get("peers", {})] == []
    ops = {row["op"] for row in found["results"]}
    assert ops >= {"mxfp4_moe", "qkv", "o_proj", "lm_head", "sink_attention", "rmsnorm", "rope", "kv_cache_write"}
    assert ops >= {"rmsnorm_qkv_rope", "rmsnorm_routing", "expert_routing", "greedy_sample", "embedding"}
    assert all(row["share_of_floor"] > 0 and row["seconds"] > 0 for row in found["results"])
    for op in ("mxfp4_moe", "qkv", "lm_head", "sink_attention", "rmsnorm"):
        assert any(row["op"] == op and row.get("peers") for row in found["results"])
    text = text_of(gpu_ops.show, found)
    assert "sink_attention" in text and "no peak" in text and "sdpa" in text


def test_what_is_wrong_is_told_and_the_rest_goes_on(emulation):
    one = cuda.array(np.ones((2, 64), np.float32))
    calls = [lambda: cuda.rmsnorm(one, cuda.array(np.ones(64, np.float32)))]

    def broken_peer(torch):
        raise RuntimeError("no such kernel")

    def wrong():
        gpu_cases.agree(np.ones(3), np.zeros(3), "rmsnorm")

    weight = cuda.array(np.ones(64, np.float32))
    good = [lambda: cuda.rmsnorm(one, weight)]
    bench_of = gpu_ops.Bench(GpuMeter(None), Torch("cpu"))
    bench_of.run(gpu_cases.GpuWork("rmsnorm", "wrong", good, 8.0, 0.0, wrong))
    bench_of.run(gpu_cases.GpuWork("rmsnorm", "allocates", calls, 8.0, 0.0, lambda: None))
    bench_of.run(gpu_cases.GpuWork("rmsnorm", "right", good, 8.0, 0.0, lambda: None, peer=broken_peer))

    def makes_none():
        raise MemoryError("no room for a cache")

    bench_of.run_all(makes_none, "")
    rows = bench_of.finish()["results"]
    assert "away from the CPU's" in rows[0]["problem"] and "graph" in rows[1]["problem"]
    assert rows[2]["seconds"] > 0 and rows[2]["peers"]["problem"] == "RuntimeError: no such kernel"
    assert "no room for a cache" in rows[3]["problem"]
    assert "failed" in text_of(gpu_ops.show, bench_of.finish())


@pytest.mark.parametrize("got", [[1.0, np.nan], [1.0, -2.0], [[1.0, 2.0]]])
def test_agreement_is_not_given_away(got):
    gpu_cases.agree(np.array([1.001, 2.0]), np.array([1.0, 2.0]), "it")
    with pytest.raises(AssertionError, match="it"):
        gpu_cases.agree(np.array(got), np.array([1.0, 2.0]), "it")


# Repeats


def test_every_op_gives_the_same_bits_again(gpu):
    if gpu.architectures() == "emulation":
        pytest.skip("the script below does it there")
    rows = gpu_repeats.run("tiny", 2, 1e9, seed=3)
    assert {row["repeats"] for row in rows} == {2} and {row["different"] for row in rows} == {0}
    assert {row["op"] for row in rows} >= {"model", "mxfp4_moe", "sink_attention", "qkv", "rmsnorm_qkv_rope"}


def test_other_bits_are_counted(emulation):
    given = iter([1.0, 1.0, np.nextafter(1.0, 2.0), 1.0, 2.0])
    assert gpu_repeats.repeat(lambda: cuda.array(np.full(3, next(given))), 4, 1e9) == (4, 2)
    assert gpu_repeats.repeat(lambda: cuda.array(np.zeros(3)), 100, -1.0) == (0, 0)


# Models


def test_two_layers_on_the_gpu_stand_for_all(emulation):
    model = gpu_models.random_model(SIZES["tiny"])
    weights = [layer.mlp.experts.down_blocks for layer in model.layers]
    assert_exact(weights[2].numpy(), weights[0].numpy())
    assert (weights[1].numpy() != weights[0].numpy()).any()
    assert len({weight.data_ptr for weight in weights}) == len(weights)
    held = sum(part["bytes"] for part in model.components.values())
    assert held == gpu_models.RandomWeights(SIZES["tiny"], False).nbytes
    cpu = gpu_models.random_model(SIZES["tiny"], "cpu").forward(np.arange(12))
    assert np.linalg.norm(model.forward(np.arange(12)) - cpu) < 0.1 * np.linalg.norm(cpu)


def test_models_are_measured_and_summed_up(emulation, tmp_path, monkeypatch):
    model = gpu_models.random_model(SIZES["tiny"])
    runs = gpu_models.measure(model, [1, 2], 8, 2, depth=40, repetitions=1)
    assert [(run["device"], run["batch"], run["depth"]) for run in runs] == [
        ("cuda", 1, 0), ("cuda", 2, 0), ("cuda", 1, 38),
    ]  # fmt: skip
    assert runs[0]["generated_tokens_per_s"] > 0 and runs[2]["free_bytes"] > 0
    assert "tiny" in text_of(gpu_models.show, {"tiny": runs})

    monkeypatch.setenv("OUT", str(tmp_path))
    fast = runs[0]["decode"] | {"tokens_per_s": 560.0, "share_of_bandwidth": 0.69}
    runs[0] |= {"decode": fast, "generated_tokens_per_s": 540.0}
    deep = runs[2] | {"depth": 131072 - runs[2]["decode"]["tokens"]}
    from gpu_timing import save

    save("models-20b", {"20b": [runs[0], runs[1] | {"decode": fast}]})
    save("models-120b", {"120b": [deep]})
    ops = {"op": "mxfp4_moe", "shape": "x", "seconds": 1.0, "gflop_s": 4e5, "share_of_floor": 0.5, "goal": 0.4}
    failed = {"op": "a", "shape": "b", "problem": "c"}
    save("ops", {"ceilings": vars(GpuCeilings(3000.0, 8e5)), "results": [ops, failed]})
    save("repeats", [{"op": "q", "shape": "s", "repeats": 9, "different": 1}])
    (tmp_path / "parts.txt").write_text("ops: ok, 3 s\n")
    rows = {what: (seen, goal) for what, seen, goal in gpu_summary.rows(tmp_path)}
    assert rows["20b decode, batch 1"][1] == "550: 98% of it (700 hoped for)"
    assert rows["20b decode, batch 2"][1] == "70%: 99% of it"
    assert rows[f"120b decode, batch 1, depth {deep['depth']}"][1] == "131072 tokens fit: they do"
    assert rows["mxfp4_moe x"] == ("400 TFLOP/s, 50% of the floor", "40%: reached")
    assert rows["a b"][0] == "failed: c" and rows["the same bits again"][1] == "always: not in q s"
    assert rows["bf16 product of 8192 x 8192"][0] == "800 TFLOP/s"
    text = text_of(gpu_summary.show, tmp_path)
    assert "ops: ok, 3 s" in text and "the times mean nothing" in text


def test_arrays_on_the_gpu_are_set_from_others_there(gpu):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    held, room = cuda.array(x), cuda.array(np.zeros((4, 3), np.float32))
    room.set(held[:, 2:5])
    assert_exact(room.numpy(), x[:, 2:5])
    with pytest.raises(ValueError, match=r"array is float32 of shape \(4, 6\); wanted float32 of shape \(4, 3\)"):
        room.set(held)
    with pytest.raises(ValueError, match="what is set"):
        held[:, 1:4].set(room)
    with pytest.raises(ValueError, match="shares memory"):
        held[:2].set(held[1:3])
    room.read_only = True
    with pytest.raises(ValueError, match="read-only"):
        room.set(cuda.array(np.ones((4, 3), np.float32)))


# The script


def gpu_sh(*parts, **environment):
    done = subprocess.run(
        ["bash", str(SCRIPT), *parts], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_gpu_sh_names_its_parts():
    code, _, error = gpu_sh("benches")
    assert code == 2
    assert error == "gpu.sh: benches is no part; wanted build, tests, repeats, sanitizer, ops or models\n"


@pytest.mark.skipif(cuda.problem() is None, reason="there is a GPU")
@pytest.mark.parametrize("part", ["tests", "sanitizer"])
def test_gpu_sh_does_not_pass_what_it_skips(tmp_path, part):
    path = os.pathsep.join(p for p in sys.path if p)
    code, output, _ = gpu_sh(part, OUT=str(tmp_path), PYTHONPATH=path)
    assert code == 1 and f"{part}: failed" in output
    assert str(cuda.problem()) in (tmp_path / f"{part}.log").read_text()


def test_gpu_sh_runs_a_part_and_sums_up(emulation, tmp_path):
    folder = str(Path(os.environ[EMULATION]).resolve())
    path = os.pathsep.join(p for p in sys.path if p)
    options = {"OUT": str(tmp_path), "SIZES": "tiny", "REPEATS": "1", EMULATION: folder, "PYTHONPATH": path}
    code, output, error = gpu_sh("repeats", **options)
    assert code == 0, output + error
    assert "repeats: ok" in output and "the times mean nothing" in output
    rows = json.loads((tmp_path / "repeats.json").read_text())["repeats"]
    assert max(row["repeats"] for row in rows) == 1 and {row["different"] for row in rows} == {0}
    assert {row["op"] for row in rows} >= {"model", "mxfp4_moe", "sink_attention", "qkv", "rmsnorm_qkv_rope"}
    code, output, _ = gpu_sh("repeats", **(options | {EMULATION: str(tmp_path)}))
    assert code == 1 and "repeats: failed" in output
