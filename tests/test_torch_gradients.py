"""Gradients of the torch operators against autograd through torch formulas in float64, and by finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_cases as cases
from compare import assert_close, assert_exact
from mxmoe.integrations import _torch_grad as gradients
from mxmoe.integrations import torch as mx
from torch_cases import dense_arguments, gradients_of, linear_arguments, moe_arguments, normal, paged_arguments

DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
MOE = ("x", "topk_weights", "gate_up_bias", "down_bias", "residual")


def check(got: dict[str, Any], want: dict[str, Any], baseline: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Every gradient has its input's dtype and shape, and is as near to float64 as float32 autograd allows."""
    assert got.keys() == want.keys() and got
    for name, value in got.items():
        dtype = inputs[name].dtype
        assert value.dtype == dtype and value.shape == inputs[name].shape, name
        true = want[name].numpy()
        # Sums of both signs cancel in single rows, so that a row counts as no smaller than the whole.
        scale = np.sqrt(np.maximum(np.mean(true**2, axis=-1, keepdims=True), np.mean(true**2)))
        short = str(dtype).removeprefix("torch.")
        assert_close(value, true, baseline=baseline[name].to(dtype), dtype=short, scale=scale)


def compare(function: Any, formula: Any, inputs: dict[str, Any], grad: torch.Tensor, **formula_changes: Any) -> None:
    got = gradients_of(function, inputs, grad)
    changed = inputs | formula_changes
    check(
        got,
        gradients_of(formula, changed, grad, torch.float64),
        gradients_of(formula, changed, grad, torch.float32),
        inputs,
    )


@every_dtype
def test_rmsnorm(dtype):
    inputs = {"x": 3 * normal(7, 50, dtype=dtype), "weight": normal(50, dtype=dtype, seed=1), "eps": 0.3}
    compare(mx.rmsnorm, cases.rmsnorm, {k: with_grad(v) for k, v in inputs.items()}, normal(7, 50, seed=2).to(dtype))


def with_grad(x: Any) -> Any:
    return x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@every_dtype
def test_rope(dtype):
    x = with_grad(normal(7, 3, 8, dtype=dtype))
    compare(
        mx.rope, cases.rope, {"x": x, "cos": normal(7, 4), "sin": normal(7, 4, seed=1)}, normal(7, 3, 8).to(dtype)
    )


@every_dtype
def test_embedding(dtype):
    ids = torch.tensor([1, 7, 0, 7, 7])
    inputs = {"token_ids": ids, "weight": with_grad(normal(8, 6, dtype=dtype))}
    compare(mx.embedding, lambda token_ids, weight: weight[token_ids], inputs, normal(5, 6, seed=1))


@every_dtype
@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16 packed", "int8", "int8 packed"])
@pytest.mark.parametrize("rows_at_a_time", [16, 4096])
def test_linear(dtype, kind, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(gradients, "_ROWS", rows_at_a_time)
    inputs = linear_arguments(kind, activations="float32", x=normal(5, 64, dtype=dtype))
    stored = linear_arguments(kind.split()[0])
    trained = ["x", "bias", "residual"] + ["weight"] * (kind == "bfloat16")
    inputs |= {name: with_grad(inputs[name]) for name in trained}
    matrix = inputs["weight"] if kind == "bfloat16" else stored["weight"].double()
    if kind.startswith("int8"):
        matrix = matrix * stored["scales"].double().repeat_interleave(32, dim=1)

    def formula(x, weight, bias, residual, **_):
        return x @ weight.to(x.dtype).T + bias + residual

    compare(mx.linear, formula, inputs, normal(5, 48, seed=5), weight=matrix)


def test_linear_group():
    layers = [linear_arguments(kind) for kind in ("bfloat16", "int8", "bfloat16 packed")]
    x, biases = with_grad(normal(5, 64)), [with_grad(layer["bias"]) for layer in layers]
    weight = with_grad(layers[0]["weight"])
    stored = [weight, *(layer["weight"] for layer in layers[1:])]
    wanted = (x, weight, *biases)

    group = [(w, layer["scales"], b) for w, layer, b in zip(stored, layers, biases, strict=True)]
    each = [mx.linear(x, w, b, scales=s) for w, s, b in group]
    together = mx.linear_group(x, group)
    assert_exact(together, torch.cat(each, dim=1))
    with torch.no_grad():
        assert_exact(mx.linear_group(x, group), together)
    grad = normal(5, 144, seed=5)
    for a, b in zip(
        torch.autograd.grad(together, wanted, grad),
        torch.autograd.grad(each, wanted, grad.split(48, dim=1)),
        strict=True,
    ):
        assert_exact(a, b)
    with pytest.raises(ValueError, match="out has no gradient"):
        mx.linear_group(x, group, out=torch.empty(5, 144))


def test_a_frozen_weight_keeps_no_activations():
    for weight, kept in ((normal(48, 64).bfloat16(), False), (with_grad(normal(48, 64).bfloat16()), True)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.shape) or x, lambda x: x):
            mx.linear(with_grad(normal(5, 64)), weight)
        assert ((5, 64) in saved) == kept and (48, 64) in saved


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_gradients_pass_straight_through_rounded_activations(activations):
    grad = normal(6, 64, seed=9)
    for function, arguments in ((mx.mxfp4_moe, moe_arguments(grad=MOE[:4])), (mx.linear, linear_arguments("int8"))):
        arguments["x"] = with_grad(arguments["x"])
        g = grad if function is mx.mxfp4_moe else grad[:5, :48]
        exact, rounded = (
            gradients_of(function, arguments | {"activations": kind}, g) for kind in ("float32", activations)
        )
        assert exact.keys() == rounded.keys()
        for name in exact:
            assert_exact(rounded[name], exact[name])


