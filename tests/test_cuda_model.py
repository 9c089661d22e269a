"""The whole model on a GPU: against float64, against the CPU, and the same bits however it is run."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import MODEL_NOISE, assert_exact, assert_model_close
from mxmoe import cuda
from mxmoe.checkpoint import Checkpoint
from mxmoe.decoding import _Recording
from mxmoe.kv_cache import KVCache
from mxmoe.reference import model as reference
from mxmoe.sampling import Sampler, SamplingParams
from op_helpers import BF16
from small_models import CONFIG, MODES, in_chunks, random_ids, write

IDS = random_ids(90)
GPU_MODES = {name: MODES[name] | {"device": "cuda"} for name in ("float32", "bf16")}
PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "x")


@pytest.fixture(scope="module")
def load(folder):
    """Models by the extension they run on and their mode, loaded once."""

    @functools.cache
    def cached(module, mode):
        return mxmoe.load(folder, **GPU_MODES[mode])

    return cached


@pytest.fixture
def model(gpu, load):
    """The mode that goes by the tensor cores' kernels; the other is ten times slower on the emulation."""
    return load(gpu, "bf16")


@pytest.fixture(scope="module")
def truth(folder):
    """The float64 logits and captured values."""
    seen = {}
    logits = reference.forward(Checkpoint.open(folder), IDS[:50], capture=seen)
    return logits, seen


def plain(model):
    """Keep a model from replaying graphs: somebody watches."""
    return model.hook("logits", lambda value, context: None)


def small_pages(model, max_tokens, num_sequences=1):
    """A cache of many blocks, so that sequences grow into new ones and past what a graph was made for."""
    options = {"num_sequences": num_sequences, "dtype": model.options.kv, "step_tokens": 64}
    return KVCache(CONFIG, max_tokens, block_size=8, device=model.new_cache(1).device, **options)


# Right


def rows_of(value):
    return value.reshape(len(value), -1)


def test_every_step_agrees_with_the_reference(gpu, load, truth):
    want, seen = truth
    model = load(gpu, "float32")
    got, captured = model.forward(IDS[:50], capture=["*"])
    assert_model_close(got, want, limit=MODEL_NOISE / 10)
    assert list(captured) == model.sites
    for site, value in seen.items():
        if site.endswith("topk_ids"):
            assert_exact(captured[site], value)
        else:
            assert captured[site].dtype == np.float32
            assert_model_close(rows_of(captured[site]), rows_of(value), limit=MODEL_NOISE / 10)


def test_rounded_it_is_as_near_as_the_cpu(gpu, load, folder, truth):
    got = load(gpu, "bf16").forward(IDS[:50])
    assert_model_close(got, truth[0], mxmoe.load(folder, **MODES["bf16"]).forward(IDS[:50]))


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS[1:])
def test_layouts_give_the_same_logits(gpu, load, tmp_path, layout):
    got = mxmoe.load(write(tmp_path / "x", layout=layout), **GPU_MODES["bf16"]).forward(IDS[:20])
    assert_exact(got, load(gpu, "bf16").forward(IDS[:20]))


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
def test_any_chunks_give_the_same_bits(model, sizes):
    assert_exact(in_chunks(model, IDS, sizes), model.forward(IDS))


def test_any_chunks_give_the_same_bits_unrounded(gpu, load):
    model = load(gpu, "float32")
    assert_exact(in_chunks(model, IDS[:12], [7, 2, 1, 1, 1]), model.forward(IDS[:12]))


def test_a_replayed_step_has_the_bits_of_a_plain_one(model):
    """One by one over blocks of 8: new blocks, blocks let go of, and graphs for 32, 64 and 128 tokens."""
    want = model.forward(IDS)
    replayed = in_chunks(model, IDS, [1] * 90, small_pages(model, 90))
    with plain(model):
        assert_exact(in_chunks(model, IDS, [1] * 90, small_pages(model, 90)), want)
    assert_exact(replayed, want)


