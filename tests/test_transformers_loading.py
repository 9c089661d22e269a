"""The transformers backend: loading and saving MXFP4, versions, the tiny model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import checkpoints
import mxmoe
from mxmoe import harmony, ops
from mxmoe.chat import reply
from mxmoe.integrations import _transformers
from mxmoe.integrations._transformers.modules import Int8Linear, RMSNorm
from mxmoe.integrations._transformers.quantizer import MxmoeQuantizer
from transformers_backend import (
    CONFIGS,
    TINY,
    Case,
    assert_same_tensors,
    backend,
    counted_attention,
    load_mxmoe,
    tensors,
    torch,
    transformers,
)

ISAS = mxmoe._core.available_isas()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case") / "checkpoint", next(iter(CONFIGS)), 3)


def experts_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, backend.Mxfp4Experts)]


# MXFP4


@pytest.mark.parametrize("isa", ISAS)
def test_experts_are_packed_where_the_kernels_want_it(first: Case, isa: str) -> None:
    with mxmoe.ops.isa(isa):
        wanted = mxmoe.packing.prefers_packed("bf16")
        model = load_mxmoe(first.path, activations="bf16")
        assert {e.packed for e in experts_of(model)} == {wanted}
        state = {key: value for key, value in model.state_dict().items() if key.endswith(("blocks", "scales"))}
    assert_same_tensors(state, {key: value for key, value in tensors(first.path).items() if key in state})
    assert len(state) == 4 * first.config.num_hidden_layers
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == torch.uint8)


@pytest.mark.parametrize("activations", ["float32", "bf16"])
def test_a_saved_model_has_the_same_bytes(first: Case, tmp_path: Path, activations: str) -> None:
    ids = first.ids(1, 20)
    model = load_mxmoe(first.path, dtype=torch.bfloat16, activations=activations)
    with torch.no_grad():
        before = model(ids).logits
        model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
        after = model(ids).logits  # saving leaves the model as it was
    assert torch.equal(before, after)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert_same_tensors(tensors(tmp_path / "saved"), tensors(first.path))
    old, new = (json.loads((f / "config.json").read_text()) for f in (first.path, tmp_path / "saved"))
    assert new["quantization_config"] == old["quantization_config"]
    # It is a checkpoint like the first to transformers alone, to this backend and to mxmoe.
    decode = transformers.Mxfp4Config(dequantize=True)
    options = {"quantization_config": decode, "dtype": torch.bfloat16}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options)
    decoded, wanted = (m.model.layers[1].mlp.experts.down_proj for m in (plain, first.eager()))
    assert torch.equal(decoded.float(), wanted)
    with torch.no_grad():
        again = load_mxmoe(tmp_path / "saved", activations="float32")
        assert torch.equal(again(ids).logits, first.mxmoe()(ids).logits)
    reread = mxmoe.load(tmp_path / "saved").forward(ids[0].numpy())
    assert (reread == mxmoe.load(first.path).forward(ids[0].numpy())).all()


def test_a_state_dict_is_a_copy_that_stays(first: Case) -> None:
    model = load_mxmoe(first.path, activations="bf16")
    stored = {key: value for key, value in tensors(first.path).items() if key.endswith(("blocks", "scales"))}
    for _ in range(2):
        state = {key: value for key, value in model.state_dict().items() if key in stored}
        with torch.no_grad():
            model(first.ids(1, 4))
        assert_same_tensors(state, stored)
        model.hf_quantizer.get_state_dict_and_metadata(model)  # holds the stored form until the next forward
    folder = checkpoints.write(first.path.parent / "other", seed=99, config=first.config)
    other = load_mxmoe(folder, activations="bf16")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(first.ids(1, 9)).logits, model(first.ids(1, 9)).logits)


def test_dense_layers_of_bfloat16_models(first: Case) -> None:
    """By the kernels, frozen, on the same weights; or as transformers has them."""
    ids = first.ids(2, 30)
    ours, theirs = (load_mxmoe(first.path, dtype=torch.bfloat16, dense=dense) for dense in (None, "torch"))
    assert sum(isinstance(m, backend.Linear) for m in ours.modules()) == 4 * first.config.num_hidden_layers + 1
    assert sum(isinstance(m, RMSNorm) for m in ours.modules()) == 2 * first.config.num_hidden_layers + 1
    assert not any(isinstance(m, backend.Linear | RMSNorm) for m in theirs.modules())
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    with torch.no_grad():
        want = first.eager(torch.float64)(ids).logits
        errors = [((m(ids).logits.double() - want).abs().amax(-1) / want.std(-1)).median() for m in (ours, theirs)]
    assert 0 < errors[0] <= 1.2 * errors[1]
    ours.train()(ids, labels=ids).loss.backward()
    for name, parameter in ours.named_parameters():
        frozen = name.endswith(("blocks", "scales", "_proj.weight", "lm_head.weight"))
        assert parameter.requires_grad != frozen and (parameter.grad is None) == frozen, name
    with pytest.raises(ValueError, match=r"dense is 'mxmoe' with dtype torch\.float32; wanted torch\.bfloat16"):
        load_mxmoe(first.path, dense="mxmoe")


@pytest.mark.parametrize(("dtype", "activations"), [("bfloat16", None), ("bfloat16", "int8"), ("float32", None)])
def test_dense_layers_rounded_to_int8(first: Case, dtype: str, activations: Any, tmp_path: Path) -> None:
    """As `mxmoe.ops` rounds and multiplies, in every layer; what is left of the model is as without."""
    kind, ids = getattr(torch, dtype), first.ids(2, 30)
    ours, theirs = (
        load_mxmoe(first.path, dtype=kind, dense=dense, activations=activations) for dense in ("int8", "torch")
    )
    found = {name: module for name, module in ours.named_modules() if isinstance(module, Int8Linear)}
    assert len(found) == 4 * first.config.num_hidden_layers + 1
    stored = theirs.state_dict()
    for name, module in found.items():
        weight, bias = (stored.get(f"{name}.{part}") for part in ("weight", "bias"))
        codes, scales = ops.int8_quantize(weight)
        x = torch.randn(3, 2, module.in_features, dtype=kind)
        how = activations or ("float32" if kind == torch.float32 else "bf16")
        want = ops.linear(x.reshape(6, -1), codes, bias, scales=scales, activations=how)
        with torch.no_grad():
            assert torch.equal(module(x), want.to(kind).reshape(3, 2, -1)), name
        assert not module.weight_codes.requires_grad and tuple(module.weight.shape) == tuple(weight.shape)
    with torch.no_grad():
        want = first.eager(torch.float64)(ids).logits
        errors = [((m(ids).logits.double() - want).abs().amax(-1) / want.std(-1)).median() for m in (ours, theirs)]
    assert 0 < errors[0] <= 0.08, errors
    ours.train()(ids, labels=ids).loss.backward()
    for name, parameter in ours.named_parameters():
        frozen = name.endswith(("blocks", "scales", "_proj.weight_codes", "lm_head.weight_codes"))
        assert (parameter.grad is None) == frozen, name
    with pytest.raises(ValueError, match="not serializable"):
        ours.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_rounding_to_int8_wants_whole_blocks(tmp_path: Path) -> None:
    odd = Case(tmp_path / "odd", "three layers, eight experts, odd heads", 3)
    with pytest.raises(ValueError, match="in_features is 80; wanted a multiple of 32"):
        load_mxmoe(odd.path, dense="int8")


def test_torch_rests_while_decoding(first: Case) -> None:
    model, seen = load_mxmoe(first.path), []
    before = torch.get_num_threads()

    def look(*_: Any) -> None:
        seen.append(torch.get_num_threads())

    hook = model.model.layers[0].register_forward_hook(look)
    torch.set_num_threads(3)
    try:
        with torch.no_grad():
            for ids in (torch.ones(1, 1), torch.ones(2, 8), torch.ones(17, 1), torch.ones(1, 40)):
                model(ids.long())
                model(input_ids=ids.long())
                model(inputs_embeds=torch.zeros(*ids.shape, model.config.hidden_size))
                assert torch.get_num_threads() == 3
        hook.remove()
        assert seen == [1] * 6 + [3] * 6
        with pytest.raises(IndexError):
            model(torch.full((1, 1), 1 << 40))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_torch_rests_in_each_thread_by_itself(first: Case) -> None:
    model, seen = copy.deepcopy(load_mxmoe(first.path)), []
    decoding, reading = threading.Event(), threading.Event()
    arrived = {1: decoding, 40: reading}

    def wait(_: Any, args: Any, output: Any) -> None:
        tokens = output.shape[1]
        arrived[tokens].set()
        # The step of one token begins first and ends first, while the other forward is under way.
        assert (reading if tokens == 1 else finished).wait(60)

    def decode() -> None:
        torch.set_num_threads(2)
        with torch.no_grad():
            model(torch.ones(1, 1).long())
        seen.append(torch.get_num_threads())
        finished.set()

    finished = threading.Event()
    model.model.layers[0].register_forward_hook(wait)
    thread = threading.Thread(target=decode)
    thread.start()
    assert decoding.wait(60)
    with torch.no_grad():
        model(torch.ones(1, 40).long())
    thread.join()
    assert seen == [2]


def edited(case: Case, folder: Path, edit: Any) -> Path:
    shutil.copytree(case.path, folder)
    weights = tensors(folder)
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


NAME = "model.layers.1.mlp.experts.down_proj_"


def test_broken_checkpoints_are_refused(first: Case, tmp_path: Path) -> None:
    def nan(weights: dict[str, Any]) -> None:
        weights[f"{NAME}scales"][2, 3, 1] = 255

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj_scales holds the byte 255"):
        load_mxmoe(edited(first, tmp_path / "nan", nan))
    for part in ("blocks", "scales", "bias"):
        with pytest.raises(ValueError, match=rf"no model\.layers\.1\.mlp\.experts\.down_proj_{part} of shape"):
            load_mxmoe(edited(first, tmp_path / part, lambda weights, part=part: weights.pop(NAME + part)))

    def cut(weights: dict[str, Any]) -> None:
        weights[f"{NAME}blocks"] = weights[f"{NAME}blocks"][:, 1:].contiguous()

    with pytest.raises((ValueError, RuntimeError), match=r"experts\.down_proj_blocks of shape|mismatch"):
        load_mxmoe(edited(first, tmp_path / "cut", cut))


def test_experts_know_whether_their_scales_may_be_folded(
    first: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For Hopper GPUs' kernels, which would compute something else on other scales."""

    def keep(scale: int) -> Any:
        def edit(weights: dict[str, Any]) -> None:
            for key in [key for key in weights if key.endswith("_scales")]:
                weights[key].clamp_(2, 128)
            weights[f"{NAME}scales"][2, 3, 1] = scale

        return edit

    seen: list[bool] = []

    def watch(*args: Any, foldable_scales: bool, **kwargs: Any) -> Any:
        seen.append(foldable_scales)
        return mxfp4_moe(*args, foldable_scales=foldable_scales, **kwargs)

    mxfp4_moe = _transformers.modules.mxfp4_moe
    monkeypatch.setattr(_transformers.modules, "mxfp4_moe", watch)
    models = {scale: load_mxmoe(edited(first, tmp_path / str(scale), keep(scale))) for scale in (1, 2, 128, 129)}

    def said_by(model: Any) -> list[bool]:
        seen.clear()
        with torch.no_grad():
            model(first.ids(1, 3))
        return [*seen]

    layers = first.config.num_hidden_layers
    assert layers > 1
    for scale, model in models.items():
        assert said_by(model) == [i != 1 or 2 <= scale <= 128 for i in range(layers)], scale
    good, bad = (copy.deepcopy(models[scale].state_dict()) for scale in (2, 129))
    models[2].load_state_dict(bad)
    models[129].load_state_dict(good)
    assert all(said_by(models[129])) and not said_by(models[2])[1]
    with torch.device("meta"):
        empty = backend.Mxfp4Experts(models[2].config, "bf16")
    one = models[128].model.layers[1].mlp.experts.state_dict()
    with pytest.warns(UserWarning, match="meta"):
        empty.load_state_dict(one)  # which copies nothing
    assert not empty.foldable_scales
    empty.load_state_dict(one, assign=True)
    assert empty.foldable_scales


