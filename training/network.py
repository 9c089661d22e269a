"""The tiny gpt-oss as it is trained: bf16 arithmetic on fake-quantised weights, on a CPU.

The forward pass uses the exact values that the exported checkpoint holds, so exporting loses nothing.  Tokens of
all conversations lie one after another; only attention looks at them conversation by conversation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from differentiable import (
    _Collect,
    _combine,
    _Dispatch,
    _GroupedLinear,
    _rmsnorm,
    _Rope,
    _SinkAttention,
    _SwiGLU,
)
from fake_quant import as_bf16, as_mxfp4
from torch import Tensor, nn

ROW_TILE = 128


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the network; the names are those of ``config.json``."""

    vocab_size: int = 1536
    hidden_size: int = 160
    intermediate_size: int = 160
    num_hidden_layers: int = 5
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    sliding_window: int = 48
    rope_theta: float = 10000.0
    rope_factor: float = 4.0
    original_max_position_embeddings: int = 1024
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702

    @property
    def max_position_embeddings(self) -> int:
        """The stretched context length."""
        return int(self.original_max_position_embeddings * self.rope_factor)

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer: even layers slide, odd ones see everything."""
        return self.sliding_window if layer % 2 == 0 else None


def yarn_frequencies(config: TinyConfig) -> tuple[Tensor, float]:
    """Return YaRN's rotation per position of each pair (float64), and the factor on cos and sin."""
    half = config.head_dim // 2
    plain = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)

    def pair_with(rotations: float) -> float:
        length = config.original_max_position_embeddings / (2 * math.pi * rotations)
        return half * math.log(length) / math.log(config.rope_theta)

    low = max(pair_with(config.beta_fast), 0.0)
    high = min(pair_with(config.beta_slow), config.head_dim - 1.0)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain / config.rope_factor * ramp + plain * (1 - ramp), 0.1 * math.log(config.rope_factor) + 1


@dataclass(frozen=True)
class Group:
    """Token rows of equal length that attention takes together, and the rows that come before them.

    Attributes
    ----------
    start, count, length : int
        The group is tokens ``start`` to ``start + count * length``: `count` rows of `length` tokens.
    prefix : Group or None
        Beginnings that several rows share (the system message), computed once.
    parents : Tensor or None
        int64 ``(count,)``: the row of `prefix` with which each row begins.
    """

    start: int
    count: int
    length: int
    prefix: Group | None = None
    parents: Tensor | None = None

    @property
    def rows(self) -> slice:
        """Return the group's tokens."""
        return slice(self.start, self.start + self.count * self.length)

    def take(self, tokens: Tensor) -> Tensor:
        """Cut the group out of ``(num_tokens, heads, dim)``: ``(count, heads, length, dim)``."""
        return tokens[self.rows].unflatten(0, (self.count, self.length)).transpose(1, 2)

    def take_whole(self, tokens: Tensor) -> Tensor:
        """Cut the group's rows out together with their beginnings."""
        own = self.take(tokens)
        if self.prefix is None or self.parents is None:
            return own.contiguous()
        return torch.cat((self.prefix.take(tokens).index_select(0, self.parents), own), 2)


@dataclass(frozen=True)
class Layout:
    """Where the conversations of a batch lie among its tokens.

    Attributes
    ----------
    groups : list of Group
        They follow one another and cover all tokens.
    positions : Tensor
        int64 ``(num_tokens,)``, from 0 in each conversation.
    """

    groups: list[Group]
    positions: Tensor


class Attention(nn.Module):
    """Grouped-query attention with sinks."""

    def __init__(self, config: TinyConfig, layer: int) -> None:
        super().__init__()
        self.config, self.window = config, config.window(layer)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * dim)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * dim)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * dim)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, layout: Layout, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend: bf16 ``(num_tokens, hidden)`` to the same."""
        config, dim = self.config, self.config.head_dim
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([as_bf16(p.weight) for p in projections])
        bias = torch.cat([as_bf16(p.bias) for p in projections])
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = F.linear(x, weight, bias).unflatten(-1, (-1, dim))
        rotated = _Rope.apply(qkv[:, : heads + kv_heads], cos, sin)
        q, k, v = rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]
        sinks, outs = as_bf16(self.sinks).unflatten(0, (kv_heads, -1)), []
        for group in layout.groups:
            gq = group.take(q).unflatten(1, (kv_heads, -1)).contiguous()
            gk, gv = group.take_whole(k), group.take_whole(v)
            out = _SinkAttention.apply(gq, gk, gv, sinks, self._mask(group.length, gk.shape[2]))
            outs.append(out.flatten(1, 2).transpose(1, 2).reshape(-1, heads * dim))
        return F.linear(torch.cat(outs), as_bf16(self.o_proj.weight), as_bf16(self.o_proj.bias))

    def _mask(self, queries: int, keys: int) -> Tensor:
        """Return 0 where the last `queries` of `keys` tokens see a token, else minus infinity."""
        ages = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (ages >= 0) & (ages < (self.window or keys))
        return torch.zeros(queries, keys).masked_fill(~seen, -torch.inf)


class Experts(nn.Module):
    """The weights of all experts of a layer; of ``gate_up_proj`` the gate rows come first."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5 * 0.3)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))