@pytest.mark.parametrize("count", [8, 9, 33])
def test_many_sequences_decode_as_each_alone(model, count):
    """Eight go by one launch for norm, products and rotation, more by two, and very many by the plain ops."""
    ids = np.stack([random_ids(4, seed=i) for i in range(count)])
    cache = small_pages(model, 4, num_sequences=count)
    rows = [model.forward(ids[:, i], cache=cache, cu_seqlens=range(count + 1)) for i in range(4)]
    for sequence in {0, 7, count - 1}:
        assert_exact(np.stack([row[sequence] for row in rows]), model.forward(ids[sequence]))


LENGTHS = [1, 40, 7, 25]


def test_any_company_gives_the_same_bits(model):
    prompts = [random_ids(n, seed=100 + i) for i, n in enumerate(LENGTHS)]
    alone = [model.forward(ids) for ids in prompts]
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3, 1]):
        bounds = np.concatenate([[0], np.cumsum([LENGTHS[i] for i in order])])
        together = model.forward(np.concatenate([prompts[i] for i in order]), cu_seqlens=bounds)
        for i, begin, end in zip(order, bounds, bounds[1:], strict=False):
            assert_exact(together[begin:end], alone[i])


def test_decoding_in_changing_company(model):
    prompts = [random_ids(30, seed=i) for i in range(3)]
    alone = [model.forward(ids) for ids in prompts]
    cache, done = small_pages(model, 40, num_sequences=4), [5, 9, 1]
    for i in range(3):
        assert_exact(model.forward(prompts[i][: done[i]], cache=cache, sequences=[i + 1]), alone[i][: done[i]])
    for order in [[0, 1, 2]] * 4 + [[2, 0, 1]] * 3 + [[1, 0]] * 3 + [[2]] * 3 + [[0, 1, 2]] * 3:
        ids = [prompts[i][done[i]] for i in order]
        rows = model.forward(
            ids, cache=cache, cu_seqlens=range(len(order) + 1), sequences=[i + 1 for i in order], logits="last"
        )
        for row, i in zip(rows, order, strict=True):
            assert_exact(row, alone[i][done[i]])
            done[i] += 1
    assert cache.lengths == (0, *done)


def test_more_than_a_step_and_a_block_of_the_cache(model):
    ids = random_ids(300, seed=5)
    want = model.forward(ids)  # at once, over two blocks of 256
    cache = KVCache(CONFIG, 300, dtype="bf16", step_tokens=128, device=model.new_cache(1).device)
    assert_exact(in_chunks(model, ids, [250, *[1] * 10, 30, 1], cache), want)
    assert_exact(model.forward(ids[:140], logits="last"), want[139:140])


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


def test_a_layer_is_few_kernels(model):
    assert expert_kernels(model) == 2
    assert graph_of(model).num_nodes == AROUND_LAYERS + 6 * len(model.layers)
    # More sequences than one launch can normalise for.
    more = graph_of(model, 9).num_nodes - AROUND_LAYERS
    assert more == len(model.layers) * (5 + expert_kernels(model, 9))


def test_what_cannot_be_fused_takes_the_plain_ops(gpu, load, folder):
    from mxmoe.layers import LowRank

    model = mxmoe.load(folder, **GPU_MODES["bf16"])
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
    assert graph_of(load(gpu, "float32")).num_nodes == unrounded


def test_kernels_of_a_step_overlap(gpu, folder, monkeypatch):
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    graph = graph_of(model)
    can = gpu.status().devices[0].compute_capability >= (9, 0) or hasattr(gpu, "set_seed")
    # The experts' are launched as their own file says; nothing stands before the first.
    least = graph.num_nodes - 1 - len(model.layers) * expert_kernels(model)
    assert graph.num_overlaps >= (least if can else 0)
    assert can or graph.num_overlaps == 0
    monkeypatch.setenv("MXMOE_CUDA_OVERLAP", "0")
    plain = graph_of(mxmoe.load(folder, **GPU_MODES["bf16"]))
    assert (plain.num_nodes, plain.num_overlaps) == (graph.num_nodes, 0)


# Generation


def generated(model, prompt, count, **options):
    return [s.token_id for s in model.generate(prompt, count, stop_token_ids=[], **options)]


