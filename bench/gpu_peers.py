"""What torch gives on the same GPU for the same work, on weights in bfloat16: it has none in MXFP4.

Attention is torch's scaled_dot_product_attention with the keys in one piece and without sinks, which it does not
have; experts are one matrix product after the other on dequantised weights, and torch's grouped product where there
is one, with tokens sorted by expert beforehand.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_timing import torch_seconds
from harness import Peer
from mxmoe.config import ModelConfig

__all__ = ["Torch"]


class Torch:
    """Makes calls of torch on random numbers, and times them.

    Parameters
    ----------
    device : str
        "cuda", or "cpu" to try the code.
    """

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self.torch, self.device = torch, device

    @classmethod
    def find(cls) -> Torch | None:
        """Return one where torch is installed and sees a GPU."""
        try:
            import torch
        except ImportError:
            return None
        return cls() if torch.cuda.is_available() else None

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        """Draw bfloat16 values on the device."""
        return self.torch.empty(shape, dtype=self.torch.bfloat16, device=self.device).normal_(0.0, scale)

    def seconds(self, peer: Peer) -> float:
        """Return what one of the peer's calls takes."""
        return torch_seconds(self.torch, self.device, peer.calls)

    def free(self) -> None:
        """Give memory back to the GPU."""
        if self.device.startswith("cuda"):
            self.torch.cuda.empty_cache()

    def rmsnorm(self, tokens: int, columns: int) -> list[Peer]:
        """Normalise rows."""
        x, weight = self.normal(tokens, columns), self.normal(columns)
        normalise = self.torch.nn.functional.rms_norm
        return [Peer("torch rms_norm", [partial(normalise, x, (columns,), weight, 1e-5)])]

    def linear(self, tokens: int, columns: int, features: int, copies: int) -> list[Peer]:
        """Multiply by several weights in turn."""
        x = self.normal(tokens, columns)
        weights = [self.normal(features, columns, scale=columns**-0.5) for _ in range(copies)]
        multiply = self.torch.nn.functional.linear
        return [Peer("torch linear", [partial(multiply, x, w) for w in weights])]

    def attention(self, config: ModelConfig, phase: Any, copies: int) -> list[Peer]:
        """Attend to as many keys, each sequence's in one piece."""
        new = phase.tokens // phase.sequences
        q = self.normal(phase.sequences, config.num_attention_heads, new, config.head_dim)
        shape = (phase.sequences, config.num_key_value_heads, phase.keys, config.head_dim)
        caches = [(self.normal(*shape), self.normal(*shape)) for _ in range(copies)]
        attend = self.torch.nn.functional.scaled_dot_product_attention
        options = {"is_causal": new > 1, "enable_gqa": True}
        return [Peer("torch sdpa, no sinks", [partial(attend, q, k, v, **options) for k, v in caches])]

    def experts(self, config: ModelConfig, tokens: int, choices: list[NDArray[np.int32]]) -> list[Peer]:
        """Run the chosen experts on dequantised weights."""
        c = config
        up = self.normal(c.num_experts, 2 * c.intermediate_size, c.hidden_size, scale=c.hidden_size**-0.5)
        down = self.normal(c.num_experts, c.hidden_size, c.intermediate_size, scale=c.intermediate_size**-0.5)
        x = self.normal(tokens, c.hidden_size)
        turns = [self._sorted(ids) for ids in choices]
        peers = [Peer("torch matmul an expert", [partial(self._one_by_one, x, up, down, *turn) for turn in turns])]
        if self.device.startswith("cuda") and hasattr(self.torch, "_grouped_mm") and tokens >= c.num_experts:
            calls = [partial(self._grouped, x, up, down, *turn) for turn in turns]
            peers.append(Peer("torch grouped matmul", calls))
        return peers

    def _sorted(self, ids: NDArray[np.int32]) -> tuple[Any, list[tuple[int, int, int]], Any]:
        """Return tokens in the order of their experts, where each expert's begin and end, and the ends."""
        order = np.argsort(ids.ravel(), kind="stable")
        counts = np.bincount(ids.ravel())
        ends = np.cumsum(counts)
        spans = [(e, int(end - n), int(end)) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]
        torch = self.torch
        places = torch.from_numpy(order // ids.shape[1]).to(self.device)
        return places, spans, torch.from_numpy(ends.astype(np.int32)).to(self.device)

    def _swiglu(self, g: Any) -> Any:
        gate, up = g[..., 0::2].clamp(max=7.0), g[..., 1::2].clamp(-7.0, 7.0)
        return gate * self.torch.sigmoid(1.702 * gate) * (up + 1)

    def _one_by_one(self, x: Any, up: Any, down: Any, places: Any, spans: Any, _: Any) -> Any:
        rows, y = x[places], self.torch.zeros_like(x)
        for e, begin, end in spans:
            out = self._swiglu(rows[begin:end] @ up[e].T) @ down[e].T
            y.index_add_(0, places[begin:end], out)
        return y

    def _grouped(self, x: Any, up: Any, down: Any, places: Any, _: Any, ends: Any) -> Any:
        ends = self.torch.nn.functional.pad(ends, (0, len(up) - len(ends)), value=len(places))
        g = self.torch._grouped_mm(x[places], up.transpose(1, 2), offs=ends)
        out = self.torch._grouped_mm(self._swiglu(g), down.transpose(1, 2), offs=ends)
        return self.torch.zeros_like(x).index_add_(0, places, out)
