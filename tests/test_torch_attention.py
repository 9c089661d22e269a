"""sink_attention_bhsd against a torch formula and itself; its gradients stand in test_torch_gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import torch_cases as cases
from compare import assert_close, assert_exact
from mxmoe.integrations import _torch_define
from mxmoe.integrations import torch as mx
from torch_cases import dense_arguments, normal

BF16 = torch.bfloat16


def test_keys_and_values_are_read_where_they_lie(monkeypatch):
    seen = []
    original = _torch_define._CPU.sink_attention
    monkeypatch.setattr(_torch_define._CPU, "sink_attention", lambda *a, **k: seen.append(a) or original(*a, **k))
    whole = normal(2, 12, 8, 16)  # a fused projection: (batch, sequence, heads, head_dim)
    k, v = whole[:, :9, 2:4].transpose(1, 2), whole[:, 1:10, 4:6].transpose(1, 2)
    got = mx.sink_attention_bhsd(normal(2, 4, 9, 16), k, v, normal(4), sm_scale=0.25)
    assert [x.data_ptr() for x in seen[0][1:3]] == [k.data_ptr(), v.data_ptr()]
    copies = (k.contiguous(), v.contiguous())
    assert_exact(got, mx.sink_attention_bhsd(normal(2, 4, 9, 16), *copies, normal(4), sm_scale=0.25))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 30), (7, 30), (30, 30), (0, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_attention(dtype, window, queries, keys, padded):
    options: dict[str, Any] = {"sliding_window": window}
    if padded:
        ends = torch.tensor([keys, max(queries, keys - 3), keys])
        options |= {"key_starts": torch.tensor([0, 0, keys // 2]), "key_ends": ends}
    named = dense_arguments(3, (6, 2), queries, keys, 20, dtype, **options)
    got = mx.sink_attention_bhsd(**named, activations="float32")
    wide, narrow = (
        cases.dense_attention(**{k: v.to(d) if k in ("q", "k", "v", "sinks") else v for k, v in named.items()})
        for d in (torch.float64, torch.float32)
    )
    name = str(dtype).removeprefix("torch.")
    assert_close(got, wide.numpy(), baseline=narrow.to(dtype), dtype=name, scale=np.ones(1))
    assert got.shape == (3, 6, queries, 20) and got.transpose(1, 2).is_contiguous()


def test_no_bit_depends_on_padding():
    named = dense_arguments(1, (4, 2), 40, 40)
    want = mx.sink_attention_bhsd(**named)
    for start in (1, 17, 64):
        longer = dict(named)
        for key in ("q", "k", "v"):
            padding = torch.full((1, named[key].shape[1], start, 16), torch.nan)
            longer[key] = torch.cat([padding, named[key], padding], dim=2)
        longer["q"] = torch.nan_to_num(longer["q"][:, :, : 40 + start])
        ends = torch.tensor([start + 40])
        got = mx.sink_attention_bhsd(**longer, key_starts=torch.tensor([start]), key_ends=ends)
        assert_exact(got[:, :, start:], want)
        assert_exact(got[:, :, :start], torch.zeros(1, 4, start, 16))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q": normal(2, 4, 16)},
            ValueError,
            r"q has shape \(2, 4, 16\); wanted \(batch, heads, sequence, head_dim\)",
        ),
        ({"k": normal(3, 2, 9, 16)}, ValueError, r"k has shape \(3, 2, 9, 16\); wanted .* = \(2, 2, 9, 16\)"),
        ({"v": normal(2, 2, 8, 16)}, ValueError, r"v has shape \(2, 2, 8, 16\); wanted .* = \(2, 2, 9, 16\)"),
        ({"v": normal(2, 2, 9, 16, dtype=BF16)}, TypeError, "v has dtype torch.bfloat16; wanted that of k"),
        ({"q": normal(2, 3, 9, 16)}, ValueError, "q has 3 heads; wanted a multiple of k's 2"),
        ({"q": normal(2, 4, 10, 16)}, ValueError, r"key_ends\[0\] is 9; wanted 10 queries to 9 keys"),
        ({"key_ends": torch.tensor([9, 10])}, ValueError, r"key_ends\[1\] is 10; wanted 9 queries to 9 keys"),
        ({"key_starts": torch.tensor([-1, 0])}, ValueError, r"key_starts\[0\] is -1; wanted 0 to key_ends\[0\] = 9"),
        ({"key_starts": torch.tensor([0, 10])}, ValueError, r"key_starts\[1\] is 10"),
        ({"key_starts": torch.tensor([0])}, ValueError, r"key_starts has shape \(1,\); wanted \(batch,\) = \(2,\)"),
        ({"sinks": normal(3)}, ValueError, r"sinks has shape \(3,\)"),
        ({"k": normal(2, 2, 9, 16, dtype=torch.float16)}, TypeError, "k has dtype float16"),
        ({"sliding_window": -1}, ValueError, "sliding_window is -1"),
        ({"sm_scale": float("nan")}, ValueError, "sm_scale is nan"),
    ],
)
def test_errors_of_dense_attention(changes, error, message):
    with pytest.raises(error, match=message):
        mx.sink_attention_bhsd(**(dense_arguments() | changes))


WRONG = {
    "sinks": lambda a: {"sinks": torch.full_like(a["sinks"], -torch.inf)},
    "window": lambda a: {"sliding_window": 5},
    "start": lambda a: {"key_starts": a["key_starts"] + 1},
    "end": lambda a: {"key_ends": a["key_ends"] - 1},
    "heads": lambda a: {"k": a["k"].roll(1, dims=1)},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_attention_is_rejected(wrong):
    ranges = {"key_starts": torch.tensor([2, 0]), "key_ends": torch.tensor([14, 15])}
    named = dense_arguments(2, (4, 2), 9, 16, sliding_window=4, **ranges)
    wide = {k: v.double() if k in ("q", "k", "v", "sinks") else v for k, v in named.items()}
    want = cases.dense_attention(**wide).numpy()
    narrow = cases.dense_attention(**named)
    assert_close(mx.sink_attention_bhsd(**named), want, baseline=narrow, scale=np.ones(1))
    with pytest.raises(AssertionError, match="expected"):
        got = mx.sink_attention_bhsd(**(named | wrong(named)))
        assert_close(got, want, baseline=narrow, scale=np.ones(1))