@pytest.mark.parametrize("k", [1, 3])
def test_expert_routing(k):
    inputs = {"router_logits": with_grad(normal(9, 7))}
    compare(
        lambda router_logits: mx.expert_routing(router_logits, k)[1],
        lambda router_logits: cases.routing(router_logits, k)[1],
        inputs,
        normal(9, k, seed=3),
    )
    assert not mx.expert_routing(inputs["router_logits"], k)[0].requires_grad


def moe_formula(arguments: dict[str, Any]) -> Any:
    def formula(x, topk_weights, gate_up_bias, down_bias, residual=None, **other):
        w1, w2 = cases.decoded(arguments, x.dtype)
        options = {"alpha": other.get("swiglu_alpha", 1.702), "limit": other.get("swiglu_limit", 7.0)}
        options["first_expert"] = other.get("first_expert", 0)
        return cases.moe(x, other["topk_ids"], topk_weights, gate_up_bias, down_bias, w1, w2, residual, **options)

    return formula


@every_dtype
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"swiglu_limit": 0.8, "swiglu_alpha": 0.5}, {"first_expert": 2}, {"num_tokens": 1}, {"num_tokens": 40}],
    ids=str,
)
def test_mxfp4_moe(dtype, packed, options):
    name = str(dtype).removeprefix("torch.")
    options = options | {"residual": True, "x_dtype": name, "bias_dtype": name, "activations": "float32"}
    stored = moe_arguments(grad=MOE, **options)
    inputs = moe_arguments(packed=packed, grad=MOE, **options)
    for changed in (stored, inputs):
        changed["topk_weights"] = with_grad(changed["topk_weights"].detach().to(dtype))
    grad = normal(*inputs["x"].shape, seed=9)
    got = gradients_of(mx.mxfp4_moe, inputs, grad)
    want, baseline = (gradients_of(moe_formula(stored), stored, grad, d) for d in (torch.float64, torch.float32))
    check(got, want, baseline, inputs)
    if "swiglu_limit" in options:
        wrong = gradients_of(mx.mxfp4_moe, inputs | {"swiglu_limit": 7.0}, grad)
        with pytest.raises(AssertionError, match="expected"):
            check(wrong, want, baseline, inputs)


def test_a_moe_without_tokens_or_experts_of_its_own():
    for options in ({"num_tokens": 0}, {"first_expert": 5}):
        inputs = moe_arguments(grad=MOE[:4], **options)
        got = gradients_of(mx.mxfp4_moe, inputs, normal(*inputs["x"].shape))
        for name, value in got.items():
            assert_exact(value, torch.zeros_like(inputs[name]))


def test_only_the_residual_wants_a_gradient():
    inputs = moe_arguments(residual=True, grad=("residual",))
    grad = normal(*inputs["x"].shape)
    assert_exact(gradients_of(mx.mxfp4_moe, inputs, grad)["residual"], grad)


ATTENTION = ("q", "k", "v", "sinks")
PADDED = {"key_starts": torch.tensor([0, 3, 10, 5]), "key_ends": torch.tensor([11, 11, 12, 9])}


@every_dtype
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("queries", "keys", "padded"), [(9, 9, False), (1, 12, False), (7, 12, True), (9, 12, True)])
@pytest.mark.parametrize("scores_at_a_time", [1, 100, 1 << 22])
def test_dense_attention(dtype, window, queries, keys, padded, scores_at_a_time, monkeypatch):
    monkeypatch.setattr(gradients, "_SCORES", scores_at_a_time)
    options = {"sliding_window": window, **(PADDED if padded else {}), "activations": "float32"}
    inputs = dense_arguments(4, (6, 2), queries, keys, 20, dtype, ATTENTION, **options)
    inputs["sinks"] = with_grad(inputs["sinks"].detach().index_fill(0, torch.tensor([2]), -torch.inf))
    grad = normal(4, 6, queries, 20, seed=8).to(dtype)
    if padded:  # of no key and a sink of -inf there is no softmax to differentiate
        inputs["sinks"] = with_grad(inputs["sinks"].detach().nan_to_num(neginf=-30.0))
    compare(mx.sink_attention_bhsd, cases.dense_attention, inputs, grad)