def test_other_checkpoints_are_refused(first: Case, tmp_path: Path) -> None:
    plain = checkpoints.write(tmp_path / "bf16", layout="huggingface-bf16", config=first.config)
    with pytest.raises(ValueError, match="without MXFP4 experts"):
        load_mxmoe(plain)
    shutil.copytree(first.path, tmp_path / "fp8")
    checkpoints.edit_json(tmp_path / "fp8/config.json", lambda c: c["quantization_config"].update(quant_method="fp8"))
    with pytest.raises(ValueError, match="quant_method is 'fp8'; wanted 'mxfp4'"):
        load_mxmoe(tmp_path / "fp8")


ELSEWHERE = ["cuda", 0, torch.device("cuda"), {"": 0}, {"model": "cpu", "lm_head": "cuda:0"}, {"": "disk"}]


@pytest.mark.parametrize("device_map", ELSEWHERE, ids=str)
def test_devices_without_kernels_are_refused(device_map: Any) -> None:
    quantizer = MxmoeQuantizer(backend.MxmoeConfig())
    with pytest.raises(ValueError, match="wanted the CPU"):
        quantizer.validate_environment(device_map=device_map)


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}], ids=str)
def test_the_cpu_may_be_named(device_map: Any) -> None:
    MxmoeQuantizer(backend.MxmoeConfig()).validate_environment(device_map=device_map)


