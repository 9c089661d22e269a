"""Looking inside a forward pass, and changing what is found there."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import checkpoints
import mxmoe
from compare import MODEL_NOISE, assert_exact, assert_model_close
from small_models import CONFIG, MODES, in_chunks, random_ids, write

IDS = random_ids(40)
LONG = random_ids(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("inspection") / "x")


@pytest.fixture
def model(folder):
    return mxmoe.load(folder, **MODES["float32"])


@pytest.fixture
def slow(folder):
    return mxmoe.load(folder, backend="reference")


def documented(site):
    """Columns and dtype of a site, as `site_names` tells them."""
    c = CONFIG
    heads = (c.num_attention_heads, c.head_dim)
    kv_heads = (c.num_key_value_heads, c.head_dim)
    chosen = (c.experts_per_token,)
    shapes = {"queries": heads, "keys": kv_heads, "values": kv_heads, "attention": heads}
    shapes |= {"sink_share": heads[:1], "router_logits": (c.num_experts,), "topk_ids": chosen, "topk_weights": chosen}
    name = site.rsplit(".", 1)[-1]
    columns = shapes.get(name, (c.vocab_size,) if name == "logits" else (c.hidden_size,))
    return columns, np.int32 if name == "topk_ids" else np.float32


# Capture


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("ids", [IDS[:1], IDS, LONG], ids=len)
def test_every_site_has_its_shape_and_changes_no_bit(folder, name, ids):
    model = mxmoe.load(folder, **MODES[name])
    logits, captured = model.forward(ids, capture=["*"])
    assert_exact(logits, model.forward(ids))
    assert list(captured) == model.sites
    for site, value in captured.items():
        columns, dtype = documented(site)
        assert (value.shape, value.dtype) == ((len(ids), *columns), dtype), site
        assert np.isfinite(value).all(), site
    assert_exact(captured["logits"], logits)


def test_captured_values_make_sense(model):
    _, seen = model.forward(IDS, capture=["*"])
    for i in range(3):
        share = seen[f"layers.{i}.sink_share"]
        assert ((share > 0) & (share < 1)).all()
        ids, router = seen[f"layers.{i}.topk_ids"], seen[f"layers.{i}.router_logits"]
        assert_exact(ids, np.argsort(-router, axis=1, kind="stable")[:, :3].astype(np.int32))
        np.testing.assert_allclose(seen[f"layers.{i}.topk_weights"].sum(axis=1), 1, rtol=1e-6)
    assert_exact(seen["embedding"], model.embed_tokens.weight[IDS].astype(np.float32))
    # The first token's softmax has one key and the sink.
    q, k = seen["layers.0.queries"][0], np.repeat(seen["layers.0.keys"][0], 3, axis=0)
    score = (q * k).sum(axis=1) * CONFIG.sm_scale
    sinks = model.layers[0].self_attn.sinks.astype(np.float64)
    np.testing.assert_allclose(seen["layers.0.sink_share"][0], 1 / (1 + np.exp(score - sinks)), rtol=1e-5)


def test_captured_values_are_copies(model):
    _, seen = model.forward(IDS, capture=["layers.0.residual", "layers.1.residual"])
    before = seen["layers.1.residual"].copy()
    seen["layers.0.residual"][:] = 0
    model.forward(IDS[::-1])
    assert_exact(seen["layers.1.residual"], before)


def test_capture_takes_names_and_patterns(model):
    def sites(*capture):
        return list(model.forward(IDS, capture=capture)[1])

    assert sites("embedding") == ["embedding"]
    assert sites("layers.*.residual") == [f"layers.{i}.residual" for i in range(3)]
    assert sites("layers.[02].topk_ids", "logits", "logits") == ["layers.0.topk_ids", "layers.2.topk_ids", "logits"]
    assert sites("*residual") == [f"layers.{i}.{x}residual" for i in range(3) for x in ("attention_", "")]
    assert sites() == []


def test_capture_of_chunks_and_batches_has_the_rows_of_one_run(model):
    _, whole = model.forward(LONG, capture=["*"])
    cache = model.new_cache(600, num_sequences=2)
    parts = [model.forward(LONG[a:b], cache=cache, capture=["*"])[1] for a, b in ((0, 7), (7, 100), (100, 600))]
    _, batch = model.forward(np.concatenate([IDS, LONG]), cu_seqlens=[0, 40, 640], capture=["*"])
    for site, value in whole.items():
        assert_exact(np.concatenate([part[site] for part in parts]), value)
        assert_exact(batch[site][40:], value)


def test_rows_that_are_not_wanted_are_not_captured(model):
    bounds = [0, 40, 640]
    _, every = model.forward(np.concatenate([IDS, LONG]), cu_seqlens=bounds, capture=["*"])
    _, last = model.forward(np.concatenate([IDS, LONG]), cu_seqlens=bounds, capture=["*"], logits="last")
    for site, value in every.items():
        rows = [39, 639] if site in ("final_norm", "logits") else slice(None)
        assert_exact(last[site], value[rows])


# Hooks


def test_a_hook_that_returns_none_changes_no_bit(model):
    want = model.forward(LONG)
    calls = []
    with model.hook("*", lambda value, context: calls.append((context.site, value.shape))):
        assert_exact(model.forward(LONG), want)
    # Once for each step of up to 512 tokens, in the order of computation.
    assert [site for site, _ in calls] == model.sites * 2
    assert calls == [
        (site, (rows, *documented(site)[0])) for rows in (512, 88) for site in model.sites
    ]  # fmt: skip


def test_a_hook_that_returns_its_value_changes_no_bit(model):
    want = model.forward(IDS)
    with model.hook("*", lambda value, _: value):
        assert_exact(model.forward(IDS), want)
    with model.hook("*", lambda value, context: None if "sink_share" in context.site else value.copy()):
        assert_exact(model.forward(IDS), want)


def both(model, slow, pattern, fn):
    """Run kernels and reference under one hook; return the kernels' captured values, proved right."""
    plain = model.forward(IDS)
    with model.hook(pattern, fn), slow.hook(pattern, fn):
        got, seen = model.forward(IDS, capture=["*"])
        want = slow.forward(IDS)
    assert_model_close(got, want, limit=MODEL_NOISE)
    assert (got != plain).any(), "the hook did nothing"
    assert_exact(model.forward(IDS), plain)
    return seen