def test_attention_of_no_queries():
    inputs = dense_arguments(queries=0, keys=4, grad=ATTENTION)
    got = gradients_of(mx.sink_attention_bhsd, inputs, torch.zeros(2, 4, 0, 16))
    for name, value in got.items():
        assert_exact(value, torch.zeros_like(inputs[name]))


def test_a_forgotten_sink_is_rejected():
    inputs = dense_arguments(grad=ATTENTION, activations="float32")
    grad = normal(2, 4, 9, 16, seed=8)
    want, baseline = (gradients_of(cases.dense_attention, inputs, grad, d) for d in (torch.float64, torch.float32))
    check(gradients_of(mx.sink_attention_bhsd, inputs, grad), want, baseline, inputs)
    without = inputs | {"sinks": with_grad(torch.full((4,), -torch.inf))}
    wrong = gradients_of(mx.sink_attention_bhsd, without, grad)
    for name in ("q", "k", "v", "sinks"):
        part = [{name: x[name]} for x in (wrong, want, baseline)]
        with pytest.raises(AssertionError, match="expected"):
            check(*part, inputs)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_paged_attention_is_the_dense_one(window, kv_dtype):
    sequences = [(3, 20), (2, 5), (7, 7), (1, 12)]
    trained = ("q", "sinks") + (("k_cache", "v_cache") if kv_dtype != "int8" else ())
    inputs = paged_arguments(*trained, sequences=sequences, window=window, block_size=4, kv_dtype=kv_dtype)
    grad = normal(*inputs["q"].shape, seed=8)

    def formula(q, k_cache, v_cache, sinks, block_table, cu_seqlens, k_scales=None, v_scales=None, **options):
        rows = []
        for b, (new, length) in enumerate(sequences):
            place = torch.arange(length)
            block = block_table[b, place // 4].long().clamp(min=0)  # where no query looks, any block will do
            k, v = (
                (c.to(q.dtype) if s is None else c.to(q.dtype) * s.to(q.dtype)[..., None])[block, :, place % 4]
                for c, s in ((k_cache, k_scales), (v_cache, v_scales))
            )
            k, v = k.nan_to_num(), v.nan_to_num()
            own = q[cu_seqlens[b] : cu_seqlens[b + 1]]
            assert len(own) == new
            kwargs = {"sm_scale": options["sm_scale"], "sliding_window": options.get("sliding_window")}
            dense = (x.transpose(0, 1)[None] for x in (own, k, v))
            rows.append(cases.dense_attention(*dense, sinks, **kwargs)[0].transpose(0, 1))
        return torch.cat(rows)

    compare(mx.sink_attention, formula, inputs, grad)


def test_shared_blocks_add_up():
    k = with_grad(normal(1, 2, 4, 16))
    one = dict(block_table=torch.zeros((1, 1), dtype=torch.int32), cu_seqlens=torch.tensor([0, 2]))
    two = dict(block_table=torch.zeros((2, 1), dtype=torch.int32), cu_seqlens=torch.tensor([0, 2, 4]))
    q, v, sinks = normal(2, 4, 16, seed=1), normal(1, 2, 4, 16, seed=2), normal(4)
    once = mx.sink_attention(q, k, v, sinks, **one, seq_lens=torch.tensor([4]), sm_scale=0.3)
    (single,) = torch.autograd.grad(once.sum(), k)
    both = mx.sink_attention(torch.cat([q, q]), k, v, sinks, **two, seq_lens=torch.tensor([4, 4]), sm_scale=0.3)
    (double,) = torch.autograd.grad(both.sum(), k)
    torch.testing.assert_close(double, 2 * single)


def formula_with_gradient(formula: Any, backward: Any) -> Any:
    """An autograd function with a torch formula forward and one of ours backward."""

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return formula(*args)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad, *ctx.saved_tensors)

    return Checked.apply


def float64(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() for x in tensors)


def test_finite_differences_of_simple_ops():
    ids, (logits,) = torch.tensor([1, 2, 1]), float64(normal(4, 5))
    cos, sin, weight = normal(4, 3), normal(4, 3, seed=1), normal(6, 32).bfloat16()
    pairs = [
        (cases.rmsnorm, lambda g, x, w: gradients.rmsnorm(g, x, w, 1e-5), float64(normal(3, 6), normal(6, seed=1))),
        (lambda x: cases.rope(x, cos, sin), lambda g, x: gradients.rope(g, cos, sin), float64(normal(4, 2, 6))),
        (lambda w: w[ids], lambda g, w: gradients.embedding(g, ids, 4, w.dtype), float64(normal(4, 3))),
        (lambda x: x @ weight.double().T, lambda g, x: gradients.linear_x(g, weight, None), float64(normal(3, 32))),
        (
            lambda x: cases.routing(x, 2)[1],
            lambda g, x: gradients.expert_routing(g, *cases.routing(x.detach(), 2), 5),
            (logits,),
        ),
    ]
    for formula, backward, inputs in pairs:
        assert torch.autograd.gradcheck(formula_with_gradient(formula, backward), inputs)


