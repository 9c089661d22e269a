"""transformers' gpt-oss on mxmoe's attention and MXFP4 experts, against its own eager float32 model."""

from __future__ import annotations

from typing import Any

import pytest

from transformers_backend import (
    CONFIGS,
    EVERY_TOKEN,
    NOISE,
    VERSION,
    Case,
    assert_logits,
    attention_module,
    backend,
    counted_attention,
    load_mxmoe,
    padded,
    torch,
    transformers,
)

LENGTHS = [41, 3, 17, 40]


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    seed = list(CONFIGS).index(request.param)
    return Case(tmp_path_factory.mktemp("case") / "checkpoint", request.param, seed)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case") / "checkpoint", next(iter(CONFIGS)), 7)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_logits_of_padded_batches(case: Case, side: str) -> None:
    batch = padded(case, LENGTHS if side != "none" else [41, 41], side)
    layers = case.config.num_hidden_layers
    with torch.no_grad(), counted_attention() as kernel:
        got = case.mxmoe()(**batch).logits
        assert kernel.call_count == layers
        want = case.eager()(**batch).logits
        assert kernel.call_count == layers, "the eager model went through the kernel"
    assert_logits(got, want, batch["attention_mask"])


def test_a_dropped_sink_window_or_mask_is_seen(first: Case) -> None:
    batch = padded(first, LENGTHS, "left")
    model, kernel = first.mxmoe(), attention_module.sink_attention_bhsd
    wrong = {
        "sinks": lambda q, k, v, sinks, **o: kernel(q, k, v, torch.full_like(sinks, -torch.inf), **o),
        "window": lambda *a, **o: kernel(*a, **(o | {"sliding_window": o["sliding_window"] and 7})),
        "padding": lambda *a, **o: kernel(*a, **(o | {"key_starts": None})),
        "scale": lambda *a, **o: kernel(*a, **(o | {"sm_scale": o["sm_scale"] * 1.05})),
    }
    with torch.no_grad():
        want = first.eager()(**batch).logits
        for name, call in wrong.items():
            with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
                patch.setattr(attention_module, "sink_attention_bhsd", call)
                assert_logits(model(**batch).logits, want, batch["attention_mask"])
                pytest.fail(f"nobody saw the missing {name}", pytrace=False)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_of_a_left_padded_batch(case: Case, cache: str) -> None:
    batch = padded(case, LENGTHS, "left", seed=1)
    options = EVERY_TOKEN | {"max_new_tokens": 100, "min_new_tokens": 100}
    want = case.eager().generate(**batch, **options)
    steps = case.config.num_hidden_layers * 100
    with counted_attention() as kernel:
        got = case.mxmoe().generate(**batch, **options, cache_implementation=cache)
        assert kernel.call_count == steps
    assert got.tolist() == want.tolist()


OTHER_WAYS: list[dict[str, Any]] = [{"num_beams": 2}, {"use_cache": False}]
if VERSION >= (5, 7):  # with the first of its major version transformers' own model fails here
    OTHER_WAYS.append({"prefill_chunk_size": 8})