def test_an_ablated_expert_is_never_chosen(model, slow):
    def ablate(logits, _):
        logits[:, 3] = -np.inf

    assert (model.forward(IDS, capture=["layers.*.topk_ids"])[1]["layers.1.topk_ids"] == 3).any()
    seen = both(model, slow, "layers.*.router_logits", ablate)
    for i in range(3):
        assert (seen[f"layers.{i}.topk_ids"] != 3).all()
        assert (seen[f"layers.{i}.router_logits"][:, 3] == -np.inf).all()


def test_chosen_experts_can_be_dictated(model, slow):
    def dictate(ids, _):
        return np.broadcast_to(np.array([5, 0, 2], np.int32), ids.shape)

    seen = both(model, slow, "layers.2.topk_ids", dictate)
    assert (seen["layers.2.topk_ids"] == [5, 0, 2]).all()


def test_experts_can_be_weighed_anew(model, slow):
    seen = both(model, slow, "layers.0.topk_weights", lambda weights, _: np.zeros_like(weights))
    # Nothing comes from the experts: the residual stream passes through.
    assert_exact(seen["layers.0.residual"], seen["layers.0.attention_residual"])


def test_the_residual_stream_can_be_steered(model, slow):
    _, before = model.forward(IDS, capture=["*"])
    direction = np.random.default_rng(0).standard_normal(CONFIG.hidden_size).astype(np.float32)
    seen = both(model, slow, "layers.1.residual", lambda x, _: x + direction)
    assert_exact(seen["layers.1.residual"], before["layers.1.residual"] + direction)
    assert_exact(seen["layers.1.topk_ids"], before["layers.1.topk_ids"])
    assert (
        seen["layers.2.router_logits"] != model.forward(IDS, capture=["layers.2.*"])[1]["layers.2.router_logits"]
    ).any()


