"""The whole model on a GPU: against float64, against the CPU, and the same bits however it is run."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import MODEL_NOISE, assert_exact, assert_model_close
from cuda_models import GPU_MODES, IDS, plain, small_pages
from mxmoe import cuda
from mxmoe.checkpoint import Checkpoint
from mxmoe.kv_cache import KVCache
from mxmoe.reference import model as reference
from op_helpers import BF16
from small_models import CONFIG, MODES, in_chunks, random_ids, write

PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23]


@pytest.fixture(scope="module")
def truth(gpu_folder):
    """The float64 logits and captured values."""
    seen = {}
    logits = reference.forward(Checkpoint.open(gpu_folder), IDS[:50], capture=seen)
    return logits, seen


# Right


def rows_of(value):
    return value.reshape(len(value), -1)


def test_every_step_agrees_with_the_reference(gpu, gpu_load, truth):
    want, seen = truth
    model = gpu_load(gpu, "float32")
    got, captured = model.forward(IDS[:50], capture=["*"])
    assert_model_close(got, want, limit=MODEL_NOISE / 10)
    assert list(captured) == model.sites
    for site, value in seen.items():
        if site.endswith("topk_ids"):
            assert_exact(captured[site], value)
        else:
            assert captured[site].dtype == np.float32
            assert_model_close(rows_of(captured[site]), rows_of(value), limit=MODEL_NOISE / 10)


def test_rounded_it_is_as_near_as_the_cpu(gpu, gpu_load, gpu_folder, truth):
    got = gpu_load(gpu, "bf16").forward(IDS[:50])
    assert_model_close(got, truth[0], mxmoe.load(gpu_folder, **MODES["bf16"]).forward(IDS[:50]))


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS[1:])
def test_layouts_give_the_same_logits(gpu, gpu_load, tmp_path, layout):
    got = mxmoe.load(write(tmp_path / "x", layout=layout), **GPU_MODES["bf16"]).forward(IDS[:20])
    assert_exact(got, gpu_load(gpu, "bf16").forward(IDS[:20]))


SHAPES = {
    "one sliding layer": {"num_hidden_layers": 1},
    "all full, no window": {"layer_types": ("full_attention",) * 2, "sliding_window": None},
    "one expert": {"num_experts": 1, "experts_per_token": 1},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "a window of one": {"sliding_window": 1},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_unusual_shapes(gpu, tmp_path, changes):
    config = checkpoints.small_config(**changes)
    folder = checkpoints.write(tmp_path / "x", config=config)
    ids = random_ids(30, vocab_size=config.vocab_size)
    got = mxmoe.load(folder, **GPU_MODES["float32"]).forward(ids)
    assert_model_close(got, reference.forward(Checkpoint.open(folder), ids), limit=MODEL_NOISE / 10)
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    assert_exact(in_chunks(model, ids, [7, *[1] * 23]), model.forward(ids))


def test_the_tiny_model_says_what_it_says_on_the_cpu(gpu):
    prompt = "What is 17 + 25?"
    want = mxmoe.load("tiny", activations="float32").complete(prompt, 6)
    model = mxmoe.load("tiny", device="cuda", kv="float32", activations="float32")
    assert model.complete(prompt, 6) == want
    assert len(mxmoe.load("tiny", device="cuda").complete(prompt, 3)) > 0


# The same bits


CHUNKS = {"ones": [1] * 90, "sevens": [7] * 12, "primes": PRIMES, "many, then one by one": [64, *[1] * 26]}


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_any_chunks_give_the_same_bits(gpu_model, sizes):
    assert_exact(in_chunks(gpu_model, IDS, sizes), gpu_model.forward(IDS))


def test_any_chunks_give_the_same_bits_unrounded(gpu, gpu_load):
    model = gpu_load(gpu, "float32")
    assert_exact(in_chunks(model, IDS[:12], [7, 2, 1, 1, 1]), model.forward(IDS[:12]))


def test_a_replayed_step_has_the_bits_of_a_plain_one(gpu_model):
    """One by one over blocks of 8: new blocks, blocks let go of, and graphs for 32, 64 and 128 tokens."""
    want = gpu_model.forward(IDS)
    replayed = in_chunks(gpu_model, IDS, [1] * 90, small_pages(gpu_model, 90))
    with plain(gpu_model):
        assert_exact(in_chunks(gpu_model, IDS, [1] * 90, small_pages(gpu_model, 90)), want)
    assert_exact(replayed, want)


@pytest.mark.parametrize("count", [8, 9, 33])
def test_many_sequences_decode_as_each_alone(gpu_model, count):
    """Eight go by one launch for norm, products and rotation, more by two, and very many by the plain ops."""
    ids = np.stack([random_ids(4, seed=i) for i in range(count)])
    cache = small_pages(gpu_model, 4, num_sequences=count)
    rows = [gpu_model.forward(ids[:, i], cache=cache, cu_seqlens=range(count + 1)) for i in range(4)]
    for sequence in {0, 7, count - 1}:
        assert_exact(np.stack([row[sequence] for row in rows]), gpu_model.forward(ids[sequence]))


LENGTHS = [1, 40, 7, 25]


def test_any_company_gives_the_same_bits(gpu_model):
    prompts = [random_ids(n, seed=100 + i) for i, n in enumerate(LENGTHS)]
    alone = [gpu_model.forward(ids) for ids in prompts]
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3, 1]):
        bounds = np.concatenate([[0], np.cumsum([LENGTHS[i] for i in order])])
        together = gpu_model.forward(np.concatenate([prompts[i] for i in order]), cu_seqlens=bounds)
        for i, begin, end in zip(order, bounds, bounds[1:], strict=False):
            assert_exact(together[begin:end], alone[i])


def test_decoding_in_changing_company(gpu_model):
    prompts = [random_ids(30, seed=i) for i in range(3)]
    alone = [gpu_model.forward(ids) for ids in prompts]
    cache, done = small_pages(gpu_model, 40, num_sequences=4), [5, 9, 1]
    for i in range(3):
        assert_exact(gpu_model.forward(prompts[i][: done[i]], cache=cache, sequences=[i + 1]), alone[i][: done[i]])
    for order in [[0, 1, 2]] * 4 + [[2, 0, 1]] * 3 + [[1, 0]] * 3 + [[2]] * 3 + [[0, 1, 2]] * 3:
        ids = [prompts[i][done[i]] for i in order]
        rows = gpu_model.forward(
            ids, cache=cache, cu_seqlens=range(len(order) + 1), sequences=[i + 1 for i in order], logits="last"
        )
        for row, i in zip(rows, order, strict=True):
            assert_exact(row, alone[i][done[i]])
            done[i] += 1
    assert cache.lengths == (0, *done)


def test_more_than_a_step_and_a_block_of_the_cache(gpu_model):
    ids = random_ids(300, seed=5)
    want = gpu_model.forward(ids)  # at once, over two blocks of 256
    cache = KVCache(CONFIG, 300, dtype="bf16", step_tokens=128, device=gpu_model.new_cache(1).device)
    assert_exact(in_chunks(gpu_model, ids, [250, *[1] * 10, 30, 1], cache), want)
    assert_exact(gpu_model.forward(ids[:140], logits="last"), want[139:140])


# What a step is made of


def graph_of(model, count=1):
    """The graph of a step of so many sequences, after a few of them."""
    cache = model.new_cache(8, num_sequences=count)
    for i in range(3):
        model.forward(random_ids(count, seed=i), cache=cache, cu_seqlens=range(count + 1))
    (graph,) = model._decoders[cache].graphs
    return graph


def expert_kernels(model, count=1):
    """How many kernels the experts of a layer take."""
    experts, k = model.layers[0].mlp.experts, CONFIG.experts_per_token
    x = cuda.array(np.ones((count, CONFIG.hidden_size), np.float32))
    ids = cuda.array(np.tile(np.arange(k, dtype=np.int32), (count, 1)))
    weights, out = cuda.array(np.ones((count, k), np.float32)), cuda.empty(x.shape)
    run = functools.partial(
        cuda.mxfp4_moe, x, ids, weights, *experts.gate_up.held, experts.gate_up_bias, *experts.down.held,
        experts.down_bias, out=out,
    )  # fmt: skip
    run()
    with cuda.graph() as graph:
        run()
    return graph.num_nodes


# Advance, embedding; last norm, output head, choice.
AROUND_LAYERS = 5


def test_a_layer_is_few_kernels(gpu_model):
    assert expert_kernels(gpu_model) == 2
    assert graph_of(gpu_model).num_nodes == AROUND_LAYERS + 6 * len(gpu_model.layers)
    # More sequences than one launch can normalise for.
    more = graph_of(gpu_model, 9).num_nodes - AROUND_LAYERS
    assert more == len(gpu_model.layers) * (5 + expert_kernels(gpu_model, 9))


def test_what_cannot_be_fused_takes_the_plain_ops(gpu, gpu_load, gpu_folder):
    from mxmoe.layers import LowRank

    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    kernels, layers = expert_kernels(model), len(model.layers)
    fused = AROUND_LAYERS + layers * (4 + kernels)
    assert graph_of(model).num_nodes == fused
    attn, router = model.layers[0].self_attn, model.layers[1].mlp.router
    narrow = cuda.array(np.zeros((4, CONFIG.hidden_size), np.float32).astype(BF16))
    wide = cuda.array(np.zeros((router.out_features, 4), np.float32).astype(BF16))
    router.adapter = LowRank(router.ops, (narrow,), (wide,), "float32")
    # Norm, router, choice and two for the adapter, instead of one.
    assert graph_of(model).num_nodes == fused + 4
    router.adapter = None
    attn.k_proj.activations = "float32"
    # Norm, three products, rotation and cache instead of one, and the rotation's cosine and sine.
    assert graph_of(model).num_nodes == fused + 5 + 2
    attn.k_proj.activations = "bf16"
    assert graph_of(model).num_nodes == fused
    # In float32 the norm and the router are fused, what stands before attention is not: norm, three products,
    # rotation, cache.
    unrounded = AROUND_LAYERS + 2 + layers * (6 + 1 + 1 + 1 + kernels)
    assert graph_of(gpu_load(gpu, "float32")).num_nodes == unrounded


def test_kernels_of_a_step_overlap(gpu, gpu_folder, monkeypatch):
    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    graph = graph_of(model)
    can = gpu.status().devices[0].compute_capability >= (9, 0) or hasattr(gpu, "set_seed")
    # The experts' are launched as their own file says; nothing stands before the first.
    least = graph.num_nodes - 1 - len(model.layers) * expert_kernels(model)
    assert graph.num_overlaps >= (least if can else 0)
    assert can or graph.num_overlaps == 0
    monkeypatch.setenv("MXMOE_CUDA_OVERLAP", "0")
    plain = graph_of(mxmoe.load(gpu_folder, **GPU_MODES["bf16"]))
    assert (plain.num_nodes, plain.num_overlaps) == (graph.num_nodes, 0)


# Memory


def test_a_model_takes_its_checkpoint_and_gives_it_back(emulation, gpu_folder):
    cuda.synchronize()
    gc.collect()
    start = emulation.device_bytes()
    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    held = sum(part["bytes"] for part in model.components.values())
    assert held == Checkpoint.open(gpu_folder).nbytes
    cache = model.new_cache(100)
    in_chunks(model, IDS[:5], [1] * 5, cache)
    del model, cache
    gc.collect()
    emulation.current_stream().synchronize()
    # What streams keep for the next op stays with them.
    assert emulation.device_bytes() < start + held // 2


def test_no_room_is_said_of_what(emulation, gpu_folder):
    emulation.set_memory_limit(emulation.device_bytes() + 300_000)
    with pytest.raises(MemoryError, match=r"no room for layer \d's \w+ \(the model has .* already") as problem:
        mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    assert "free" in str(problem.value)
    emulation.set_memory_limit(0)
    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    emulation.set_memory_limit(emulation.device_bytes() + 100_000)
    with pytest.raises(MemoryError, match=r"no room for layer \d's keys and values of 16 x 4000 tokens"):
        model.new_cache(4000, num_sequences=16)


# Commands


def test_info_takes_no_memory_of_a_gpu(emulation, gpu_folder):
    from mxmoe.commands import info

    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    before = emulation.device_bytes()
    result = info.run(model)
    assert emulation.device_bytes() == before
    held = model.new_cache(8192)
    assert result["contexts"]["8192"]["kv_cache_bytes"] == held.nbytes


# What is refused


@pytest.mark.parametrize("option", ["dense", "activations"])
def test_what_is_the_cpus_alone(gpu_folder, option):
    with pytest.raises(ValueError, match=f"{option} is 'int8', which only device 'cpu' does"):
        mxmoe.load(gpu_folder, device="cuda", **{option: "int8"})
    with pytest.raises(ValueError, match="backend is 'reference'"):
        mxmoe.load(gpu_folder, device="cuda", backend="reference")
    with pytest.raises(ValueError, match="device is 'tpu'; wanted 'cpu' or 'cuda'"):
        mxmoe.load(gpu_folder, device="tpu")


def test_a_cache_elsewhere_is_refused(gpu_model, gpu_folder):
    cpu = mxmoe.load(gpu_folder)
    with pytest.raises(ValueError, match="cache is on 'cpu'; wanted one on 'cuda'"):
        gpu_model.forward(IDS[:3], cache=cpu.new_cache(9))
    with pytest.raises(ValueError, match="cache is on 'cuda'; wanted one on 'cpu'"):
        cpu.forward(IDS[:3], cache=gpu_model.new_cache(9))


def test_a_host_array_in_a_layers_place_is_refused(gpu, gpu_folder):
    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    model.norm.weight = np.ones(CONFIG.hidden_size, np.float32)
    with pytest.raises((TypeError, ValueError), match="weight"):
        model.forward(IDS[:3])


@pytest.mark.skipif(cuda.problem() is None, reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_missing(gpu_folder):
    command = [sys.executable, "-m", "mxmoe", "generate", "--device", "cuda", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("mxmoe: error: device is 'cuda', but this machine cannot run there: ")
    with pytest.raises(RuntimeError) as problem:
        mxmoe.load(gpu_folder, device="cuda")
    assert str(problem.value).endswith(str(mxmoe.doctor().cuda["problem"]))
    checkpoints.assert_clear(problem)


def test_refusals_leave_the_cache_as_it_was(gpu_model):
    cache = gpu_model.new_cache(12)
    gpu_model.forward(IDS[:10], cache=cache)
    with pytest.raises(ValueError, match="3 more do not fit"):
        gpu_model.forward(IDS[10:13], cache=cache)
    with pytest.raises(ValueError, match="token_ids holds 200"):
        gpu_model.forward([200], cache=cache)
    assert cache.lengths == (10,)
    assert_exact(in_chunks(gpu_model, IDS[10:12], [1, 1], cache), gpu_model.forward(IDS[:12])[10:])
    other = mxmoe.load(gpu_model.path, device="cuda")
    assert other.config == gpu_model.config
    with pytest.raises(ValueError, match="another configuration"):
        gpu_model.check_cache(KVCache(replace(CONFIG, sliding_window=21), 5))
