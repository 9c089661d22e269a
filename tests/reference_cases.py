"""What the tests of the oracle share: random inputs, float64 tensors, paged batches, the comparison."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from compare import assert_close
from mxmoe.reference import ops

torch = pytest.importorskip("torch")

BF16 = ml_dtypes.bfloat16


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def t64(x):
    return torch.from_numpy(np.asarray(x).astype(np.float64))


def same(got, want, **options):
    """Compare with another float64 computation of the same thing."""
    want = want.numpy() if isinstance(want, torch.Tensor) else np.asarray(want)
    assert_close(got, want, dtype="float64", **({"scale": np.abs(want).max(initial=1e-300) * 16} | options))


def random_mxfp4(*shape, seed=0, low=117, high=123):
    """Random blocks (..., K/32, 16) and scales for a weight (..., K)."""
    rng = np.random.default_rng(seed)
    *rows, k = shape
    blocks = rng.integers(0, 256, (*rows, k // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(low, high, (*rows, k // 32), dtype=np.uint8)


class Batch:
    """A ragged batch in a paged cache, with the same keys and values held plainly."""

    def __init__(self, lens, new, *, heads=4, kv_heads=2, dim=16, block_size=8, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        self.lens, self.new, self.dim = np.array(lens, np.int32), new, dim
        self.q = rng.standard_normal((sum(new), heads, dim)).astype(np.float32)
        self.k = [rng.standard_normal((n, kv_heads, dim)).astype(np.float32) for n in lens]
        self.v = [rng.standard_normal((n, kv_heads, dim)).astype(np.float32) for n in lens]
        self.sinks = rng.standard_normal(heads).astype(np.float32)
        pages = [-(-n // block_size) for n in lens]
        shape = (sum(pages) + 3, kv_heads, block_size, dim)
        # What nobody wrote must not be read.
        poison = 127 if dtype == np.int8 else np.nan
        self.k_cache, self.v_cache = np.full(shape, poison, dtype), np.full(shape, poison, dtype)
        self.scales = {}
        if dtype == np.int8:
            self.scales = {name: np.full(shape[:3], np.nan, np.float32) for name in ("k_scales", "v_scales")}
        free = rng.permutation(shape[0])
        self.table = np.full((len(lens), max(pages, default=0) + 1), -1, np.int32)
        for b, n in enumerate(lens):
            self.table[b, : pages[b]], free = free[: pages[b]], free[pages[b] :]
            page, place = np.divmod(np.arange(n), block_size)
            slots = self.table[b, page].astype(np.int64) * block_size + place
            ops.kv_cache_write(self.k[b], self.v[b], self.k_cache, self.v_cache, slots, **self.scales)
        self.cu = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)

    def run(self, window=None, **changes):
        given = {
            "block_table": self.table,
            "cu_seqlens": self.cu,
            "seq_lens": self.lens,
            "sm_scale": self.dim**-0.5,
            "sliding_window": window,
            **self.scales,
        }
        sinks = changes.pop("sinks", self.sinks)
        return ops.sink_attention(self.q, self.k_cache, self.v_cache, sinks, **(given | changes))

    def want(self, window=None, sinks=None):
        """Dense attention with the sink as one more column, sequence by sequence."""
        sinks, outs, shares = t64(self.sinks if sinks is None else sinks), [], []
        for b, n in enumerate(self.lens.tolist()):
            q = t64(self.q[self.cu[b] : self.cu[b + 1]])
            group = q.shape[1] // self.k[b].shape[1]
            k, v = (t64(x[b]).repeat_interleave(group, dim=1) for x in (self.k, self.v))
            scores = torch.einsum("ihd,jhd->hij", q, k) * self.dim**-0.5
            i = torch.arange(n - len(q), n)[:, None]
            j = torch.arange(n)[None]
            hidden = (j > i) | (i - j >= (window or n + 1))
            scores = scores.masked_fill(hidden, -math.inf)
            column = sinks[:, None, None].expand(-1, len(q), 1)
            p = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)
            outs.append(torch.einsum("hij,jhd->ihd", p[..., :-1], v))
            shares.append(p[..., -1].T)
        return torch.cat(outs), torch.cat(shares)