def test_attention_can_be_replaced(model, slow):
    seen = both(model, slow, "layers.1.attention", lambda y, _: np.zeros_like(y))
    bias = model.layers[1].self_attn.o_proj.bias.astype(np.float32)
    np.testing.assert_allclose(seen["layers.1.attention_residual"], seen["layers.0.residual"] + bias, rtol=1e-6)


@pytest.mark.parametrize("site", ["queries", "keys", "values"])
def test_queries_keys_and_values_can_be_replaced(model, slow, site):
    both(model, slow, f"layers.1.{site}", lambda x, _: x[:, ::-1] * 0.5)


def test_replaced_keys_are_what_the_cache_holds(model):
    cache = model.new_cache(40)
    with model.hook("layers.1.keys", lambda keys, _: np.ones_like(keys)):
        model.forward(IDS, cache=cache)
    assert (cache.layers[1].k[0, :, :40] == 1).all()
    assert (cache.layers[0].k[0, :, :40] != 1).any()


def test_embedding_final_norm_and_logits_can_be_replaced(model, slow):
    both(model, slow, "embedding", lambda x, _: x * 2)
    both(model, slow, "final_norm", lambda x, _: -x)
    seen = both(model, slow, "logits", lambda x, _: x + np.arange(CONFIG.vocab_size))
    assert seen["logits"].dtype == np.float32


def test_hooks_steer_generation(model):
    def only_even(logits, _):
        logits[:, 1::2] = -np.inf

    with model.hook("logits", only_even):
        steps = list(model.generate(IDS, 20, temperature=2.0, stop_token_ids=[]))
        (batch,) = model.generate_batch([IDS], 20, temperature=2.0, stop_token_ids=[])
    assert all(step.token_id % 2 == 0 for step in steps)
    assert batch.token_ids == [step.token_id for step in steps]


def test_hooks_are_applied_in_the_order_they_came(model):
    order = []

    def make(name, factor):
        def fn(value, _):
            order.append((name, float(value[0, 0])))
            return value * factor

        return fn

    start = float(model.forward(IDS, capture=["embedding"])[1]["embedding"][0, 0])
    hooks = [model.hook(pattern, make(pattern, 2)) for pattern in ("embedding", "emb*", "*ing")]
    _, seen = model.forward(IDS, capture=["embedding"])
    assert order == [("embedding", start), ("emb*", 2 * start), ("*ing", 4 * start)]
    assert seen["embedding"][0, 0] == 8 * start
    hooks[1].remove()
    order.clear()
    model.forward(IDS)
    assert order == [("embedding", start), ("*ing", 2 * start)]


def test_removing_hooks(model):
    want = model.forward(IDS)
    first = model.hook("layers.0.residual", lambda x, _: x * 0)
    second = model.hook("layers.0.residual", lambda x, _: x + 1)
    assert (model.forward(IDS) != want).any()
    second.remove()
    second.remove()
    with first:
        assert (model.forward(IDS) != want).any()
    assert_exact(model.forward(IDS), want)


def test_a_hook_is_removed_even_when_its_block_fails(model):
    want = model.forward(IDS)
    with pytest.raises(KeyError), model.hook("embedding", lambda x, _: x * 0):
        raise KeyError
    assert_exact(model.forward(IDS), want)


def test_a_hook_may_remove_itself(model):
    want = model.forward(IDS)

    def once(x, _):
        hook.remove()
        return x * 0

    hook = model.hook("embedding", once)
    assert (model.forward(IDS) != want).any()
    assert_exact(model.forward(IDS), want)


def test_a_hook_on_one_model_is_not_on_another(folder, model):
    other = mxmoe.load(folder, **MODES["float32"])
    want = other.forward(IDS)
    with model.hook("embedding", lambda x, _: x * 0):
        assert_exact(other.forward(IDS), want)