def test_greedy_tokens_are_those_of_the_logits(model):
    steps = list(model.generate(IDS[:30], 25, stop_token_ids=[]))
    ids = np.concatenate([IDS[:30], [s.token_id for s in steps]])
    logits = model.forward(ids)[29:-1].astype(np.float64)
    assert_exact(np.array([s.token_id for s in steps]), logits.argmax(axis=1))
    top = logits.max(axis=1)
    want = -np.log(np.exp(logits - top[:, None]).sum(axis=1))
    np.testing.assert_allclose([s.logprob for s in steps], want, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_cpu(gpu, load, folder):
    model, cpu = load(gpu, "float32"), mxmoe.load(folder, **MODES["float32"])
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
        assert generated(model, IDS[:4], 4, **options) == generated(cpu, IDS[:4], 4, **options)


def test_a_batch_gives_what_each_gives_alone(model):
    prompts = [random_ids(n, seed=n) for n in (12, 1, 30)]
    for options in ({}, {"temperature": 1.0}):
        together = model.generate_batch(prompts, 6, **options)
        for i, (prompt, one) in enumerate(zip(prompts, together, strict=True)):
            alone = list(model.generate(prompt, 6, seed=i, **options))
            assert [s.token_id for s in alone] == one.token_ids
            assert [s.logprob for s in alone] == one.logprobs


@pytest.fixture
def starts(monkeypatch):
    """The ids that every step launched by a decoder was given: None for those of the step before."""
    seen = []
    start = _Recording.start

    def spy(self, model, cache, rope, ids, *rest):
        seen.append(ids)
        return start(self, model, cache, rope, ids, *rest)

    monkeypatch.setattr(_Recording, "start", spy)
    return seen


def test_the_next_step_is_launched_before_the_last_token_is_read(model, starts):
    steps = model.generate(IDS[:5], 6, stop_token_ids=[])
    tokens = [next(steps).token_id, next(steps).token_id]
    assert [ids is None for ids in starts] == [False, True]  # the prompt's token came another way
    tokens += [step.token_id for step in steps]
    assert [ids is None for ids in starts] == [False, *[True] * 4]  # no step for a seventh
    ids = np.concatenate([IDS[:5], tokens])
    assert_exact(np.array(tokens), model.forward(ids)[4:-1].argmax(axis=1))


def test_a_step_launched_in_vain_leaves_nothing(model, starts):
    tokens = generated(model, IDS[:20], 8)
    del starts[:]
    cache, other = (small_pages(model, 40) for _ in range(2))
    steps = list(model.generate(IDS[:20], 8, stop_token_ids=[tokens[3]], cache=cache))
    assert len(steps) == 4 and len(starts) == 4  # one of them past the stop token
    assert cache.lengths == (23,)
    ids = np.concatenate([IDS[:20], tokens[:3], IDS[23:30]])
    assert_exact(in_chunks(model, ids[23:], [1] * 7, cache), model.forward(ids)[23:])
    # What stands in its place is never seen, wherever the cache is used next.
    steps = model.generate(IDS[:20], 8, stop_token_ids=[], cache=other)
    for _ in range(3):
        next(steps)
    steps.close()
    other.reset()
    assert_exact(in_chunks(model, IDS[:29], [9, *[1] * 20], other), model.forward(IDS[:29]))


def test_drawn_tokens_are_those_of_the_host(model, starts):
    """The same numbers, however a step runs: launched ahead, or watched and then drawn apart."""
    for options in ({"temperature": 1.0}, {"temperature": 1.5, "top_p": 0.8, "top_k": 30, "min_p": 0.02, "seed": 7}):
        sampler = Sampler(SamplingParams(**{k: v for k, v in options.items() if k != "seed"}), options.get("seed", 0))
        ids = list(IDS[:9])
        for _ in range(9):
            ids.append(sampler(model.forward(ids, logits="last")[0])[0])
        want = ids[9:]
        assert not starts
        assert generated(model, IDS[:9], 9, **options) == want
        assert [ids is None for ids in starts] == [False, *[True] * 7]
        del starts[:]
        steps, tokens = model.generate(IDS[:9], 9, stop_token_ids=[], **options), []
        for i in range(9):
            if i == 5:
                with plain(model):
                    tokens.append(next(steps).token_id)
            else:
                tokens.append(next(steps).token_id)
        assert tokens == want
        del starts[:]


def test_changes_between_steps_are_felt_by_the_next(gpu, folder):
    def tokens_of(between, ahead):
        model = mxmoe.load(folder, **GPU_MODES["bf16"])
        cache, token = small_pages(model, 60), IDS[0]
        tokens = []
        for i in range(9):
            where = {"cache": cache, "ahead": ahead}
            token = model.likeliest([token], **where)[0][0]
            tokens.append(int(token))
            if i in (3, 6):
                between(model, cache)
        return tokens

    def other_head(model, cache):
        head = model.lm_head.weight
        head.set(np.ascontiguousarray(head.numpy()[::-1]))

    def other_norm(model, cache):
        model.norm.weight = cuda.array(-model.norm.weight.numpy())

    def other_history(model, cache):
        length = cache.lengths[0]
        cache.reset()
        model.forward(IDS[30 : 30 + length], cache=cache)

    def hook(model, cache):
        model.hook("layers.0.residual", lambda x, _: 0.5 * x)

    def another_token(model, cache):
        model.forward([5], cache=cache)

    want = tokens_of(lambda *_: None, False)
    assert tokens_of(lambda *_: None, True) == want
    for between in (other_head, other_norm, other_history, hook, another_token):
        changed = tokens_of(between, False)
        assert tokens_of(between, True) == changed
        assert changed != want, between


def test_a_full_cache_ends_it(model):
    cache = small_pages(model, 12)
    assert len(generated(model, IDS[:4], 9, cache=cache)) == 9
    assert cache.lengths == (12,)
    cache.reset()
    token = IDS[0]
    for _ in range(12):
        (token,), _ = model.likeliest([token], cache=cache, ahead=True)
    with pytest.raises(ValueError, match="1 more do not fit"):
        model.likeliest([token], cache=cache, ahead=True)


def test_stop_tokens_end_it(model):
    tokens = generated(model, IDS[:20], 12)
    steps = list(model.generate(IDS[:20], 12, stop_token_ids=[tokens[4]]))
    assert [s.token_id for s in steps] == tokens[: tokens.index(tokens[4]) + 1]
    assert steps[-1].finish_reason == "stop"


def test_broken_weights_are_told(gpu, folder):
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    model.norm.weight = cuda.array(np.full(CONFIG.hidden_size, np.nan, np.float32))
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match="are the weights or a hook broken"):
            generated(model, IDS[:5], 3, **options)
    good = mxmoe.load(folder, **GPU_MODES["bf16"])
    steps = good.generate(IDS[:5], 9, temperature=1.0, stop_token_ids=[])
    next(steps), next(steps)
    good.norm.weight = model.norm.weight
    with pytest.raises(ValueError, match="the logits hold a NaN or infinity"):
        next(steps)


