"""Broken checkpoints: whatever is wrong with the files is one clear error, before anything uses them."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

import checkpoints
from checkpoints import assert_clear, edit_json, everything, read_safetensors, write_safetensors
from mxmoe.checkpoint import Checkpoint, CheckpointError, ConfigError


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


def read_all(folder):
    return everything(Checkpoint.open(folder))


INDEX = "model.safetensors.index.json"
NORM, SINKS = "model.norm.weight", "model.layers.0.self_attn.sinks"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def text(content):
    def edit(folder):
        (folder / INDEX).write_bytes(content)

    return edit


def weight_map(value):
    return lambda folder: edit_json(folder / INDEX, lambda index: {"weight_map": value})


def points_to(shard, name=SINKS):
    return lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: shard}))


def index_lacks(name):
    return lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name) and None)


def rename_shard(folder):
    (folder / SECOND).rename(folder / "model-2.safetensors")


def folder_as_shard(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()


def dangling_link(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("nowhere")


def tensor_in_two_shards(folder):
    (folder / "model-3.safetensors").write_bytes((folder / SECOND).read_bytes())
    points_to("model-3.safetensors", NORM)(folder)


def shards_swapped(folder):
    def swap(index):
        other = {FIRST: SECOND, SECOND: FIRST}
        index["weight_map"] = {name: other[shard] for name, shard in index["weight_map"].items()}

    edit_json(folder / INDEX, swap)


def whole_map_to_one_shard(folder):
    edit_json(folder / INDEX, lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], FIRST)))


def ten_thousand_shards(folder):
    names = [f"shard-{i}.safetensors" for i in range(1100)]
    for name in names:
        (folder / name).touch()
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({f"t{n}": name for n, name in enumerate(names)}))


# What is done to the folder, and what the message must name besides it.
BROKEN_INDEX = {
    "empty": (text(b""), INDEX),
    "blank": (text(b"\n\n"), INDEX),
    "cut off": (text(b'{"metadata": {"total_size": 1}, "weight_map": {"a": "b'), INDEX),
    "an array": (text(b"[]"), INDEX),
    "a string": (text(b'"model.safetensors"'), INDEX),
    "a number": (text(b"1"), INDEX),
    "null": (text(b"null"), INDEX),
    "true": (text(b"true"), INDEX),
    "not JSON": (text(b"weight_map: {}"), INDEX),
    "binary": (text(bytes(range(256))), INDEX),
    "not UTF-8": (text(b'{"weight_map": {"\xff": "x.safetensors"}}'), INDEX),
    "UTF-16": (text('{"weight_map": {}}'.encode("utf-16")), INDEX),
    "NaN": (text(b'{"weight_map": NaN}'), INDEX),
    "nested deeply": (text(b'{"weight_map":' * 100_000), INDEX),
    "a key twice": (text(b'{"weight_map": {}, "weight_map": {}}'), "weight_map"),
    "a tensor twice": (text(b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'), '"a"'),
    "an empty object": (text(b"{}"), "weight_map"),
    "no weight_map": (text(b'{"metadata": {"total_size": 5}}'), "weight_map"),
    "weight_map null": (weight_map(None), "weight_map"),
    "weight_map empty": (weight_map({}), "weight_map"),
    "weight_map a list": (weight_map([[NORM, FIRST]]), "weight_map"),
    "weight_map a string": (weight_map(FIRST), "weight_map"),
    "weight_map a number": (weight_map(7), "weight_map"),
    "shard null": (points_to(None), SINKS),
    "shard a number": (points_to(1), SINKS),
    "shard true": (points_to(True), SINKS),
    "shard a list": (points_to([FIRST]), SINKS),
    "shard an object": (points_to({"file": FIRST}), SINKS),
    "shard empty": (points_to(""), SINKS),
    "shard a dot": (points_to("."), SINKS),
    "shard the parent": (points_to(".."), SINKS),
    "shard outside": (points_to("../model.safetensors"), SINKS),
    "shard far outside": (points_to("../../../../etc/passwd"), SINKS),
    "shard outside and back": (points_to(f"../checkpoint/{FIRST}"), SINKS),
    "shard in a subfolder": (points_to(f"original/{FIRST}"), SINKS),
    "shard with a leading dot": (points_to(f"./{FIRST}"), SINKS),
    "shard absolute": (points_to("/etc/model.safetensors"), SINKS),
    "shard with backslashes": (points_to(f"..\\{FIRST}"), SINKS),
    "shard on a drive": (points_to(f"C:\\{FIRST}"), SINKS),
    "shard a UNC path": (points_to(f"\\\\host\\share\\{FIRST}"), SINKS),
    "shard at home": (points_to("~/model.safetensors"), SINKS),
    "shard a URL": (points_to(f"https://example.com/{FIRST}"), SINKS),
    "shard with a zero byte": (points_to(f"{FIRST}\0.safetensors"), SINKS),
    "shard with a newline": (points_to(f"a\n{FIRST}"), SINKS),
    "shard of another kind": (points_to("pytorch_model.bin"), SINKS),
    "shard the config": (points_to("config.json"), SINKS),
    "shard with a space": (points_to(f"{FIRST} "), SINKS),
    "shard very long": (points_to("x" * 100_000 + ".safetensors"), SINKS),
    "shard missing": (points_to("model-00003-of-00002.safetensors"), "model-00003-of-00002.safetensors"),
    "shard removed": (lambda folder: (folder / SECOND).unlink(), SECOND),
    "shard renamed": (rename_shard, SECOND),
    "shard a folder": (folder_as_shard, SECOND),
    "shard a dangling link": (dangling_link, SECOND),
    "tensor in the wrong shard": (points_to(SECOND), SINKS),
    "all tensors in one shard": (whole_map_to_one_shard, FIRST),
    "shards exchanged": (shards_swapped, INDEX),
    "tensor in two shards": (tensor_in_two_shards, "model-3.safetensors"),
    "tensor not listed": (index_lacks(NORM), NORM),
    "tensor that does not exist": (points_to(FIRST, "model.layers.9.self_attn.sinks"), "model.layers.9"),
    "tensor with an odd name": (points_to(FIRST, "a\n\x1b[31mb"), r"a\n\x1b[31mb"),
    "tensor without a name": (points_to(FIRST, ""), INDEX),
    "too many shards": (ten_thousand_shards, INDEX),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "x"
    half = Checkpoint.open(checkpoints.write(folder / "whole")).nbytes * 2 // 3
    checkpoints.write(folder / "halves", shard_bytes=half)
    assert {SECOND, FIRST} == {path.name for path in (folder / "halves").glob("*.safetensors")}
    return folder / "halves"


@pytest.mark.parametrize(("damage", "named"), BROKEN_INDEX.values(), ids=BROKEN_INDEX.keys())
def test_broken_index(sharded, tmp_path, damage, named):
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    read_all(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as problem:
        read_all(folder)
    assert_clear(problem, str(folder), named)


WEIGHTS = "model.safetensors"


def raw(change):
    """Change the bytes of the file."""

    def edit(folder):
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return edit


def header_bytes(content):
    """Replace the header, whatever it says."""
    return lambda folder: write_safetensors(folder / WEIGHTS, content, read_safetensors(folder / WEIGHTS)[1])


def header(change):
    """Change the parsed header."""

    def edit(folder):
        parsed, data = read_safetensors(folder / WEIGHTS)
        change(parsed)
        write_safetensors(folder / WEIGHTS, parsed, data)

    return edit


def fields(name=SINKS, **values):
    """Change what the header says of one tensor; None removes the field."""

    def change(parsed):
        parsed[name] |= values
        for key in [key for key, value in values.items() if value is None]:
            del parsed[name][key]

    return header(change)


def element(name, at, value):
    """Overwrite the bytes of one element."""

    def edit(folder):
        parsed, data = read_safetensors(folder / WEIGHTS)
        begin, end = parsed[name]["data_offsets"]
        start = (end if at < 0 else begin) + at * len(value)
        write_safetensors(folder / WEIGHTS, parsed, data[:start] + value + data[start + len(value) :])

    return edit


def appended(name, dtype, shape, data):
    """Add a tensor at the end of the file."""

    def edit(folder):
        parsed, old = read_safetensors(folder / WEIGHTS)
        parsed[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(old), len(old) + len(data)]}
        write_safetensors(folder / WEIGHTS, parsed, old + data)

    return edit


def renamed(old, new):
    return header(lambda parsed: parsed.update({new: parsed.pop(old)}))


def exchanged(one, other):
    def change(parsed):
        parsed[one], parsed[other] = parsed[other], parsed[one]

    return header(change)


def twice(folder):
    parsed, data = read_safetensors(folder / WEIGHTS)
    content = json.dumps(parsed)[:-1] + f', "{SINKS}": {json.dumps(parsed[SINKS])}}}'
    write_safetensors(folder / WEIGHTS, content.encode(), data)


def as_folder(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def nothing(folder):
    (folder / WEIGHTS).unlink()


def float32_everywhere(parsed):
    for name in [name for name in parsed if name != "__metadata__" and parsed[name]["dtype"] == "BF16"]:
        shape = parsed[name]["shape"]
        if shape[-1] % 2 == 0:
            parsed[name] |= {"dtype": "F32", "shape": [*shape[:-1], shape[-1] // 2]}


EXPERTS = "model.layers.1.mlp.experts."
GATE_UP = f"{EXPERTS}gate_up_proj_blocks"
Q = "model.layers.0.self_attn.q_proj.weight"
NAN, INFINITY = b"\xc0\x7f", b"\x80\x7f"

BROKEN_WEIGHTS = {
    "absent": (nothing, "no weights"),
    "a folder": (as_folder, WEIGHTS),
    "empty": (raw(lambda b: b""), WEIGHTS),
    "one byte": (raw(lambda b: b[:1]), WEIGHTS),
    "seven bytes": (raw(lambda b: b[:7]), WEIGHTS),
    "only the length": (raw(lambda b: b[:8]), WEIGHTS),
    "half a header": (raw(lambda b: b[:500]), WEIGHTS),
    "only a header": (raw(lambda b: b[: 8 + int.from_bytes(b[:8], "little")]), WEIGHTS),
    "one byte short": (raw(lambda b: b[:-1]), WEIGHTS),
    "half the data": (raw(lambda b: b[: len(b) // 2]), WEIGHTS),
    "one byte long": (raw(lambda b: b + b"\0"), WEIGHTS),
    "a page long": (raw(lambda b: b + bytes(4096)), WEIGHTS),
    "shifted by a byte": (raw(lambda b: b"\0" + b), WEIGHTS),
    "zeros": (raw(lambda b: bytes(len(b))), WEIGHTS),
    "ones": (raw(lambda b: b"\xff" * len(b)), WEIGHTS),
    "text": (
        raw(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "git lfs pull",
    ),
    "a zip archive": (raw(lambda b: b"PK\x03\x04" + b), WEIGHTS),
    "a pickle": (raw(lambda b: b"\x80\x04cos\nsystem\n(S'true'\ntR."), WEIGHTS),
    "header length 0": (raw(lambda b: struct.pack("<Q", 0) + b[8:]), WEIGHTS),
    "header length 1": (raw(lambda b: struct.pack("<Q", 1) + b[8:]), WEIGHTS),
    "header length one less": (
        raw(lambda b: struct.pack("<Q", struct.unpack("<Q", b[:8])[0] - 9) + b[8:]),
        WEIGHTS,
    ),
    "header length past the end": (raw(lambda b: struct.pack("<Q", len(b)) + b[8:]), WEIGHTS),
    "header length 2^63": (raw(lambda b: struct.pack("<Q", 1 << 63) + b[8:]), WEIGHTS),
    "header length 2^64 - 1": (raw(lambda b: b"\xff" * 8 + b[8:]), WEIGHTS),
    "header length big-endian": (raw(lambda b: b[7::-1] + b[8:]), WEIGHTS),
    "header an array": (header_bytes(b"[]"), WEIGHTS),
    "header a string": (header_bytes(b'"x"'), WEIGHTS),
    "header null": (header_bytes(b"null"), WEIGHTS),
    "header empty": (header_bytes(b"{}"), WEIGHTS),
    "header not JSON": (header_bytes(b"{tensors}"), WEIGHTS),
    "header not UTF-8": (header_bytes(b'{"\xff\xfe": {}}'), WEIGHTS),
    "header nested deeply": (header_bytes(b'{"a":' * 50_000), WEIGHTS),
    "metadata not strings": (header(lambda h: h.update(__metadata__={"format": 1})), WEIGHTS),
    "a tensor twice": (twice, WEIGHTS),
    "dtype missing": (fields(dtype=None), WEIGHTS),
    "shape missing": (fields(shape=None), WEIGHTS),
    "data_offsets missing": (fields(data_offsets=None), WEIGHTS),
    "dtype unknown": (fields(dtype="BF17"), WEIGHTS),
    "dtype a number": (fields(dtype=16), WEIGHTS),
    "dtype F16": (fields(dtype="F16"), SINKS),
    "dtype I16": (fields(dtype="I16"), SINKS),
    "dtype F32 of half the shape": (fields(Q, dtype="F32", shape=[128, 32]), Q),
    "dtype U8 of twice the shape": (fields(dtype="U8", shape=[8]), SINKS),
    "dtype I8 for blocks": (fields(GATE_UP, dtype="I8"), GATE_UP),
    "dtype F8_E8M0 for scales": (fields(f"{EXPERTS}down_proj_scales", dtype="F8_E8M0"), "down_proj_scales"),
    "float32 everywhere": (header(float32_everywhere), WEIGHTS),
    "shape negative": (fields(shape=[-4]), WEIGHTS),
    "shape fractional": (fields(shape=[4.0]), WEIGHTS),
    "shape a string": (fields(shape="4"), WEIGHTS),
    "shape nested": (fields(shape=[[4]]), WEIGHTS),
    "shape too large": (fields(shape=[5]), WEIGHTS),
    "shape too small": (fields(shape=[3]), WEIGHTS),
    "shape empty": (fields(shape=[]), WEIGHTS),
    "shape zero": (fields(shape=[0]), WEIGHTS),
    "shape overflowing": (fields(shape=[1 << 62, 1 << 62]), WEIGHTS),
    "shape wrapping to 4": (fields(shape=[(1 << 63) + 2, 2]), WEIGHTS),
    "shape with an extra axis": (fields(shape=[4, 1]), SINKS),
    "shape transposed": (fields(GATE_UP, shape=[192, 5, 2, 16]), GATE_UP),
    "blocks flat": (fields(GATE_UP, shape=[5, 192, 32]), GATE_UP),
    "offsets reversed": (fields(data_offsets=[8, 0]), WEIGHTS),
    "offsets negative": (fields(data_offsets=[-8, 0]), WEIGHTS),
    "offsets past the end": (fields(data_offsets=[1 << 40, (1 << 40) + 8]), WEIGHTS),
    "offsets of 2^64": (fields(data_offsets=[1 << 64, (1 << 64) + 8]), WEIGHTS),
    "offsets strings": (fields(data_offsets=["0", "8"]), WEIGHTS),
    "offsets three": (fields(data_offsets=[0, 8, 16]), WEIGHTS),
    "offsets one": (fields(data_offsets=[0]), WEIGHTS),
    "offsets of another tensor": (
        header(lambda h: h[SINKS].update(data_offsets=h[Q]["data_offsets"])),
        WEIGHTS,
    ),
    "a hole": (header(lambda h: h.pop(SINKS)), WEIGHTS),
    "tensor missing": (renamed(SINKS, "model.layers.0.self_attn.sink"), SINKS),
    "lm_head missing": (renamed("lm_head.weight", "model.lm_head.weight"), "lm_head.weight"),
    "scales missing": (renamed(f"{EXPERTS}gate_up_proj_scales", "x"), f"{EXPERTS}gate_up_proj_scales"),
    "blocks missing": (renamed(GATE_UP, f"{EXPERTS}gate_up_proj"), GATE_UP),
    "bias missing": (renamed("model.layers.1.self_attn.o_proj.bias", "b"), "o_proj.bias"),
    "last layer missing": (
        renamed("model.layers.1.mlp.router.bias", "model.layers.2.mlp.router.bias"),
        "router.bias",
    ),
    "weight and bias exchanged": (exchanged(Q, "model.layers.0.self_attn.q_proj.bias"), "q_proj"),
    "blocks and scales exchanged": (exchanged(GATE_UP, f"{EXPERTS}gate_up_proj_scales"), "gate_up_proj"),
    "k and q exchanged": (exchanged(Q, "model.layers.0.self_attn.k_proj.weight"), "_proj.weight"),
    "an extra tensor": (appended("extra", "BF16", [2], b"\0" * 4), "extra"),
    "an extra layer": (appended("model.layers.2.self_attn.sinks", "BF16", [4], b"\0" * 8), "layers.2"),
    "an extra tensor of no bytes": (appended("nothing", "BF16", [0], b""), "nothing"),
    "an extra tensor with an odd name": (appended("a\n\x1b[31mb", "U8", [1], b"\0"), r"a\n\x1b[31mb"),
    "an extra tensor with a long name": (appended("x" * 10_000, "U8", [1], b"\0"), "xxx..."),
    "an adapter": (appended(f"{Q[:-7]}.lora_A.weight", "BF16", [1, 64], b"\0" * 128), "lora_A"),
    "NaN in the embedding": (element("model.embed_tokens.weight", 77, NAN), "model.embed_tokens.weight"),
    "infinity in the output": (element("lm_head.weight", -1, INFINITY), "lm_head.weight"),
    "minus infinity in a bias": (element(f"{EXPERTS}down_proj_bias", 3, b"\x80\xff"), "down_proj_bias"),
    "NaN in a norm": (element(NORM, 0, b"\xff\xff"), NORM),
    "NaN in the sinks": (element(SINKS, 3, NAN), SINKS),
    "a signalling NaN in a weight": (element(Q, 1000, b"\x81\x7f"), Q),
    "infinity in the router": (element("model.layers.1.mlp.router.weight", 9, INFINITY), "router.weight"),
    "first scale 255": (element(f"{EXPERTS}gate_up_proj_scales", 0, b"\xff"), "gate_up_proj_scales"),
    "last scale 255": (element(f"{EXPERTS}down_proj_scales", -1, b"\xff"), "down_proj_scales"),
}


@pytest.mark.parametrize(("damage", "named"), BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS.keys())
def test_broken_weights(copied, damage, named):
    folder = copied()
    damage(folder)
    with pytest.raises(CheckpointError) as problem:
        read_all(folder)
    assert_clear(problem, str(folder), named)


def test_the_last_fine_values_are_accepted(copied):
    folder = copied()
    element(SINKS, 0, b"\x7f\x7f")(folder)  # the largest bf16
    element(SINKS, 1, b"\x01\x80")(folder)  # the smallest negative one
    element(f"{EXPERTS}down_proj_scales", -1, b"\xfe")(folder)
    read_all(folder)


def test_broken_configs_are_config_errors(copied):
    folder = copied()
    edit_json(folder / "config.json", lambda c: c.update(hidden_size=65))
    with pytest.raises(ConfigError, match="hidden_size"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 96),
        ("intermediate_size", 64),
        ("num_local_experts", 4),
        ("vocab_size", 127),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 1),
        ("head_dim", 16),
    ],
)
@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_a_config_of_another_model_is_refused(copied, layout, key, value):
    folder = copied(layout)
    if layout == "original" and key == "num_local_experts":
        key = "num_experts"
    edit_json(folder / "config.json", lambda c: c.update({key: value, "eos_token_id": 1}))
    if layout != "original":
        (folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError) as problem:
        Checkpoint.open(folder)
    assert_clear(problem, str(folder), "expected")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_a_config_with_other_layers_is_refused(copied, layout, layers):
    folder = copied(layout)
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=layers, layer_types=None))
    with pytest.raises(CheckpointError, match=r"(layers|block)\.[12]\."):
        Checkpoint.open(folder)


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_open_wants_a_folder(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as problem:
        Checkpoint.open(tmp_path / path)
    assert_clear(problem, str(tmp_path / path))
