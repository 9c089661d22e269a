"""linear_group against linear, which it must equal to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compare import assert_close, assert_exact
from mxmoe import ops, packing
from mxmoe.reference import ops as reference
from op_helpers import FLOATS, normal, poisoned, to_torch

ACTIVATIONS = ("float32", "bf16", "int8")
all_activations = pytest.mark.parametrize("activations", ACTIVATIONS)


def layer(rng, rows, k, dtype, bias, packed=False):
    """(weight, scales, bias) of one layer."""
    if dtype == "int8":
        weight = rng.integers(-127, 128, (rows, k), dtype=np.int8)
        scales = normal(rng, (rows, k // 32), "bfloat16", 0.01)
    else:
        weight, scales = normal(rng, (rows, k), "bfloat16"), None
    if packed:
        weight, scales = packing.pack_linear(weight, scales)
    return weight, scales, None if bias is None else normal(rng, (rows,), bias)


def one_by_one(x, layers, activations):
    results = [ops.linear(x, w, b, scales=s, activations=activations) for w, s, b in layers]
    return np.concatenate(results, axis=1)


def some_layers(rng, k=64):
    return [
        layer(rng, 48, k, "int8", "float32"),
        layer(rng, 5, k, "bfloat16", None),
        layer(rng, 32, k, "int8", "bfloat16", packed=True),
        layer(rng, 0, k, "bfloat16", None),
        layer(rng, 16, k, "bfloat16", "float32", packed=True),
        layer(rng, 130, k, "int8", None),
    ]


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 8, 40, 200])
@pytest.mark.parametrize("x_dtype", FLOATS)
@all_activations
def test_equals_one_layer_after_the_other(isa, num_tokens, x_dtype, activations):
    rng = np.random.default_rng(num_tokens)
    layers, x = some_layers(rng), normal(rng, (num_tokens, 64), x_dtype)
    assert_exact(ops.linear_group(x, layers, activations=activations), one_by_one(x, layers, activations))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@all_activations
def test_any_number_of_threads(isa, num_threads, activations):
    rng = np.random.default_rng(1)
    layers, x = some_layers(rng), normal(rng, (30, 64))
    want = one_by_one(x, layers, activations)
    with ops.num_threads(num_threads):
        assert_exact(ops.linear_group(x, layers, activations=activations), want)


def in_torch(x, layers):
    results = []
    for weight, scales, bias in layers:
        dense = to_torch(weight).float()
        if scales is not None:
            dense *= to_torch(scales).float().repeat_interleave(32, dim=1)
        results.append(to_torch(x) @ dense.T + (0 if bias is None else to_torch(bias)))
    return torch.cat(results, dim=1).numpy()


def test_equals_float64(isa):
    rng = np.random.default_rng(2)
    layers = [layer(rng, 48, 96, "bfloat16", "float32"), layer(rng, 48, 96, "int8", "float32")]
    x = normal(rng, (7, 96))
    got = ops.linear_group(x, layers, activations="float32")
    tolerance = {"baseline": in_torch(x, layers), "dtype": "float32", "out_dtype": "float32"}
    want = reference.linear_group(x, layers)
    assert_close(got, want, **tolerance)
    with pytest.raises(AssertionError):
        assert_close(ops.linear_group(x, layers[::-1], activations="float32"), want, **tolerance)


def test_writes_all_of_out_and_nothing_else(isa):
    rng = np.random.default_rng(3)
    layers, x = [layer(rng, 16, 32, "bfloat16", None) for _ in range(2)], normal(rng, (5, 32))
    out, check = poisoned((5, 32), np.float32)
    assert ops.linear_group(x, layers, out=out) is out
    check()
    assert_exact(out, one_by_one(x, layers, "bf16"))
    wide = np.full((5, 40), np.nan, np.float32)
    ops.linear_group(x, layers, out=wide[:, 4:36])
    assert_exact(wide[:, 4:36], out)
    assert np.isnan(wide[:, :4]).all() and np.isnan(wide[:, 36:]).all()


def test_a_single_layer_is_linear(isa):
    rng = np.random.default_rng(4)
    only = [layer(rng, 33, 64, "int8", "float32")]
    x = normal(rng, (9, 64))
    assert_exact(ops.linear_group(x, only, activations="int8"), one_by_one(x, only, "int8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, layers: (x, []), "layers is empty"),
        (lambda x, layers: (x[:, :32], layers), r"weight\[0\] has shape"),
        (lambda x, layers: (x, [layers[0], (layers[1][0][:, :32], None, None)]), r"weight\[1\] has shape"),
        (lambda x, layers: (x, [layers[0], (layers[0][0], None, None)]), r"scales\[1\] is missing"),
        (lambda x, layers: (x, [(*layers[0][:2], layers[0][2][:3])]), r"bias\[0\] has shape"),
        (lambda x, layers: (x.astype(np.float64), layers), "x has dtype float64"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    rng = np.random.default_rng(5)
    layers = [layer(rng, 16, 64, "int8", "float32"), layer(rng, 16, 64, "bfloat16", None)]
    x, changed = change(normal(rng, (3, 64)), layers)
    out = np.full((3, 32), np.nan, np.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.linear_group(x, changed, activations="int8", out=out)
    assert np.isnan(out).all()


def test_out_must_not_lie_on_a_bias():
    rng = np.random.default_rng(6)
    weight = normal(rng, (16, 32), "bfloat16")
    out = np.zeros((1, 32), np.float32)
    with pytest.raises(ValueError, match=r"bias\[1\]"):
        ops.linear_group(normal(rng, (1, 32)), [(weight, None, None), (weight, None, out[0, :16])], out=out)
