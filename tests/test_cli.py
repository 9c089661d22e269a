"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mxmoe
from checkpoints import write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from make_checkpoint import byte_tokenizer

COMMAND = [sys.executable, "-m", "mxmoe"]
SMALL = {"vocab_size": 300, "eos_token_ids": (299,)}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def run_json(*arguments: str) -> dict[str, Any]:
    """Run with --json: stdout must be one JSON object and nothing else."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random checkpoint whose tokenizer spells bytes."""
    folder = write(tmp_path_factory.mktemp("cli") / "random", **SMALL)
    byte_tokenizer(SMALL["vocab_size"]).save(str(folder / "tokenizer.json"))
    return str(folder)


def test_generate_json_has_what_the_design_promises(model: str) -> None:
    result = run_json("generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "7", "--date", "2026-01-02")
    assert {"text", "analysis", "token_ids", "finish_reason", "prompt_tokens", "tokens_per_s"} <= result.keys()
    loaded = mxmoe.load(model)
    messages = [mxmoe.harmony.system_message("medium", "2026-01-02"), mxmoe.harmony.Message("user", "Hi")]
    prompt = mxmoe.harmony.render_conversation(messages, loaded.tokenizer)
    stops = mxmoe.harmony.stop_token_ids(loaded.tokenizer)
    steps = list(loaded.generate(prompt, 7, stop_token_ids=stops))
    assert result["token_ids"] == [step.token_id for step in steps]
    assert result["prompt_tokens"] == len(prompt)
    assert result["finish_reason"] == steps[-1].finish_reason
    assert result["tokens_per_s"] > 0


def test_generate_shows_the_same_text_as_json(model: str) -> None:
    arguments = ["generate", "--model", model, "--prompt", "Hi", "-n", "7", "--date", "2026-01-02"]
    shown, result = run(*arguments), run_json(*arguments)
    assert shown.returncode == 0
    assert result["text"] in shown.stdout
    assert "tokens/s" in shown.stderr and "tokens/s" not in shown.stdout


def test_raw_continues_the_prompt(model: str) -> None:
    result = run_json("generate", "-m", model, "--raw", "--prompt", "Once", "-n", "9")
    loaded = mxmoe.load(model)
    assert result["text"] == loaded.complete("Once", 9)
    assert result["prompt_tokens"] == len("Once")
    shown = run("generate", "-m", model, "--raw", "--prompt", "Once", "-n", "9")
    assert shown.stdout == "Once" + result["text"] + "\n"


def test_sampling_options_reach_the_sampler(model: str) -> None:
    arguments = ["generate", "-m", model, "--raw", "-p", "x", "-n", "12", "--temperature", "1.5"]
    by_seed = {seed: run_json(*arguments, "--seed", seed)["token_ids"] for seed in ("1", "2")}
    assert by_seed["1"] != by_seed["2"]
    assert run_json(*arguments, "--seed", "1")["token_ids"] == by_seed["1"]
    greedy = run_json("generate", "-m", model, "--raw", "-p", "x", "-n", "12")["token_ids"]
    assert run_json(*arguments, "--top-k", "1")["token_ids"] == greedy


def test_functions_and_instructions_are_rendered(model: str, tmp_path: Path) -> None:
    specs = tmp_path / "functions.json"
    specs.write_text(json.dumps([{"name": "f", "description": "Does f.", "parameters": None}]))
    plain = run_json("generate", "-m", model, "-p", "Hi", "-n", "1")["prompt_tokens"]
    called = run_json("generate", "-m", model, "-p", "Hi", "-n", "1", "--functions", str(specs))["prompt_tokens"]
    told = run_json("generate", "-m", model, "-p", "Hi", "-n", "1", "--instructions", "Be brief.")["prompt_tokens"]
    assert called > told > plain


def test_bench_json(model: str) -> None:
    arguments = ["bench", "-m", model, "-p", "40", "-n", "3", "--depth", "5", "-t", "1", "-r", "2"]
    result = run_json(*arguments, "--dense", "int8", "--activations", "float32")
    prefill, decode, ceilings = result["prefill"], result["decode"], result["ceilings"]
    assert result["peak_rss_bytes"] > 10_000_000
    assert (prefill["tokens"], decode["tokens"], result["depth"], result["batch"]) == (40, 3, 5, 1)
    assert (result["dense"], result["threads"], result["repetitions"]) == ("int8", 1, 2)
    assert ceilings["samples"] == 5  # before, between and after two repetitions of two parts
    assert ceilings["read_gb_s_min"] <= ceilings["read_gb_s"] <= ceilings["read_gb_s_max"]
    assert min(ceilings[name] for name in ("read_gb_s", "int8_gop_s", "bf16_gflop_s", "float32_gflop_s")) > 0
    for part in (prefill, decode):
        assert 0 < part["tokens_per_s_min"] <= part["tokens_per_s"] <= part["tokens_per_s_max"]
        assert part["tokens_per_s"] == pytest.approx(part["tokens"] / part["seconds"])
    # The shares are what the costs say of the speeds.
    costs = mxmoe.costs.Costs(mxmoe.Checkpoint.open(model).config, "int8", "float32")
    rate = costs.prefill_operations(40, depth=5) / prefill["seconds"] / 1e9
    assert prefill["share_of_peak"] == pytest.approx(rate / ceilings["float32_gflop_s"])
    read = sum(costs.decode_bytes(depth) for depth in (5, 6, 7)) / decode["seconds"] / 1e9
    assert decode["share_of_bandwidth"] == pytest.approx(read / ceilings["read_gb_s"])
    assert 0 < ceilings["read_gb_s_typical"] <= ceilings["read_gb_s_max"]
    assert decode["share_of_typical_bandwidth"] == pytest.approx(read / ceilings["read_gb_s_typical"])


def test_bench_counts_the_experts_of_a_batch(model: str) -> None:
    result = run_json("bench", "-m", model, "-p", "2", "-n", "2", "--batch", "3", "-t", "1", "-r", "1")
    config = mxmoe.Checkpoint.open(model).config
    assert result["decode"]["tokens"] == 6 and result["batch"] == 3
    assert config.experts_per_token <= result["decode"]["experts_read"] <= config.num_experts
    one = run_json("bench", "-m", model, "-p", "2", "-n", "2", "-t", "1", "-r", "1")
    assert one["decode"]["experts_read"] == config.experts_per_token
    assert result["decode"]["gb_per_token"] < one["decode"]["gb_per_token"]


def test_bench_for_people(model: str) -> None:
    done = run("bench", "-m", model, "-p", "4", "-n", "2", "-t", "1", "-r", "1", env={"COLUMNS": "200"})
    assert done.returncode == 0 and done.stderr == ""
    for word in ("prefill", "decode", "GFLOP/s", "GB/s", "peak resident memory", "1 threads"):
        assert word in done.stdout, done.stdout


def test_bench_leaves_its_own_buffer_out_of_the_memory(model: str) -> None:
    """The ceilings are read from hundreds of megabytes that are not the model's."""
    result = run_json("bench", "-m", model, "-p", "2", "-n", "1", "-t", "1", "-r", "1")
    assert result["peak_rss_bytes"] < 200 << 20


def test_info_counts_every_byte(model: str) -> None:
    result = run_json("info", "-m", model)
    stored = mxmoe.Checkpoint.open(model)
    assert result["weight_bytes"] == stored.nbytes == sum(c["bytes"] for c in result["components"].values())
    for tokens, memory in result["contexts"].items():
        assert memory["kv_cache_bytes"] == mxmoe.load(model).new_cache(int(tokens)).nbytes
    int8 = run_json("info", "-m", model, "--dense", "int8")
    assert int8["components"]["attention"]["dtype"] == "int8"
    assert int8["weight_bytes"] < result["weight_bytes"]
    assert run("info", "-m", model).returncode == 0


def test_info_counts_parameters(model: str) -> None:
    """The total must be what a count over the stored tensors gives."""
    stored, loaded = mxmoe.Checkpoint.open(model), mxmoe.load(model)
    arrays = [stored.embed_tokens, stored.norm, stored.lm_head]
    count = sum(a.size for a in arrays)
    for i in range(stored.config.num_hidden_layers):
        for name, array in vars(stored.layer(i)).items():
            count += 0 if name.endswith("_scales") else array.size * (2 if name.endswith("_blocks") else 1)
    assert run_json("info", "-m", model)["parameters"]["total"] == count
    assert loaded.config.num_hidden_layers == 2


def test_doctor_names_a_kernel_for_every_op() -> None:
    result = run_json("doctor")
    ops = {kernel["op"] for kernel in result["kernels"]}
    assert {"rmsnorm", "rope", "linear_bf16_bf16", "expert_routing", "mxfp4_moe_bf16", "sink_attention_bf16"} <= ops
    done = run("doctor")
    assert done.returncode == 0
    # What stands between this machine and a GPU is said in words, or the GPU named.
    cuda = result["cuda"]
    assert cuda["built"] or "without CUDA" in cuda["problem"]
    assert cuda["problem"] or cuda["devices"][0]["compute_capability"][0] >= 8
    assert "CUDA: " in done.stdout


def test_doctor_says_why_under_a_forced_instruction_set() -> None:
    done = run("doctor", "--json", env={"MXMOE_ISA": "scalar"})
    result = json.loads(done.stdout)
    assert result["isa"] == "scalar" and result["isa_source"] == "MXMOE_ISA"
    assert all(kernel["kernel"].endswith("_scalar") for kernel in result["kernels"])
    best = run_json("doctor")
    if best["isa"] != "scalar":
        assert any("AVX2" in kernel["why"] for kernel in result["kernels"])


BAD_USAGE = {
    "no such command": ["bogus"],
    "no prompt": ["generate"],
    "empty prompt": ["generate", "--prompt", ""],
    "negative temperature": ["generate", "--prompt", "x", "--temperature", "-1"],
    "temperature no number": ["generate", "--prompt", "x", "--temperature", "warm"],
    "top_p 0": ["generate", "--prompt", "x", "--top-p", "0"],
    "no tokens": ["generate", "--prompt", "x", "-n", "0"],
    "unknown effort": ["generate", "--prompt", "x", "--reasoning", "max"],
    "bad date": ["generate", "--prompt", "x", "--date", "yesterday"],
    "stop without raw": ["generate", "--prompt", "x", "--stop", "y"],
    "instructions with raw": ["generate", "--prompt", "x", "--raw", "--instructions", "y"],
    "functions missing": ["generate", "--prompt", "x", "--functions", "no-such-file.json"],
    "model missing": ["generate", "--prompt", "x", "--model", "./no-such-folder"],
    "unknown dense": ["info", "--dense", "fp8"],
    "unknown kv": ["info", "--kv", "fp8"],
    "unknown activations": ["info", "--activations", "fp8"],
    "unknown device": ["info", "--device", "tpu"],
    "negative threads": ["info", "-t", "-1"],
    "bench nothing": ["bench", "-p", "0"],
    "bench negative depth": ["bench", "--depth", "-1"],
    "bench empty batch": ["bench", "--batch", "0"],
    "bench no repetition": ["bench", "-r", "0"],
    "bench past the context": ["bench", "--depth", "200000"],
    "eval nothing": ["eval", "--n-per-task", "0"],
    "eval a model without harmony": ["eval", "--model", "MODEL-WITHOUT-TOKENIZER"],
}


@pytest.mark.parametrize("arguments", BAD_USAGE.values(), ids=BAD_USAGE.keys())
def test_bad_usage_is_one_sentence_and_exit_code_2(arguments: list[str], tmp_path: Path, model: str) -> None:
    if "MODEL-WITHOUT-TOKENIZER" in arguments:
        arguments = [str(write(tmp_path / "m")) if a == "MODEL-WITHOUT-TOKENIZER" else a for a in arguments]
    elif "--model" not in arguments and arguments[0] != "bogus":
        arguments = [*arguments, "--model", model]
    done = run(*arguments, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("mxmoe: error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_broken_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run("info", "--model", str(folder))
    assert done.returncode == 2 and "model.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_help_has_examples() -> None:
    for command in ("generate", "bench", "info", "doctor", "eval"):
        done = run(command, "--help")
        assert done.returncode == 0 and "Example" in done.stdout, command


def test_version() -> None:
    assert run("--version").stdout.startswith("mxmoe ")


@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
def test_ctrl_c_ends_at_once_without_a_traceback(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", **SMALL)
    byte_tokenizer(SMALL["vocab_size"]).save(str(folder / "tokenizer.json"))
    command = [*COMMAND, "generate", "-m", str(folder), "--raw", "-p", "x", "-n", "100000", "--temperature", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Shells start what runs in the background, such as these tests, deaf to this signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(20)  # it is generating now
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    errors = process.stderr.read().decode()
    assert process.wait(10) == 130
    # The promise is 100 ms; a busy test machine gets ten times that.
    assert time.monotonic() - begin < 1.0
    assert "Traceback" not in errors


def test_a_closed_pipe_is_no_traceback(model: str) -> None:
    command = [*COMMAND, "generate", "-m", model, "--raw", "-p", "x", "-n", "3000", "--temperature", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read().decode()
    assert process.wait(60) == 1