def test_threads_of_python_share_one_model(gpu, load):
    model = load(gpu, "bf16")
    prompts = [random_ids(n, seed=n) for n in (9, 20)]
    want = [generated(model, p, 6) for p in prompts]

    def run(prompt):
        cuda.use(gpu)
        return generated(model, prompt, 6)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, prompts)) == want


# Looking inside, and changing


def test_hooks_see_and_change_what_they_do_on_the_cpu(gpu, load, folder):
    seen = {}

    def ablate(logits, context):
        seen.setdefault(context.site, []).append(context.positions.copy())
        logits[:, 3] = -np.inf

    results = []
    for model in (load(gpu, "float32"), mxmoe.load(folder, **MODES["float32"])):
        with model.hook("layers.*.router_logits", ablate), model.hook("layers.1.keys", lambda k, _: 0.5 * k):
            results.append(model.forward(IDS[:6], capture=["layers.2.topk_ids", "layers.0.sink_share"]))
        results.append(model.forward(IDS[:6], capture=["layers.2.topk_ids"]))
    (got, captured), (bare, _), (want, wanted), (bare_want, _) = results
    assert_model_close(got, want, limit=MODEL_NOISE)
    assert_model_close(bare, bare_want, limit=MODEL_NOISE)
    assert np.abs(got - bare).max() > 0.01
    assert_exact(captured["layers.2.topk_ids"], wanted["layers.2.topk_ids"])
    assert not (captured["layers.2.topk_ids"] == 3).any()
    np.testing.assert_allclose(captured["layers.0.sink_share"], wanted["layers.0.sink_share"], rtol=1e-4, atol=1e-6)
    assert len(seen) == 3
    changing = load(gpu, "float32").hook("layers.0.sink_share", lambda share, _: share + 1)
    with changing, pytest.raises(ValueError, match="read-only"):
        load(gpu, "float32").forward(IDS[:3])


