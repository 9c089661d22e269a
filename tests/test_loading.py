"""Loading: what is held in what, how much memory it takes on the way, and what is refused."""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints
import mxmoe
import small_tokenizer
from compare import MODEL_NOISE, assert_exact, assert_model_close
from mxmoe import ops
from mxmoe.checkpoint import Checkpoint, CheckpointError
from mxmoe.packing import prefers_packed
from mxmoe.tokenizer import TokenizerError
from small_models import CONFIG, MODES, random_ids, write

IDS = random_ids(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("loading") / "small")


def projections(layer):
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


# What is held in what


def test_weights_are_those_of_the_file(folder):
    model = mxmoe.load(folder)
    assert model.path == folder
    assert model.config == CONFIG
    stored = Checkpoint.open(folder)
    assert_exact(model.embed_tokens.weight, stored.embed_tokens)
    assert_exact(model.lm_head.weight, stored.lm_head)
    assert_exact(model.norm.weight, stored.norm)
    for i, layer in enumerate(model.layers):
        w, experts = stored.layer(i), layer.mlp.experts
        for p, linear in zip("qkvo", projections(layer), strict=True):
            assert_exact(linear.weight, getattr(w, f"{p}_proj_weight"))
            assert_exact(linear.bias, getattr(w, f"{p}_proj_bias"))
            assert linear.scales is None
        for name in ("gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias"):
            assert_exact(getattr(experts, name), getattr(w, name))
        assert_exact(layer.mlp.router.weight, w.router_weight)
        assert layer.self_attn.window == (20 if i % 2 == 0 else None)


def test_weights_are_views_of_the_mapped_file(folder):
    with ops.isa("scalar"):  # whose kernels take weights as they are stored
        model = mxmoe.load(folder, activations="float32")
    layer = model.layers[1]
    for array in (layer.mlp.experts.down_blocks, layer.self_attn.q_proj.weight, model.embed_tokens.weight):
        assert not array.flags.writeable
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def test_what_a_model_takes_is_what_the_checkpoint_has(folder):
    model = mxmoe.load(folder)
    assert sum(part["bytes"] for part in model.components.values()) == Checkpoint.open(folder).nbytes
    dense = {name: part["bytes"] for name, part in mxmoe.load(folder, dense="int8").components.items()}
    # A byte each and two for every 32, where there were two each; the biases stay.
    assert dense["lm_head"] == model.components["lm_head"]["bytes"] // 2 * 34 // 32
    assert dense["attention"] < 0.6 * model.components["attention"]["bytes"]
    assert dense["experts"] == model.components["experts"]["bytes"]