class MLP(nn.Module):
    """The mixture of experts."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return residual plus the experts' output, and the load-balancing loss."""
        config, top = self.config, self.config.num_experts_per_tok
        logits = F.linear(x.float(), as_bf16(self.router.weight).float(), as_bf16(self.router.bias).float())
        chosen, ids = logits.topk(top, dim=-1)
        weights = chosen.softmax(-1)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counted = torch.bincount(flat, minlength=config.num_local_experts)
        # Each expert's share is padded to whole tiles: few distinct matrix shapes, few kernels to compile.
        padded = (counted + ROW_TILE - 1) // ROW_TILE * ROW_TILE
        shift = (padded - counted).cumsum(0) - (padded - counted)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel()) + shift[flat[order]]
        source = torch.zeros(int(padded.sum()), dtype=torch.long)
        source[places] = torch.arange(order.numel()) // top
        counts = padded.tolist()
        experts = self.experts
        rows = _Dispatch.apply(x, source, places)
        inner = _GroupedLinear.apply(rows, as_mxfp4(experts.gate_up_proj), as_bf16(experts.gate_up_proj_bias), counts)
        inner = _SwiGLU.apply(inner, config.swiglu_limit, config.swiglu_alpha)
        out = _GroupedLinear.apply(inner, as_mxfp4(experts.down_proj), as_bf16(experts.down_proj_bias), counts)
        out = _Collect.apply(out, places).unflatten(0, (-1, top))
        share = counted.float() / flat.numel()
        balance = config.num_local_experts * (share * logits.softmax(-1).mean(0)).sum()
        return _combine(out, weights, residual), balance


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result is bf16."""
        return _rmsnorm(x, as_bf16(self.weight), self.eps)


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, config: TinyConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, layout: Layout, cos: Tensor, sin: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the new residual stream (float32), only of `rows` if given, and the load-balancing loss."""
        x = x + self.self_attn(self.input_layernorm(x), layout, cos, sin)
        if rows is not None:
            x = x.index_select(0, rows)
        result: tuple[Tensor, Tensor] = self.mlp(self.post_attention_layernorm(x), x)
        return result


class TinyModel(nn.Module):
    """The whole model, its modules named as in the checkpoint."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
                "norm": Norm(config),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequencies, factor = yarn_frequencies(config)
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer("cos", (angles.cos() * factor).float()[:, None], persistent=False)
        self.register_buffer("sin", (angles.sin() * factor).float()[:, None], persistent=False)
        self.frequencies = frequencies
        self._start_as_copier()

    @torch.no_grad()
    def _start_as_copier(self) -> None:
        """Draw the first weights so that the model begins as a rough induction machine.

        Looking up and copying is what every task needs, and what random weights learn last: no part of the circuit
        helps without the others.  So the first layer's heads begin by attending 1, 2 and 3 tokens back and writing
        what they find, each in a rotation of its own; full layers begin by matching such notes of the query's with
        those of the keys, and write the token they attend to in the rotation in which the vocabulary's head reads.
        """
        config = self.config
        hidden, dim = config.hidden_size, config.head_dim
        kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        own, *back, out = [torch.eye(hidden), *(torch.linalg.qr(torch.randn(hidden, hidden))[0] for _ in range(4))]
        embedding = self.model["embed_tokens"].weight.normal_(std=0.5)
        self.lm_head.weight.copy_(0.3 * embedding @ out.T)
        # Which note of the query is looked for in which note of the keys.
        matches = [(own, back[0]), (back[0], back[1]), (back[2], back[1])]
        for i, block in enumerate(self.model["layers"]):
            block.mlp.router.weight.normal_(std=hidden**-0.5)
            attention = block.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            for projection in projections:
                projection.weight.normal_(std=hidden**-0.5)
                projection.bias.zero_()
            q, k, v, o = (p.weight for p in projections)
            keys, values = k.unflatten(0, (kv_heads, dim)), v.unflatten(0, (kv_heads, dim))
            for head in range(kv_heads * group):
                kv, kind = divmod(head, group)
                rows = slice(head * dim, (head + 1) * dim)
                if config.window(i) is None:
                    asked, stored = matches[kind % len(matches)]
                    q[rows] = 2.0 * keys[kv] @ stored @ asked.T
                    o[:, rows] = out @ values[kv].T
                elif i == 0:
                    o[:, rows] = back[kind % len(back[:3])] @ values[kv].T
                    self._attend_back(attention, head, kv, kind % 3 + 1)
                else:
                    o[:, rows] *= 0.3
            if i == 0:
                q *= 0.1
                k *= 0.1

    def _attend_back(self, attention: Attention, head: int, kv: int, distance: int) -> None:
        """Set the biases of a head so that it attends `distance` tokens back."""
        dim, half = self.config.head_dim, self.config.head_dim // 2
        strength = 4.0
        attention.k_proj.bias[kv * dim : kv * dim + half] = strength
        # A query that is a key turned back by the distance matches keys at just that distance.
        angles = distance * self.frequencies
        bias = torch.cat((angles.cos(), -angles.sin())).float() * strength
        attention.q_proj.bias[head * dim : (head + 1) * dim] = bias

    def forward(self, token_ids: Tensor, layout: Layout, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of chosen tokens.

        Parameters
        ----------
        token_ids : Tensor
            int64 ``(num_tokens,)``.
        layout : Layout
            Where conversations begin and end.
        rows : Tensor
            int64 ``(num_rows,)``: the tokens whose successor is asked for.

        Returns
        -------
        logits : Tensor
            bf16 ``(num_rows, vocab_size)``.
        balance : Tensor
            The mean load-balancing loss of the layers; 1 where the load is even.
        """
        cos, sin = self.cos[layout.positions], self.sin[layout.positions]
        x = F.embedding(token_ids, as_bf16(self.model["embed_tokens"].weight)).float()
        balances = []
        last = self.model["layers"][-1]
        for block in self.model["layers"]:
            # Past the last attention only the tokens whose successor is asked for matter.
            x, balance = block(x, layout, cos, sin, rows if block is last else None)
            balances.append(balance)
        x = self.model["norm"](x)
        return F.linear(x, as_bf16(self.lm_head.weight)), torch.stack(balances).mean()
