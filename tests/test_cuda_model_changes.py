"""Looking inside a model on a GPU, and changing it between steps."""

from __future__ import annotations

import numpy as np
import pytest

import mxmoe
from compare import MODEL_NOISE, assert_exact, assert_model_close
from cuda_models import GPU_MODES, IDS, plain
from mxmoe import cuda
from small_models import CONFIG, MODES, in_chunks


def test_hooks_see_and_change_what_they_do_on_the_cpu(gpu, gpu_load, gpu_folder):
    seen = {}

    def ablate(logits, context):
        seen.setdefault(context.site, []).append(context.positions.copy())
        logits[:, 3] = -np.inf

    results = []
    for model in (gpu_load(gpu, "float32"), mxmoe.load(gpu_folder, **MODES["float32"])):
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
    changing = gpu_load(gpu, "float32").hook("layers.0.sink_share", lambda share, _: share + 1)
    with changing, pytest.raises(ValueError, match="read-only"):
        gpu_load(gpu, "float32").forward(IDS[:3])


def test_a_hook_between_decoding_steps_is_felt(gpu_model):
    cache = gpu_model.new_cache(60)
    gpu_model.forward(IDS[:10], cache=cache)
    for i in (10, 11, 12):
        gpu_model.forward(IDS[i : i + 1], cache=cache)
    with gpu_model.hook("layers.0.residual", lambda x, _: np.zeros_like(x)):
        changed = gpu_model.forward(IDS[13:14], cache=cache)
    cache.reset()
    gpu_model.forward(IDS[:13], cache=cache)
    assert_exact(gpu_model.forward(IDS[13:14], cache=cache), gpu_model.forward(IDS[:14])[13:])
    assert (changed != gpu_model.forward(IDS[:14])[13:]).any()


def test_new_weights_are_taken_by_the_next_step(gpu, gpu_folder):
    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
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


def test_an_adapter_beside_the_layers(gpu, gpu_load, gpu_folder):
    from mxmoe.adapters import bfloat16_parts
    from mxmoe.layers import LowRank

    def put(model, there):
        rng = np.random.default_rng(7)
        layer = model.layers[1]
        for part in (*layer.self_attn.projections, layer.mlp.experts, layer.mlp.router, model.lm_head):
            size = (CONFIG.hidden_size,) * 2
            if part is not layer.mlp.experts:
                is_last = part is layer.self_attn.projections[-1]
                size = (
                    part.out_features,
                    CONFIG.num_attention_heads * CONFIG.head_dim if is_last else CONFIG.hidden_size,
                )
            a, b = (0.1 * rng.standard_normal(shape) for shape in ((4, size[1]), (size[0], 4)))
            parts = [tuple(map(there, bfloat16_parts(x.astype(np.float32), exact=False))) for x in (a, b)]
            part.adapter = LowRank(part.ops, *parts, part.activations)
        return model.forward(IDS[:12])

    model = mxmoe.load(gpu_folder, **GPU_MODES["float32"])
    got = put(model, cuda.array)
    assert_model_close(got, put(mxmoe.load(gpu_folder, **MODES["float32"]), lambda x: x), limit=MODEL_NOISE)
    assert np.abs(got - gpu_load(gpu, "float32").forward(IDS[:12])).max() > 0.01
    assert_exact(in_chunks(model, IDS[:12], [8, *[1] * 4]), got)


def test_layers_whose_activations_differ(gpu, gpu_folder):
    model = mxmoe.load(gpu_folder, **GPU_MODES["bf16"])
    want = model.forward(IDS[:20])
    model.layers[0].self_attn.k_proj.activations = "float32"
    got = model.forward(IDS[:20])
    assert (got != want).any()
    assert_model_close(got, want, limit=0.05)
