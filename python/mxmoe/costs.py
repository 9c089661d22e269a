"""What a token costs: bytes that decoding must read, and operations that prefill must do.

The counts follow from the configuration and the way the model is held; they are those of the formula, not of any
kernel, so that time at the machine's ceilings is a floor for every program. An operation is one multiplication or
one addition. Norms, softmax, SwiGLU and rotary embedding are left out: under 0.1% of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mxmoe.config import ModelConfig

__all__ = ["Costs", "distinct_experts"]

_BF16, _FLOAT32 = 2, 4
_BLOCK = 32  # values that share a scale, in MXFP4 and in int8 weights
_MOST_SUMS = 64 << 20  # past which attention on a GPU splits no sequence
_SMALL_THINGS = 16 << 20  # of a GPU's memory: what is taken in pieces of a MiB, and tables
_KV_BYTES = {"float32": 4, "bf16": 2, "int8": 1}


def distinct_experts(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """Return how many experts of a layer some tokens choose between them, on average over even choices.

    An expert is passed over by a token with probability ``1 - experts_per_token / num_experts``, by all of them with
    that to the power of `num_tokens`.
    """
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** num_tokens)


@dataclass(frozen=True)
class Costs:
    """Bytes and operations of a model held in a certain way.

    Attributes
    ----------
    config : ModelConfig
    dense : {"bf16", "int8"}
        How attention projections and lm_head are held; int8 with a bfloat16 scale for every 32 values.
    kv : {"float32", "bf16", "int8"}
        How keys and values are held; int8 with a float32 scale for every token and head.

    Examples
    --------
    >>> costs = Costs(model.config, "int8", "bf16")
    >>> costs.decode_bytes(depth=0) / 1e9  # GB read for a token of gpt-oss-20b
    2.57
    """

    config: ModelConfig
    dense: Literal["bf16", "int8"] = "bf16"
    kv: Literal["float32", "bf16", "int8"] = "bf16"

    def dense_bytes(self, out_features: int, in_features: int, *, bias: bool) -> int:
        """Bytes of a dense layer; one whose input is no multiple of 32 stays bfloat16."""
        size = out_features * in_features
        held = size * _BF16
        if self.dense == "int8" and in_features % _BLOCK == 0:
            held = size + size // _BLOCK * _BF16
        return held + (out_features * _BF16 if bias else 0)

    @property
    def attention_bytes(self) -> int:
        """Bytes of a layer's four projections and its sinks."""
        c = self.config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        into = [self.dense_bytes(rows, c.hidden_size, bias=True) for rows in (queries, keys, keys)]
        return sum(into) + self.dense_bytes(c.hidden_size, queries, bias=True) + c.num_attention_heads * _BF16

    @property
    def router_bytes(self) -> int:
        """Bytes of a layer's router, bfloat16 however the rest is held."""
        return self.config.num_experts * (self.config.hidden_size + 1) * _BF16

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: codes of half a byte, a scale byte for every 32, and biases."""
        c = self.config
        values = 3 * c.intermediate_size * c.hidden_size
        return values // 2 + values // _BLOCK + (2 * c.intermediate_size + c.hidden_size) * _BF16

    @property
    def lm_head_bytes(self) -> int:
        """Bytes of the output head."""
        return self.dense_bytes(self.config.vocab_size, self.config.hidden_size, bias=False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, the embedding's included."""
        c = self.config
        layer = self.attention_bytes + self.router_bytes + c.num_experts * self.expert_bytes
        norms = (2 * c.num_hidden_layers + 1) * c.hidden_size * _BF16
        return c.num_hidden_layers * layer + norms + self.lm_head_bytes + c.vocab_size * c.hidden_size * _BF16

    def gpu_scratch_bytes(self, step_tokens: int, positions: int, logits_rows: int = 1) -> int:
        """Bytes that a GPU needs beside weights and KV cache, at most.

        Parameters
        ----------
        step_tokens : int
            New tokens that pass through the layers at a time: no more than `mxmoe.devices.Gpu.step_tokens`.
        positions : int
            Of the cache, all sequences together.
        logits_rows : int
            Tokens of a step whose logits are wanted: all, with ``forward(..., logits="all")``.

        Notes
        -----
        What lives at once between two ops of a layer, in float32, and again for recorded decoding steps; the rotary
        table; logits; and for each of two streams an op's working memory, which doubles as it grows and keeps what it
        grew out of. That is the largest of the experts' intermediate rows, inputs rounded to bfloat16, and sums of
        attention's chunks of 128 keys.
        """
        c = self.config
        queries = c.num_attention_heads * c.head_dim
        wide = 4 * c.hidden_size + 2 * queries + 2 * c.num_key_value_heads * c.head_dim
        between = step_tokens * _FLOAT32 * (wide + c.num_experts + 4 * c.experts_per_token)
        experts = step_tokens * c.experts_per_token * (c.intermediate_size + c.hidden_size + 4) * _FLOAT32
        rounded = step_tokens * max(queries, c.hidden_size) * _BF16
        chunk = (c.head_dim + 2) * _FLOAT32
        sums = min(_MOST_SUMS, step_tokens * c.num_attention_heads * (positions // 128 + 1) * chunk)
        table, logits = positions * c.head_dim * _FLOAT32, logits_rows * c.vocab_size * _FLOAT32
        return 2 * (between + logits) + table + 8 * max(experts, rounded, sums) + _SMALL_THINGS

    def kv_bytes(self, depth: int) -> int:
        """Bytes of keys and values, over all layers, that a token reads with `depth` tokens before it."""
        c = self.config
        head = c.head_dim * _KV_BYTES[self.kv] + (_FLOAT32 if self.kv == "int8" else 0)
        return 2 * c.num_key_value_heads * head * self._keys(depth)

    def _keys(self, depth: int) -> int:
        """Keys that a token sees, its own included, summed over the layers."""
        windows = (self.config.window(i) for i in range(self.config.num_hidden_layers))
        return sum(depth + 1 if window is None else min(depth + 1, window) for window in windows)

    def decode_bytes(self, depth: int = 0, batch: int = 1, experts: float | None = None) -> float:
        """Bytes that one decoding step reads.

        Parameters
        ----------
        depth : int
            Tokens in the cache of each sequence.
        batch : int
            Sequences that decode together.
        experts : float, optional
            Experts of a layer that get work, on average; `distinct_experts` by default.

        Returns
        -------
        float
            All sequences together: divide by `batch` for a token.
        """
        c = self.config
        if experts is None:
            experts = distinct_experts(c.num_experts, c.experts_per_token, batch)
        norms = (2 * c.num_hidden_layers + 1) * c.hidden_size * _BF16
        layer = self.attention_bytes + self.router_bytes + experts * self.expert_bytes
        rows = batch * (c.hidden_size * _BF16 + self.kv_bytes(depth))  # of the embedding and of the cache
        return c.num_hidden_layers * layer + norms + self.lm_head_bytes + rows

    @property
    def token_operations(self) -> int:
        """Operations of one token in the weights of all layers, lm_head and attention scores left out."""
        c = self.config
        heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
        attention = c.hidden_size * heads * c.head_dim
        experts = c.experts_per_token * 3 * c.intermediate_size * c.hidden_size
        return 2 * c.num_hidden_layers * (attention + c.num_experts * c.hidden_size + experts)

    @property
    def lm_head_operations(self) -> int:
        """Operations of one row of logits."""
        return 2 * self.config.vocab_size * self.config.hidden_size

    def attention_operations(self, new_tokens: int, depth: int = 0) -> int:
        """Operations of scores and weighted sums of some new tokens of a sequence, each on the keys it sees."""
        c = self.config
        seen = 0
        for i in range(c.num_hidden_layers):
            window = c.window(i) or depth + new_tokens
            # Tokens whose view is not yet full see 1, 2, 3 ... keys; the others a window of them.
            growing = max(0, min(new_tokens, window - depth))
            seen += growing * depth + growing * (growing + 1) // 2 + (new_tokens - growing) * window
        return 4 * c.num_attention_heads * c.head_dim * seen

    def prefill_operations(self, new_tokens: int, depth: int = 0) -> int:
        """Operations of a whole prompt of which the last token alone gets logits."""
        weights = new_tokens * self.token_operations + self.lm_head_operations
        return weights + self.attention_operations(new_tokens, depth)

    def decode_operations(self, depth: int = 0) -> int:
        """Operations of one decoded token."""
        return self.prefill_operations(1, depth)