def test_the_context_tells_where_a_row_comes_from(model):
    seen = []
    cache = model.new_cache(700, num_sequences=4)
    model.forward(IDS[:10], cache=cache, sequences=[2])
    with model.hook("*", lambda value, context: seen.append((len(value), context))):
        model.forward(LONG[:25], cache=cache, cu_seqlens=[0, 5, 25], sequences=[3, 2], logits="last")
    assert [context.site for _, context in seen] == model.sites
    for rows, context in seen:
        assert context.layer == (int(context.site.split(".")[1]) if "layers" in context.site else None)
        if context.site in ("final_norm", "logits"):
            assert (context.positions.tolist(), context.sequences.tolist()) == ([4, 29], [3, 2])
        else:
            assert context.positions.tolist() == [*range(5), *range(10, 30)]
            assert context.sequences.tolist() == [3] * 5 + [2] * 20
        assert rows == len(context.positions) == len(context.sequences)


def test_the_context_follows_steps_and_chunks(model):
    seen = {"embedding": [], "logits": []}

    def note(value, context):
        seen[context.site] += zip(context.sequences.tolist(), context.positions.tolist(), strict=True)

    cache = model.new_cache(600, num_sequences=2)
    with model.hook("embedding", note), model.hook("logits", note):
        in_chunks(model, LONG, [3, 64], cache, sequence=1)  # and a rest of two steps
        model.forward(IDS, cache=cache, logits="none")
    assert seen["logits"] == [(1, p) for p in range(600)]
    assert seen["embedding"] == [(1, p) for p in range(600)] + [(0, p) for p in range(40)]


# What is refused


@pytest.mark.parametrize(
    "pattern", ["residual", "layers.3.residual", "layers.0.nothing", "", "Logits", "layers.*.x*"]
)
def test_unknown_sites_are_refused(model, pattern):
    for call in (
        lambda: model.hook(pattern, lambda value, _: None),
        lambda: model.forward(IDS, capture=["logits", pattern]),
    ):
        with pytest.raises(
            ValueError, match=r"matches nothing; sites are embedding, layers\.0 to layers\.2"
        ) as problem:
            call()
        checkpoints.assert_clear(problem, repr(pattern), "router_logits")


@pytest.mark.parametrize("fn", [None, 3, "print"])
def test_what_is_no_function_is_refused(model, fn):
    with pytest.raises(TypeError, match="wanted a function of") as problem:
        model.hook("logits", fn)
    checkpoints.assert_clear(problem)


WRONG_VALUES = {
    "shape": ("embedding", lambda x: x[:, :-1], ValueError, r"returned shape \(40, 95\); wanted \(40, 96\) or None"),
    "rows": ("layers.1.residual", lambda x: x[1:], ValueError, r"returned shape \(39, 96\)"),
    "scalar": ("logits", lambda x: 0.0, ValueError, r"returned shape \(\)"),
    "float ids": ("layers.0.topk_ids", lambda x: x * 1.0, TypeError, "returned dtype float64; wanted int32"),
    "complex": ("layers.0.attention", lambda x: x * 1j, TypeError, "returned dtype complex64; wanted float32"),
    "text": ("embedding", lambda x: x.astype(str), TypeError, "returned dtype <U32; wanted float32"),
    "read-only": ("layers.2.sink_share", lambda x: x * 0, ValueError, "this place is read-only"),
}