def test_a_hook_between_decoding_steps_is_felt(model):
    cache = model.new_cache(60)
    model.forward(IDS[:10], cache=cache)
    for i in (10, 11, 12):
        model.forward(IDS[i : i + 1], cache=cache)
    with model.hook("layers.0.residual", lambda x, _: np.zeros_like(x)):
        changed = model.forward(IDS[13:14], cache=cache)
    cache.reset()
    model.forward(IDS[:13], cache=cache)
    assert_exact(model.forward(IDS[13:14], cache=cache), model.forward(IDS[:14])[13:])
    assert (changed != model.forward(IDS[:14])[13:]).any()


def test_new_weights_are_taken_by_the_next_step(gpu, folder):
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    cache = model.new_cache(60)
    before = in_chunks(model, IDS[:9], [1] * 9, cache)
    scale = np.linspace(0.5, 2.0, CONFIG.hidden_size, dtype=np.float32)
    changes = [
        lambda: setattr(model.layers[1].input_layernorm, "weight", cuda.array(scale)),
        lambda: setattr(model.layers[0].mlp.router, "weight", cuda.array(np.ascontiguousarray(router[::-1]))),
        lambda: model.layers.reverse(),
        lambda: model.lm_head.weight.set(np.ascontiguousarray(head[::-1])),  # in place
    ]
    router, head = (part.weight.numpy() for part in (model.layers[0].mlp.router, model.lm_head))
    for change in changes:
        change()
        cache.reset()
        with plain(model):
            want = in_chunks(model, IDS[:9], [1] * 9, cache)
        cache.reset()
        got = in_chunks(model, IDS[:9], [1] * 9, cache)
        assert_exact(got, want)
        assert (got != before).any()
        before = got


def test_an_adapter_beside_the_layers(gpu, load, folder):
    from mxmoe.adapters import bfloat16_parts
    from mxmoe.layers import LowRank

    def put(model, there):
        rng = np.random.default_rng(7)
        layer = model.layers[1]
        for part in (*layer.self_attn.projections, layer.mlp.experts, layer.mlp.router, model.lm_head):
            size = (CONFIG.hidden_size,) * 2
            if part is not layer.mlp.experts:
                size = part.out_features, part.held[0].shape[1] if not part.packed else CONFIG.hidden_size
            a, b = (0.1 * rng.standard_normal(shape) for shape in ((4, size[1]), (size[0], 4)))
            parts = [tuple(map(there, bfloat16_parts(x.astype(np.float32), exact=False))) for x in (a, b)]
            part.adapter = LowRank(part.ops, *parts, part.activations)
        return model.forward(IDS[:12])

    model = mxmoe.load(folder, **GPU_MODES["float32"])
    got = put(model, cuda.array)
    assert_model_close(got, put(mxmoe.load(folder, **MODES["float32"]), lambda x: x), limit=MODEL_NOISE)
    assert np.abs(got - load(gpu, "float32").forward(IDS[:12])).max() > 0.01
    assert_exact(in_chunks(model, IDS[:12], [8, *[1] * 4]), got)


def test_layers_whose_activations_differ(gpu, folder):
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    want = model.forward(IDS[:20])
    model.layers[0].self_attn.k_proj.activations = "float32"
    got = model.forward(IDS[:20])
    assert (got != want).any()
    assert_model_close(got, want, limit=0.05)


# Memory