@pytest.mark.parametrize("accelerator", [False, True])
def test_automatic_device_maps_are_taken_where_there_is_only_the_cpu(
    accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    quantizer = MxmoeQuantizer(backend.MxmoeConfig())
    if accelerator:
        with pytest.raises(ValueError, match="device_map is 'auto'; wanted the CPU"):
            quantizer.validate_environment(device_map="auto")
    else:
        quantizer.validate_environment(device_map="auto")


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="activations is 'fp8'; wanted None or one of 'float32', 'bf16', 'int8'"):
        backend.MxmoeConfig("fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dense is 'int4'; wanted None or one of 'mxmoe', 'int8', 'torch'"):
        backend.MxmoeConfig(dense="int4")  # type: ignore[arg-type]


def test_other_quantization_configs_go_their_way(first: Case) -> None:
    """Registering changes the merging of configurations for `MxmoeConfig` alone."""
    stored = json.loads((first.path / "config.json").read_text())["quantization_config"]
    merge = transformers.quantizers.auto.AutoHfQuantizer.merge_quantization_configs
    merged = merge(dict(stored), transformers.Mxfp4Config(dequantize=True))
    assert type(merged) is transformers.Mxfp4Config and merged.dequantize
    assert type(merge(dict(stored), None)) is transformers.Mxfp4Config
    with pytest.raises(ValueError, match="quantized with Mxfp4Config"):
        merge(dict(stored), transformers.BitsAndBytesConfig(load_in_8bit=True))