@pytest.mark.parametrize(("site", "change", "error", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_are_refused(model, site, change, error, message):
    cache = model.new_cache(80)
    model.forward(LONG[:20], cache=cache)
    with model.hook(site, lambda x, _: change(x)), pytest.raises(error, match=message) as problem:
        model.forward(LONG[20:60], cache=cache)
    checkpoints.assert_clear(problem, f"the hook on {site}")
    if site not in ("logits", "final_norm"):
        assert cache.lengths == (20,)
        assert_exact(model.forward(LONG[20:60], cache=cache), model.forward(LONG[:60])[20:])


def test_a_read_only_value_cannot_be_changed_in_place(model):
    def change(share, _):
        share[:] = 0

    with model.hook("layers.0.sink_share", change), pytest.raises(ValueError, match="read-only"):
        model.forward(IDS)


@pytest.mark.parametrize("site", ["embedding", "layers.0.keys", "layers.1.sink_share", "layers.2.residual"])
def test_a_hook_that_raises_leaves_the_cache_usable(model, site):
    def fail(value, context):
        raise RuntimeError("from the hook")

    cache = model.new_cache(600, num_sequences=2)
    model.forward(LONG[:100], cache=cache, sequences=[1])
    for tokens in (LONG[100:101], LONG[100:103], LONG[100:400]):
        with model.hook(site, fail), pytest.raises(RuntimeError, match="from the hook"):
            model.forward(np.concatenate([IDS, tokens]), cache=cache, cu_seqlens=[0, 40, 40 + len(tokens)])
        assert cache.lengths == (0, 100)
    assert_exact(model.forward(LONG[100:], cache=cache, sequences=[1]), model.forward(LONG)[100:])
    assert_exact(model.forward(IDS, cache=cache), model.forward(IDS))


# Weights


def test_weights_are_reachable_and_replaceable(model):
    want = model.forward(IDS)
    layer = model.layers[1]
    reachable = {
        "router": (layer.mlp.router, "weight", (8, 96)),
        "router's bias": (layer.mlp.router, "bias", (8,)),
        "queries": (layer.self_attn.q_proj, "weight", (192, 96)),
        "keys": (layer.self_attn.k_proj, "weight", (64, 96)),
        "values": (layer.self_attn.v_proj, "bias", (64,)),
        "output": (layer.self_attn.o_proj, "weight", (96, 192)),
        "sinks": (layer.self_attn, "sinks", (6,)),
        "first norm": (layer.input_layernorm, "weight", (96,)),
        "second norm": (layer.post_attention_layernorm, "weight", (96,)),
        "experts": (layer.mlp.experts, "down_blocks", (8, 96, 5, 16)),
        "scales": (layer.mlp.experts, "gate_up_scales", (8, 320, 3)),
        "expert bias": (layer.mlp.experts, "gate_up_bias", (8, 320)),
        "embedding": (model.embed_tokens, "weight", (200, 96)),
        "last norm": (model.norm, "weight", (96,)),
        "head": (model.lm_head, "weight", (200, 96)),
    }
    for what, (owner, name, shape) in reachable.items():
        before = getattr(owner, name)
        assert before.shape == shape, what
        if before.dtype == np.uint8:
            after = np.where(before > 100, before - 3, before).astype(np.uint8)
        else:
            after = (before.astype(np.float32) * 1.5).astype(before.dtype)
        setattr(owner, name, after)
        assert (model.forward(IDS) != want).any(), what
        setattr(owner, name, before)
        assert_exact(model.forward(IDS), want)


def test_a_replaced_router_decides(model):
    router = model.layers[0].mlp.router
    router.weight = np.zeros_like(router.weight)
    router.bias = np.array([0, 9, 0, 7, 0, 0, 8, 0], ml_dtypes.bfloat16)
    _, seen = model.forward(IDS, capture=["layers.0.topk_ids"])
    assert (seen["layers.0.topk_ids"] == [1, 6, 3]).all()


def test_weights_of_the_file_cannot_be_changed_in_place(model):
    with pytest.raises(ValueError, match="read-only"):
        model.layers[0].mlp.router.weight[:] = 0


def test_a_weight_of_the_wrong_shape_is_refused(model):
    cache = model.new_cache(80)
    model.forward(IDS, cache=cache)
    router = model.layers[2].mlp.router
    before = router.weight
    for wrong in (before[:, :-1].copy(), before.astype(np.float64), before[0].copy()):
        router.weight = wrong
        with pytest.raises((ValueError, TypeError), match="weight") as problem:
            model.forward(IDS, cache=cache)
        checkpoints.assert_clear(problem)
        assert cache.lengths == (40,)
    router.weight = before
    assert_exact(model.forward(IDS, cache=cache), model.forward(np.concatenate([IDS, IDS]))[40:])