def test_finite_differences_of_the_experts():
    arguments = moe_arguments(num_tokens=3, hidden_size=32, intermediate_size=32, num_experts=3, swiglu_limit=2.0)
    w1, w2 = cases.decoded(arguments, torch.float64)
    weights = [arguments[name] for name in cases.MOE_WEIGHTS]
    ids = arguments["topk_ids"]

    def backward(grad, x, shares, bias1, bias2):
        held = [*weights[:2], bias1, *weights[3:5], bias2]
        return gradients.mxfp4_moe(grad, x, ids, shares, *held, 1.702, 2.0, 0)

    formula = formula_with_gradient(lambda x, s, b1, b2: cases.moe(x, ids, s, b1, b2, w1, w2, limit=2.0), backward)
    inputs = float64(*(arguments[name] for name in ("x", "topk_weights", "gate_up_bias", "down_bias")))
    assert torch.autograd.gradcheck(formula, inputs, fast_mode=True)


@pytest.mark.parametrize("drop_sink", [False, True])
def test_finite_differences_of_attention(drop_sink):
    arguments = dense_arguments(2, (4, 2), 3, 5, 6, sliding_window=3, key_starts=torch.tensor([0, 2]))
    options = {name: arguments.pop(name) for name in ("sm_scale", "sliding_window", "key_starts")}

    def backward(grad, q, k, v, sinks):
        held = torch.full_like(sinks, -torch.inf) if drop_sink else sinks
        tokens = [x.transpose(1, 2).reshape(6, 4, 6) for x in (grad, q)]
        batch = torch.tensor([[0], [1]]), torch.tensor([0, 3, 6]), torch.tensor([5, 3]), options["key_starts"]
        dq, *rest = gradients.sink_attention(*tokens, k, v, held, *batch, options["sm_scale"], 3)
        return dq.view(2, 3, 4, 6).transpose(1, 2), *rest

    formula = formula_with_gradient(lambda *args: cases.dense_attention(*args, **options), backward)
    right = torch.autograd.gradcheck(formula, float64(*arguments.values()), raise_exception=False)
    assert right != drop_sink


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and not any(x is y for y in args):
                self.elements = max(self.elements, x.numel())
        return result


def test_memory_of_attention_grows_with_the_sequence_alone(monkeypatch):
    monkeypatch.setattr(gradients, "_SCORES", 1 << 14)
    largest = {}
    for n in (512, 1024):
        q, grad = normal(n, 4, 16, seed=1), normal(n, 4, 16, seed=2)
        k, v = normal(1, 2, n, 16, seed=3), normal(1, 2, n, 16, seed=4)
        batch = torch.zeros((1, 1), dtype=torch.int32), torch.tensor([0, n]), torch.tensor([n]), None
        with Largest() as mode:
            gradients.sink_attention(grad, q, k, v, normal(4), *batch, 0.25, 0)
        largest[n] = mode.elements
    assert n * 4 * 16 <= largest[n] <= 2 * largest[512] < 4 * 1024 * 1024 / 8


def test_one_expert_is_decoded_at_a_time():
    arguments = moe_arguments(num_tokens=8, num_experts=8, experts_per_token=4)
    named = {key: arguments[key] for key in ("x", "topk_ids", "topk_weights", *cases.MOE_WEIGHTS)}
    with Largest() as mode:
        gradients.mxfp4_moe(normal(8, 64), *named.values(), 1.702, 7.0, 0)
    assert mode.elements == 2 * 96 * 64


def test_a_cache_changed_after_the_forward_pass_is_an_error():
    inputs = paged_arguments("q")
    y = mx.sink_attention(**inputs)
    k = normal(1, 2, 16)
    mx.kv_cache_write(k, k, inputs["k_cache"], inputs["v_cache"], torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_training_descends():
    inputs = moe_arguments(num_tokens=16, activations="int8")
    target = normal(16, 64, seed=3)
    down, up = torch.nn.Parameter(normal(4, 64, seed=1) / 8), torch.nn.Parameter(torch.zeros(64, 4))
    optimizer = torch.optim.Adam([down, up], lr=0.02)
    x, losses = inputs["x"], []
    for _ in range(30):
        loss = (mx.mxfp4_moe(**(inputs | {"x": x + x @ down.T @ up.T})) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