def test_a_model_takes_its_checkpoint_and_gives_it_back(emulation, folder):
    cuda.synchronize()
    gc.collect()
    start = emulation.device_bytes()
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    held = sum(part["bytes"] for part in model.components.values())
    assert held == Checkpoint.open(folder).nbytes
    cache = model.new_cache(100)
    in_chunks(model, IDS[:5], [1] * 5, cache)
    del model, cache
    gc.collect()
    emulation.current_stream().synchronize()
    # What streams keep for the next op stays with them.
    assert emulation.device_bytes() < start + held // 2


def test_no_room_is_said_of_what(emulation, folder):
    emulation.set_memory_limit(emulation.device_bytes() + 300_000)
    with pytest.raises(MemoryError, match=r"no room for layer \d's \w+ \(the model has .* already") as problem:
        mxmoe.load(folder, **GPU_MODES["bf16"])
    assert "free" in str(problem.value)
    emulation.set_memory_limit(0)
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    emulation.set_memory_limit(emulation.device_bytes() + 100_000)
    with pytest.raises(MemoryError, match=r"no room for layer \d's keys and values of 16 x 4000 tokens"):
        model.new_cache(4000, num_sequences=16)


# Commands


def test_info_takes_no_memory_of_a_gpu(emulation, folder):
    from mxmoe.commands import info

    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    before = emulation.device_bytes()
    result = info.run(model)
    assert emulation.device_bytes() == before
    held = model.new_cache(8192)
    assert result["contexts"]["8192"]["kv_cache_bytes"] == held.nbytes


# What is refused


@pytest.mark.parametrize("option", ["dense", "activations"])
def test_what_is_the_cpus_alone(folder, option):
    with pytest.raises(ValueError, match=f"{option} is 'int8', which only device 'cpu' does"):
        mxmoe.load(folder, device="cuda", **{option: "int8"})
    with pytest.raises(ValueError, match="backend is 'reference'"):
        mxmoe.load(folder, device="cuda", backend="reference")
    with pytest.raises(ValueError, match="device is 'tpu'; wanted 'cpu' or 'cuda'"):
        mxmoe.load(folder, device="tpu")


def test_a_cache_elsewhere_is_refused(model, folder):
    cpu = mxmoe.load(folder)
    with pytest.raises(ValueError, match="cache is on 'cpu'; wanted one on 'cuda'"):
        model.forward(IDS[:3], cache=cpu.new_cache(9))
    with pytest.raises(ValueError, match="cache is on 'cuda'; wanted one on 'cpu'"):
        cpu.forward(IDS[:3], cache=model.new_cache(9))


def test_a_host_array_in_a_layers_place_is_refused(gpu, folder):
    model = mxmoe.load(folder, **GPU_MODES["bf16"])
    model.norm.weight = np.ones(CONFIG.hidden_size, np.float32)
    with pytest.raises((TypeError, ValueError), match="weight"):
        model.forward(IDS[:3])


@pytest.mark.skipif(cuda.problem() is None, reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_missing(folder):
    command = [sys.executable, "-m", "mxmoe", "generate", "--device", "cuda", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("mxmoe: error: device is 'cuda', but this machine cannot run there: ")
    with pytest.raises(RuntimeError) as problem:
        mxmoe.load(folder, device="cuda")
    assert str(problem.value).endswith(str(mxmoe.doctor().cuda["problem"]))
    checkpoints.assert_clear(problem)


def test_refusals_leave_the_cache_as_it_was(model):
    cache = model.new_cache(12)
    model.forward(IDS[:10], cache=cache)
    with pytest.raises(ValueError, match="3 more do not fit"):
        model.forward(IDS[10:13], cache=cache)
    with pytest.raises(ValueError, match="token_ids holds 200"):
        model.forward([200], cache=cache)
    assert cache.lengths == (10,)
    assert_exact(in_chunks(model, IDS[10:12], [1, 1], cache), model.forward(IDS[:12])[10:])
    other = mxmoe.load(model.path, device="cuda")
    assert other.config == model.config
    with pytest.raises(ValueError, match="another configuration"):
        model.check_cache(KVCache(replace(CONFIG, sliding_window=21), 5))
