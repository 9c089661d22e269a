"""Checkpoints: every layout reads the same, and nothing is copied."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import checkpoints
from checkpoints import everything, read_safetensors, write_safetensors
from compare import assert_exact
from mxmoe.checkpoint import Checkpoint, weight_shapes
from mxmoe.reference import ops as reference


def experts_decoded(weights):
    """Replace MXFP4 by the values it stands for, which several encodings may share."""
    decoded = dict(weights)
    for name in [name for name in weights if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = decoded.pop(name), decoded.pop(f"{stem}_scales")
        decoded[stem] = reference.mxfp4_dequantize(blocks, scales)
    return decoded


def assert_same_weights(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert_exact(got[name], want[name])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """One checkpoint of every layout, not to be changed."""
    root = tmp_path_factory.mktemp("pristine")
    return {layout: checkpoints.write(root / layout, layout) for layout in checkpoints.LAYOUTS}


@pytest.fixture
def copied(pristine, tmp_path):
    """A private copy of a pristine checkpoint."""

    def copy(layout="huggingface"):
        return Path(shutil.copytree(pristine[layout], tmp_path / "checkpoint"))

    return copy


# Layouts


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_every_layout_holds_the_same_weights(pristine, layout):
    checkpoint = Checkpoint.open(pristine[layout])
    want = Checkpoint.open(pristine["huggingface"])
    assert checkpoint.layout == layout
    assert checkpoint.nbytes == want.nbytes
    assert dataclasses.replace(checkpoint.config, eos_token_ids=()) == dataclasses.replace(
        want.config, eos_token_ids=()
    )
    assert_same_weights(experts_decoded(everything(checkpoint)), experts_decoded(everything(want)))
    if layout == "original":
        assert_same_weights(everything(checkpoint), everything(want))


def test_weights_are_what_the_file_holds(pristine):
    from safetensors.numpy import load_file

    stored = load_file(pristine["huggingface"] / "model.safetensors")
    layer = Checkpoint.open(pristine["huggingface"]).layer(1)
    prefix = "model.layers.1."
    assert_exact(layer.gate_up_blocks, stored[f"{prefix}mlp.experts.gate_up_proj_blocks"])
    assert_exact(layer.down_scales, stored[f"{prefix}mlp.experts.down_proj_scales"])
    assert_exact(layer.k_proj_weight, stored[f"{prefix}self_attn.k_proj.weight"])
    assert_exact(layer.sinks, stored[f"{prefix}self_attn.sinks"])
    assert layer.q_proj_weight.dtype == ml_dtypes.bfloat16


def test_nbytes_is_the_size_of_the_tensors(pristine):
    for layout in ("huggingface", "original"):
        checkpoint = Checkpoint.open(pristine[layout])
        assert checkpoint.nbytes == sum(array.nbytes for array in everything(checkpoint).values())
        _, data = read_safetensors(pristine[layout] / "model.safetensors")
        assert checkpoint.nbytes == len(data)


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [1, 40_000])
def test_shards_hold_the_same_weights(pristine, tmp_path, layout, shard_bytes):
    folder = checkpoints.write(tmp_path / "sharded", layout, shard_bytes=shard_bytes)
    assert (folder / "model.safetensors.index.json").is_file()
    got, want = Checkpoint.open(folder), Checkpoint.open(pristine[layout])
    assert_same_weights(everything(got), everything(want))
    # OpenAI's own loader takes whatever shards there are.
    (folder / "model.safetensors.index.json").unlink()
    assert_same_weights(everything(Checkpoint.open(folder)), everything(want))


def test_the_original_subfolder_is_found(tmp_path):
    folder = checkpoints.write(tmp_path / "model" / "original", "original").parent
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    for path in (folder, folder / "original", str(folder)):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.layout == "original"
        assert checkpoint.path == folder / "original"
        assert checkpoint.tokenizer_path == folder / "tokenizer.json"
        assert checkpoint.config.eos_token_ids == (9,)


def test_the_folder_itself_wins_over_its_original_subfolder(copied):
    folder = copied()
    checkpoints.write(folder / "original", "original", seed=5)
    assert Checkpoint.open(folder).layout == "huggingface"
    assert Checkpoint.open(folder).tokenizer_path is None


def test_symbolic_links_are_followed(pristine, tmp_path):
    # The hub's cache is made of links to blobs elsewhere.
    for file in pristine["huggingface"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    Checkpoint.open(tmp_path).layer(0)


# Memory


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_weights_are_views_of_the_file(pristine, layout):
    checkpoint = Checkpoint.open(pristine[layout])
    first, again = everything(checkpoint), everything(checkpoint)
    for name, array in first.items():
        assert not array.flags.owndata, name
        assert not array.flags.writeable, name
        assert array.flags.c_contiguous, name
        assert np.shares_memory(array, again[name]), name
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_misaligned_tensors_are_copied(copied):
    folder = copied()
    path = folder / "model.safetensors"
    want = everything(Checkpoint.open(folder))
    want = {name: array.copy() for name, array in want.items()}
    header, data = read_safetensors(path)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (1 - len(text) % 2)
    write_safetensors(path, text, data, align=1)
    got = everything(Checkpoint.open(folder))
    assert_same_weights(got, want)
    for name, array in got.items():
        assert array.ctypes.data % array.dtype.itemsize == 0, name
        assert not array.flags.writeable, name


def resident_file_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see resident pages")
@pytest.mark.parametrize("names", [None, ["lm_head"]])
def test_release_gives_pages_back(tmp_path, names):
    checkpoint = Checkpoint.open(checkpoints.write(tmp_path / "x", vocab_size=1 << 17))
    size = checkpoint.lm_head.nbytes
    checksum = int(checkpoint.lm_head.view(np.uint16).sum())
    resident = resident_file_bytes()
    checkpoint.release(names=names)
    assert resident - resident_file_bytes() > 0.9 * size
    assert int(checkpoint.lm_head.view(np.uint16).sum()) == checksum


def test_the_embedding_is_checked_without_staying_resident(tmp_path):
    checkpoint = Checkpoint.open(checkpoints.write(tmp_path / "x", vocab_size=1 << 17))
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see resident pages")
    resident = resident_file_bytes()
    assert resident_file_bytes() - resident < 0.1 * checkpoint.embed_tokens.nbytes


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_release_changes_no_value(pristine, layout):
    checkpoint = Checkpoint.open(pristine[layout])
    before = {name: array.copy() for name, array in everything(checkpoint).items()}
    for i in range(checkpoint.config.num_hidden_layers):
        checkpoint.release(i)
        checkpoint.release(i, ["q_proj_weight", "k_proj_bias", "gate_up_blocks", "down_scales", "sinks"])
    checkpoint.release()
    assert_same_weights(everything(checkpoint), before)


def test_release_and_layer_refuse_what_does_not_exist(pristine):
    checkpoint = Checkpoint.open(pristine["huggingface"])
    for layer, name in ((0, "lm_head"), (None, "sinks"), (0, "nonsense")):
        with pytest.raises(KeyError, match=name):
            checkpoint.release(layer, [name])
    for i in (-1, 2, 10**9):
        with pytest.raises(IndexError, match="expected 0 to 1"):
            checkpoint.layer(i)


# Experts stored as bf16


def test_a_dequantised_checkpoint_comes_back_without_a_warning(pristine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything(Checkpoint.open(pristine["huggingface-bf16"]))


def test_a_fine_tuned_checkpoint_is_rounded_and_says_so(copied):
    folder = copied("huggingface-bf16")
    header, data = read_safetensors(folder / "model.safetensors")
    values = bytearray(data)
    rng = np.random.default_rng(0)
    stored = {}
    for i in range(2):
        for part in ("gate_up_proj", "down_proj"):
            fields = header[f"model.layers.{i}.mlp.experts.{part}"]
            begin, end = fields["data_offsets"]
            old = np.frombuffer(data[begin:end], ml_dtypes.bfloat16).reshape(fields["shape"])
            new = (old.astype(np.float32) + rng.normal(0, 0.02, old.shape)).astype(ml_dtypes.bfloat16)
            values[begin:end] = new.tobytes()
            stored[f"{i}.{part}"] = new.astype(np.float64)
    write_safetensors(folder / "model.safetensors", header, bytes(values))
    checkpoint = Checkpoint.open(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = [checkpoint.layer(i) for i in range(2)]
        layers.append(checkpoint.layer(1))
    assert len(caught) == 1, "one warning a model, not one a layer"
    error = power = 0.0
    for i, layer in enumerate(layers[:2]):
        for part, blocks, scales in (
            ("gate_up_proj", layer.gate_up_blocks, layer.gate_up_scales),
            ("down_proj", layer.down_blocks, layer.down_scales),
        ):
            want = stored[f"{i}.{part}"].transpose(0, 2, 1)
            want_blocks, want_scales = reference.mxfp4_quantize(want)
            assert_exact(blocks, want_blocks)
            assert_exact(scales, want_scales)
            error += ((reference.mxfp4_dequantize(blocks, scales) - want) ** 2).sum()
            power += (want**2).sum()
    assert 0.01 < math.sqrt(error / power) < 0.2
    assert f"{math.sqrt(error / power):.2%}" in str(caught[0].message)
    assert str(folder) in str(caught[0].message)


def test_every_weight_has_a_shape(pristine):
    shapes = weight_shapes(checkpoints.SMALL)
    for layout in checkpoints.LAYOUTS:
        for name, array in everything(Checkpoint.open(pristine[layout])).items():
            assert array.shape == shapes[name.split(".")[-1]]


# bench/make_checkpoint.py


def make(*arguments):
    script = Path(checkpoints.__file__).resolve().parent.parent / "bench" / "make_checkpoint.py"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_make_checkpoint_writes_what_was_asked(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    options = ["--size", "tiny", "--layers", 3, "--layout", "original", "--shard-gib", 1e-5]
    done = make(out, *options, "--tokenizer", tmp_path / "tokenizer.json")
    assert done.returncode == 0, done.stderr
    checkpoint = Checkpoint.open(out)
    assert checkpoint.layout == "original"
    assert checkpoint.config.num_hidden_layers == 3
    assert checkpoint.tokenizer_path == out / "tokenizer.json"
    assert len(list(out.glob("model--*-of-*.safetensors"))) > 1
    everything(Checkpoint.open(out))
    again = make(out, *options)
    assert again.returncode == 1
    assert "already holds a checkpoint" in again.stderr


def test_make_checkpoint_follows_the_seed(tmp_path):
    weights = [
        everything(Checkpoint.open(checkpoints.write(tmp_path / str(i), seed=seed)))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert_same_weights(weights[0], weights[1])
    norms = ("norm", "input_layernorm", "post_attention_layernorm")
    for name in weights[0]:
        if weights[0][name].size < 64:
            continue  # too few for a share to mean anything
        same = (weights[0][name] == weights[2][name]).mean()
        assert same < (0.5 if name.endswith(("_scales", *norms)) else 0.2), name


def test_rows_of_made_matrices_differ(tmp_path):
    weights = everything(Checkpoint.open(checkpoints.write(tmp_path / "x", vocab_size=4096)))
    for name, array in weights.items():
        if array.ndim > 1 and "scales" not in name:
            rows = (
                array.reshape(-1, array.shape[-1])
                if array.dtype != np.uint8
                else array.reshape(-1, 16 * array.shape[-2])
            )
            assert len(np.unique(rows.view(np.uint8).reshape(len(rows), -1), axis=0)) == len(rows), name


@pytest.mark.parametrize(
    "options", [["--layers", 0], ["--layers", 99], ["--size", "7b"], ["--tokenizer", "/no/file"]]
)
def test_make_checkpoint_refuses(tmp_path, options):
    done = make(tmp_path / "x", *options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