def test_int8_rounds_the_dense_layers_and_nothing_else(folder):
    plain, rounded = mxmoe.load(folder), mxmoe.load(folder, dense="int8")
    pairs = [(plain.lm_head, rounded.lm_head)]
    for a, b in zip(plain.layers, rounded.layers, strict=True):
        pairs += zip(projections(a), projections(b), strict=True)
        assert_exact(b.mlp.router.weight, a.mlp.router.weight)
        assert b.mlp.router.scales is None
        assert_exact(b.mlp.experts.down_blocks, a.mlp.experts.down_blocks)
    for a, b in pairs:
        assert b.weight.dtype == np.int8
        assert b.scales.dtype == ml_dtypes.bfloat16
        assert b.scales.shape == (a.weight.shape[0], a.weight.shape[1] // 32)
        exact = a.weight.astype(np.float64).reshape(*b.scales.shape, 32)
        steps = b.scales.astype(np.float64)[..., None]
        assert (np.abs(b.weight.reshape(exact.shape) * steps - exact) <= steps / 2).all()
    assert_exact(rounded.embed_tokens.weight, plain.embed_tokens.weight)


def test_int8_leaves_a_weight_without_whole_blocks(tmp_path):
    folder = checkpoints.write(
        tmp_path / "x", head_dim=16, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=1
    )
    attention = mxmoe.load(folder, dense="int8").layers[0].self_attn
    assert attention.q_proj.weight.dtype == np.int8
    assert attention.o_proj.weight.dtype == ml_dtypes.bfloat16  # its input has 48 columns
    assert attention.o_proj.scales is None


def test_the_router_computes_in_float32_in_every_mode(folder):
    for options in MODES.values():
        model = mxmoe.load(folder, **options)
        assert {layer.mlp.router.activations for layer in model.layers} == {"float32"}
        activations = {p.activations for layer in model.layers for p in projections(layer)}
        assert activations == {model.lm_head.activations} == {options["activations"]}


def test_the_reference_backend_computes_on_the_same_codes(folder):
    kernels = mxmoe.load(folder, dense="int8", kv="float32", activations="float32")
    slow = mxmoe.load(folder, dense="int8", backend="reference")
    assert_exact(slow.lm_head.weight, kernels.lm_head.weight)
    assert_exact(slow.layers[0].self_attn.k_proj.scales, kernels.layers[0].self_attn.k_proj.scales)
    assert_model_close(kernels.forward(IDS), slow.forward(IDS), limit=MODEL_NOISE)


def test_options_are_kept_and_shown(folder):
    model = mxmoe.load(folder, dense="int8", kv="int8", activations="float32", num_threads=2)
    options = model.options
    assert (options.device, options.dense, options.kv) == ("cpu", "int8", "int8")
    assert (options.activations, options.num_threads, options.backend) == ("float32", 2, "kernels")
    shown = repr(model)
    for part in ("small", "3 layers", "8 experts", "dense=int8", "kv=int8", "activations=float32"):
        assert part in shown


def test_none_stands_for_the_default(folder):
    assert mxmoe.load(folder, dense=None, kv=None, activations=None).options == mxmoe.load(folder).options


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
def test_paths_of_every_kind(folder, kind, monkeypatch):
    want = mxmoe.load(folder).forward(IDS)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in ("small", "./small", "~/small"):
        assert_exact(mxmoe.load(kind(path)).forward(IDS), want)


def test_the_tokenizer_is_the_folder_s_or_none(folder, tmp_path):
    assert mxmoe.load(folder).tokenizer is None
    path = write(tmp_path / "x")
    backend = small_tokenizer.backend()
    backend.save(str(path / "tokenizer.json"))
    assert mxmoe.load(path).tokenizer.vocab_size == backend.get_vocab_size()
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a valid"):
        mxmoe.load(path)


# What is refused


BAD_OPTIONS = {
    "device": ({"device": "tpu"}, "device is 'tpu'; wanted 'cpu'"),
    "dense": ({"dense": "fp8"}, "dense is 'fp8'; wanted 'bf16' or 'int8'"),
    "dense in float32": ({"dense": "float32"}, "dense is 'float32'"),
    "kv": ({"kv": "int4"}, "kv is 'int4'; wanted 'float32' or 'bf16' or 'int8'"),
    "activations": ({"activations": "BF16"}, "activations is 'BF16'"),
    "backend": ({"backend": "torch"}, "backend is 'torch'; wanted 'kernels' or 'reference'"),
    "negative threads": ({"num_threads": -1}, r"num_threads is -1; wanted 0 \(all CPUs\) to 1024"),
    "many threads": ({"num_threads": 1025}, "num_threads is 1025"),
    "half a thread": ({"num_threads": 1.5}, "num_threads is 1.5"),
    "truth for threads": ({"num_threads": True}, "num_threads is True"),
    "a list": ({"dense": ["int8"]}, r"dense is \['int8'\]"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message) as problem:
        mxmoe.load("/nowhere/at/all", **options)
    checkpoints.assert_clear(problem)


def test_missing_folders_are_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError) as problem:
            mxmoe.load(path)
        checkpoints.assert_clear(problem, str(path))


def test_wide_heads_are_refused(tmp_path):
    folder = checkpoints.write(
        tmp_path / "x", head_dim=258, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1
    )
    with pytest.raises(ValueError, match="head_dim is 258; the attention kernels take up to 256") as problem:
        mxmoe.load(folder)
    checkpoints.assert_clear(problem)


@pytest.mark.parametrize("name", ["down_proj_scales", "gate_up_proj_bias", "q_proj.weight"])
def test_broken_values_are_refused_in_every_mode(tmp_path, name):
    path = write(tmp_path / "x") / "model.safetensors"
    header, data = checkpoints.read_safetensors(path)
    tensor = next(key for key in header if "layers.2" in key and key.endswith(name))
    begin = header[tensor]["data_offsets"][0]
    broken = bytearray(data)
    broken[begin : begin + 2] = b"\xff\xff"
    checkpoints.write_safetensors(path, header, bytes(broken))
    for options in MODES.values():
        with pytest.raises(CheckpointError, match=re.escape(tensor)) as problem:
            mxmoe.load(path.parent, **options)
        checkpoints.assert_clear(problem)


# Progress


def test_progress_goes_to_stderr_and_only_when_wanted(folder, capsys, monkeypatch):
    for progress in (None, False):
        mxmoe.load(folder, progress=progress)
        assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    monkeypatch.setenv("TERM", "xterm")
    for progress in (True, None):
        mxmoe.load(folder, progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        assert "Loading small" in err
        # The bar ends at the whole: as many bytes as there are.
        shown = re.findall(r"([\d.]+)/([\d.]+) \w+", re.sub(r"\x1b\[[\d;?]*\w", "", err))
        assert shown[-1][0] == shown[-1][1]
    mxmoe.load(folder, progress=False)
    assert capsys.readouterr() == ("", "")


# Memory


LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
# About 100 MB in MXFP4, in layers of 30 MB.
LARGE = checkpoints.small_config(
    num_hidden_layers=3,
    hidden_size=768,
    intermediate_size=768,
    num_experts=32,
    experts_per_token=4,
    vocab_size=4096,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
)
# 66 MB of dense weights, so that a workspace that one run allocates and another finds free weighs little beside them.
DENSE = checkpoints.small_config(
    num_hidden_layers=2,
    hidden_size=768,
    intermediate_size=768,
    num_experts=4,
    experts_per_token=2,
    vocab_size=32768,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
)
PROGRAM = """
import json, sys
import numpy as np
import mxmoe

def fields(path):
    with open(path) as file:
        lines = [line.split() for line in file]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}

def status():
    # The counts in status lag behind by some pages for each CPU; those of smaps_rollup are made when asked for.
    now = fields("/proc/self/smaps_rollup")
    peak, anonymous = fields("/proc/self/status")["VmHWM"], now["Anonymous"]
    return {"VmHWM": peak, "VmRSS": now["Rss"], "RssAnon": anonymous, "RssFile": now["Rss"] - anonymous}

small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ids = np.random.default_rng(0).integers(0, 128, 64)
mxmoe.load(small, **options).forward(ids)  # imports and first allocations
found = {"before": status()}
model = mxmoe.load(large, **options)
found["loaded"] = status()
model.forward(ids)
found["run"] = status()
found["held"] = sum(part["bytes"] for part in model.components.values())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    made = {}

    def write_once(layout):
        if layout not in made:
            made[layout] = checkpoints.write(tmp_path_factory.mktemp("large") / "x", layout=layout, config=LARGE)
        return made[layout]

    yield write_once
    for path in made.values():
        shutil.rmtree(path)


def measure(folder, large, isa="", **options):
    """Load and run in a fresh process; what it grew by, in bytes."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    env |= {"MXMOE_ISA": isa} if isa else {}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(large), json.dumps(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before = found["before"]
    grown = {
        moment: {name: value - before[name] for name, value in found[moment].items()} for moment in ("loaded", "run")
    }
    # The peak of all the process's life is one of loading only if it lies above what was there before.
    grown["loaded"]["VmHWM"] = found["loaded"]["VmHWM"] - before["VmRSS"]
    grown["run"]["VmHWM"] = found["run"]["VmHWM"] - before["VmRSS"]
    return grown["loaded"], grown["run"], found["held"]


def layer_bytes():
    return 3 * LARGE.num_experts * 768 * 768 * 17 // 32 + 2 * 768 * (2 * 12 + 2 * 4) * 64


@LINUX
@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
@pytest.mark.parametrize("dense", ["bf16", "int8"])
def test_loading_takes_little_more_than_the_model(folder, large, layout, dense):
    loaded, run, held = measure(folder, large(layout), dense=dense)
    assert held > 90 << 20
    assert loaded["VmHWM"] <= 1.05 * held + layer_bytes()
    # Having run, all but the embedding's untouched rows is resident: nothing was hidden from the figure above.
    assert run["VmRSS"] >= 0.8 * held
    assert run["VmHWM"] <= 1.05 * held + layer_bytes()


@LINUX
@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_mapped_weights_are_not_copied(folder, large, layout):
    # Only portable code reads them as they are stored.
    loaded, run, held = measure(folder, large(layout), "scalar", dense="bf16", activations="float32")
    for moment in (loaded, run):
        assert moment["RssAnon"] < 0.05 * held
    assert run["RssFile"] > 0.8 * held


@LINUX
@pytest.mark.skipif(not prefers_packed("bf16"), reason="no kernel here wants packed weights")
@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_packed_weights_are_held_once(folder, large, layout):
    _, run, held = measure(folder, large(layout), dense="bf16", activations="bf16")
    assert 0.8 * held < run["RssAnon"] < 1.1 * held
    assert run["RssFile"] < 0.15 * held


@LINUX
def test_int8_releases_what_it_has_rounded(folder, tmp_path):
    path = checkpoints.write(tmp_path / "x", layout="huggingface", config=DENSE)
    # Kernels that want panels would have copied either.
    _, plain, _ = measure(folder, path, "scalar", dense="bf16", activations="float32")
    _, rounded, _ = measure(folder, path, "scalar", dense="int8", activations="float32")
    shutil.rmtree(path)
    dense = 2 * 2 * 768 * (2 * 32 + 2 * 8) * 64 + 2 * 32768 * 768
    # The file's pages of the dense weights are gone, and half their size has come instead.
    assert plain["RssFile"] - rounded["RssFile"] > 0.9 * dense
    assert 0.5 * dense < rounded["RssAnon"] - plain["RssAnon"] < 0.6 * dense


@LINUX
def test_models_leave_no_open_files_behind(folder):
    mxmoe.load(folder)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    models = [mxmoe.load(folder) for _ in range(5)]
    for model in models:
        model.forward(IDS[:1])
    del models, model
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