MEMORY = """
import json, sys, torch, transformers
import mxmoe.integrations.transformers as backend
backend.register()

def status():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}

def load(path):
    options = {"quantization_config": backend.MxmoeConfig(), "attn_implementation": "mxmoe", "dtype": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    model.generate(torch.arange(40)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    return model

load(sys.argv[1])
before = status()["VmRSS"]
model = load(sys.argv[2])
found = {"loaded": status()["VmHWM"] - before, "held": status()["VmRSS"] - before}
model.save_pretrained(sys.argv[3], max_shard_size="50MB")
found["saved"] = status()["VmHWM"] - before
found["packed"] = sum(p.nbytes for p in model.parameters())
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_peak_memory_is_that_of_the_packed_checkpoint(first: Case, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 8, "num_experts": 32, "vocab_size": 4096}
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}
    large = checkpoints.write(tmp_path / "large", config=checkpoints.small_config(**changes, **sizes))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", MEMORY, str(first.path), str(large), str(tmp_path / "saved")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["packed"] > 200 << 20
    assert 0.8 * found["packed"] < found["loaded"] <= 1.1 * found["packed"] + (20 << 20)
    assert found["saved"] <= 1.1 * found["packed"] + (80 << 20)  # a shard is written from a copy


# The tiny model, and versions


def questions() -> list[list[harmony.Message]]:
    asked = ["What is 17 + 25?", "What is the capital of France?", "Sort these numbers: 4, 1, 3"]
    return [[harmony.system_message("low", "2026-01-01"), harmony.Message("user", text)] for text in asked]


def test_the_tiny_model_answers_through_a_pipeline() -> None:
    """As through ``mxmoe generate``, prompt by prompt and as one padded batch."""
    model = load_mxmoe(TINY)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"), padding_side="left", pad_token="<|endoftext|>"
    )
    native = mxmoe.load("tiny", activations="float32")
    assert native.tokenizer is not None
    stops = sorted(harmony.stop_token_ids(native.tokenizer))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = [tokenizer.decode(harmony.render_conversation(m, native.tokenizer)) for m in questions()]
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": stops, "return_tensors": True}
    options["add_special_tokens"] = False
    with counted_attention() as kernel:
        single = [pipe(prompt, **options) for prompt in prompts]
        batched = pipe(prompts, batch_size=3, **options)
        assert kernel.call_count > 0
    answers = []
    for messages, *made in zip(questions(), single, batched, strict=True):
        want = reply(native, messages, 60, temperature=0.0)
        prompt = harmony.render_conversation(messages, native.tokenizer)
        for result in made:
            ids = result[0]["generated_token_ids"]
            begin = next(i for i in range(len(ids)) if list(ids[i : i + len(prompt)]) == list(prompt))
            tokens = list(ids[begin + len(prompt) :])
            end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
            assert tokens[:end] == want.token_ids
        answers.append(want.text)
    assert all(answers) and len(set(answers)) == 3


def test_registering_twice_changes_nothing() -> None:
    places = [
        transformers.AttentionInterface._global_mapping,
        transformers.AttentionMaskInterface._global_mapping,
        transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING,
        transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
        vars(transformers.quantizers.auto.AutoHfQuantizer),
    ]
    before = [dict(place) for place in places]
    backend.register()
    assert [dict(place) for place in places] == before
    assert all("mxmoe" in place for place in places[:4])


@pytest.mark.parametrize("version", ["4.57.6", "6.0.0", "4.99"])
def test_other_versions_are_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transformers.importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"found transformers {version}; wanted 5\.0\.0 or newer below 6"):
        backend.register()


@pytest.mark.parametrize("version", ["5.0.0", "5.23.0", "5.99.1.dev0"])
def test_supported_versions(version: str) -> None:
    _transformers.check_version(version)


def test_without_transformers() -> None:
    program = "import sys; sys.modules['transformers'] = None; import mxmoe.integrations.transformers"
    hide = "import importlib.metadata as m\ndef none(name): raise m.PackageNotFoundError(name)\nm.version = none\n"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", hide + program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "ImportError: mxmoe.integrations.transformers found no transformers; wanted 5.0.0" in done.stderr