@pytest.mark.parametrize("options", OTHER_WAYS, ids=str)
def test_other_ways_to_generate(first: Case, options: dict[str, Any]) -> None:
    batch = padded(first, [20, 9], "left", seed=2)
    options = EVERY_TOKEN | {"max_new_tokens": 24} | options
    want = first.eager().generate(**batch, **options)
    assert first.mxmoe().generate(**batch, **options).tolist() == want.tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_in_pieces(case: Case, kind: str) -> None:
    """A filled cache continued by one token, by many, and by more than a window."""
    model, ids = case.mxmoe(), case.ids(2, 90)
    caches = {
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=128),
    }
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    cache, pieces, begin = caches[kind](), [], 0
    with torch.no_grad():
        want = case.eager()(ids, attention_mask=mask).logits
        for size in (13, 1, 4, 40, 1, 31):
            some = slice(begin, begin + size)
            out = model(ids[:, some], attention_mask=mask[:, : begin + size], past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
            begin += size
    # No positions were given, so both models count the padding as tokens.
    assert_logits(torch.cat(pieces, 1), want, mask)


def test_compiled_without_graph_breaks(case: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(case.mxmoe(), fullgraph=True, dynamic=False, backend="aot_eager")
    batch, whole = padded(case, [40, 3], "left"), case.ids(1, 30)
    with torch.no_grad():
        got, want = (model(**batch, use_cache=False).logits for model in (compiled, case.eager()))
        assert_logits(got, want, batch["attention_mask"])
        assert_logits(compiled(whole, use_cache=False).logits, case.eager()(whole).logits)


def test_compiled_for_every_size(first: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(first.mxmoe(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for lengths in [40, 3], [4, 25]:
            batch = padded(first, lengths, "left")
            got, want = (model(**batch, use_cache=False).logits for model in (compiled, first.eager()))
            assert_logits(got, want, batch["attention_mask"])


def test_a_compiled_graph_still_judges_the_mask(first: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(first.mxmoe(), fullgraph=True, backend="aot_eager")
    batch = padded(first, [12, 12], "left")
    batch["attention_mask"][1, 5] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="sequence 1 hides keys between visible ones"):
        compiled(**batch, use_cache=False)


def test_gradients(case: Case) -> None:
    """Of everything that is not MXFP4: embedding, norms, projections, sinks, router and the experts' biases."""
    batch = padded(case, [20, 7], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    models = {"want": case.eager(), "got": load_mxmoe(case.path)}
    grads = {}
    for name, model in models.items():
        model.train()
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        grads[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.eval()
    decoded = {key for key in grads["want"] if key.endswith(("gate_up_proj", "down_proj"))}
    assert grads["got"].keys() == grads["want"].keys() - decoded
    for key, got in grads["got"].items():
        want = grads["want"][key]
        error = ((got - want).norm() / want.norm()).item() if want.norm() > 0 else got.norm().item()
        assert error < 2e-3, f"{key}: {error}"


def test_gradient_checkpointing_changes_nothing(first: Case) -> None:
    model, ids = load_mxmoe(first.path), first.ids(2, 12)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(model.model.layers[0].self_attn.sinks.grad.clone())
    assert torch.equal(*found)


def test_router_logits_and_hooks(case: Case) -> None:
    batch = padded(case, LENGTHS, "left")
    seen: list[str] = []
    model = case.mxmoe()
    layers = model.model.layers
    hooks = [layers[0].mlp.router.register_forward_hook(lambda *_: seen.append("router"))]
    hooks += [layers[0].mlp.experts.register_forward_hook(lambda *_: seen.append("experts"))]
    with torch.no_grad():
        got, want = (m(**batch, output_router_logits=True) for m in (model, case.eager()))
    for hook in hooks:
        hook.remove()
    assert seen == ["router", "experts"]
    assert len(got.router_logits) == case.config.num_hidden_layers
    mask = batch["attention_mask"].reshape(-1).bool()
    for a, b in zip(got.router_logits, want.router_logits, strict=True):
        assert_logits(a[None], b[None], mask[None])
    assert abs(got.aux_loss - want.aux_loss) < 1e-3 * want.aux_loss


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_rounded_activations_stay_near(first: Case, activations: str) -> None:
    batch = padded(first, LENGTHS, "left")
    model = load_mxmoe(first.path, activations=activations)
    assert {m.activations for m in model.modules() if isinstance(m, backend.Mxfp4Experts)} == {activations}
    with torch.no_grad():
        got, want = model(**batch).logits, first.eager()(**batch).logits
    assert_logits(got, want, batch["attention_mask"], limit=0.05)
    with pytest.raises(AssertionError):
        assert_logits(got, want, batch["attention_mask"])


def test_bfloat16_is_as_near_as_transformers_in_bfloat16(case: Case) -> None:
    ids = case.ids(2, 60)
    model = load_mxmoe(case.path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        want = case.eager(torch.float64)(ids).logits
        ours, theirs = (m(ids).logits.double() for m in (model, case.eager(torch.bfloat16)))
    errors = [((x - want).abs().amax(-1) / want.std(-1)).median() for x in (ours, theirs)]
    assert NOISE < errors[0] <= 1.5 * errors[1]


# Masks


def causal(case: Case, q: int, keys: int, window: int | None = None) -> Any:
    place = torch.arange(keys)
    own = torch.arange(keys - q, keys)[:, None]
    seen = place <= own
    return seen if window is None else seen & (place > own - window)


def test_4d_masks_that_say_nothing_else_are_taken(first: Case) -> None:
    ids, window = first.ids(2, 30), first.config.sliding_window
    pad = torch.ones(2, 1, 1, 30, dtype=torch.bool)
    pad[0, ..., :4] = False
    masks = {
        "full_attention": (causal(first, 30, 30) & pad),
        "sliding_attention": (causal(first, 30, 30, window) & pad),
    }
    added = {kind: torch.zeros(m.shape).masked_fill(~m, -torch.inf) for kind, m in masks.items()}
    with torch.no_grad():
        want = first.eager()(ids, attention_mask=pad[:, 0, 0].long()).logits
        for mask in (masks, added):
            assert_logits(first.mxmoe()(ids, attention_mask=mask).logits, want, pad[:, 0, 0])


@pytest.mark.parametrize("what", ["prefix", "hole", "window", "bias", "future", "heads", "integers"])
def test_other_4d_masks_are_refused(first: Case, what: str) -> None:
    ids = first.ids(2, 30)
    mask = causal(first, 30, 30).expand(2, 1, 30, 30).clone()
    if what == "prefix":
        mask[..., :10, :10] = True
    elif what == "hole":
        mask[1, 0, 20:, 5] = False
    elif what == "future":
        mask[0, 0, 3, 4] = True
    elif what == "heads":
        mask = mask.expand(2, 4, 30, 30).clone()
        mask[:, 2, 9, 2] = False
    kinds = {"full_attention": mask, "sliding_attention": mask if what == "window" else None}
    if what == "bias":
        kinds["full_attention"] = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) + 0.5 * mask
    if what == "integers":
        kinds["full_attention"] = mask.int()
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=r"attention_mask|got a mask"):
        first.mxmoe()(ids, attention_mask=kinds)


def test_padding_between_tokens_is_refused(first: Case) -> None:
    batch = padded(first, [12, 12], "left")
    batch["attention_mask"][1, 5] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="sequence 1 hides keys between visible ones"):
        first.mxmoe()(**batch)
    # Right padding is one of these once tokens follow it.
    with pytest.raises(ValueError, match="pad on the left"):
        first.mxmoe().generate(**padded(first, [12, 5], "right"), **EVERY_TOKEN, max_new_tokens=4)


def test_a_mask_for_another_cache_is_refused(first: Case) -> None:
    ids = first.ids(1, 30)
    mask = torch.tensor([[0, 29, 29]], dtype=torch.int32)
    for kind, wrong, message in [
        ("full_attention", mask, "a mask for 29 keys; the layer's cache gave 30"),
        ("sliding_attention", mask[..., None].expand(1, 3, 7), "a sliding window of 7; the layer's is 8"),
    ]:
        masks = {"full_attention": None, "sliding_attention": None, kind: wrong}
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            first.mxmoe()(ids, attention_mask=masks)


# What is not there


def test_attention_weights_are_refused(first: Case) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="no attention weights to give"):
        first.mxmoe()(first.ids(1, 5), output_attentions=True)


def test_dropout_is_refused(first: Case) -> None:
    model = load_mxmoe(first.path, attention_dropout=0.1)
    with torch.no_grad():
        model(first.ids(1, 5))  # there is none in evaluation
        with pytest.raises(ValueError, match=r"dropout 0\.1; wanted 0"):
            model.train()(first.ids(1, 5))
