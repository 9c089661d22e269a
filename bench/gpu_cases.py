"""Every op of the model on a GPU at the shapes it has there: calls on random weights, bytes, operations, a check.

Bytes and operations are the formula's own, as in `mxmoe.costs` and the benches of the CPU: each weight that is used
and each key that is seen is read once, each activation read and written once. The check compares some rows with the
CPU's kernels on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gpu_timing import Call, copies
from make_checkpoint import Weights
from mxmoe import cuda, ops
from mxmoe.config import ModelConfig
from mxmoe.costs import Costs

__all__ = [
    "EXPERTS",
    "KV_FORMS",
    "PHASES",
    "GpuWork",
    "Maker",
    "Phase",
    "attention",
    "dense",
    "experts",
    "fused_qkv",
    "head",
    "routing",
    "works",
]

Array = NDArray[Any]
BF16 = ml_dtypes.bfloat16
EXPERTS = ("gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias")
KV_FORMS = ("bf16", "int8")  # of the cache, in which attention is timed and repeated
MOST_CACHE_BYTES = 1 << 30  # of keys and values that calls go round on
# By how much, in the norm, a bfloat16 that falls to the other side moves a result; a wrong index moves it by 1.
AGREES = 1e-2


@dataclass(frozen=True)
class Phase:
    """New tokens of a step, of how many sequences, and how many keys each of these has with them.

    `heavy` are left out of a short run.
    """

    name: str
    tokens: int
    sequences: int
    keys: int
    heavy: bool = False

    @property
    def decodes(self) -> bool:
        """Whether every sequence gets one token."""
        return self.tokens == self.sequences


PHASES = (
    Phase("decode", 1, 1, 1000),
    Phase("decode x32", 32, 32, 1000),
    Phase("prefill 1024", 1024, 1, 1024, heavy=True),
    Phase("prefill 8192", 8192, 1, 8192),
)


@dataclass(frozen=True)
class GpuWork:
    """What is timed.

    Attributes
    ----------
    op, shape : str
    calls : sequence of callables
        The op on different memory.
    nbytes, operations : float
        Of one call.
    activations : {"bf16", "float32"}
        Whose peak its operations are held against.
    check : callable
        Raises AssertionError unless some rows agree with the CPU.
    peer : callable, optional
        Given a `gpu_peers.Torch`, its peers at this work.
    goal : float, optional
        The share of the floor that is wanted.
    """

    op: str
    shape: str
    calls: list[Call]
    nbytes: float
    operations: float
    check: Call
    activations: str = "bf16"
    peer: Callable[[Any], Any] | None = None
    goal: float | None = None


def agree(got: Array, want: Array, what: str) -> None:
    """Raise AssertionError unless `got` is finite and near `want` in the norm."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert got.shape == want.shape, f"{what} has shape {got.shape}; the CPU's has {want.shape}"
    assert np.isfinite(got).all(), f"{what} holds a value that is not finite"
    error = np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30)
    assert error < AGREES, f"{what} is {error:.2e} away from the CPU's; wanted at most {AGREES}"


@dataclass
class Maker:
    """Draws the arrays of one model's ops in one phase."""

    config: ModelConfig
    size: str
    phase: Phase
    seed: int = 0
    rng: Any = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.weights = Weights(self.config, self.seed)
        self.shape = f"{self.size} {self.phase.name}"

    def normal(self, *shape: int, dtype: Any = np.float32) -> Array:
        """Draw activations."""
        x: Array = self.rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        return x

    def weight(self, name: str, layer: int = 0) -> Array:
        """Return a weight as a checkpoint has it."""
        shape = self.weights.shapes[name]
        return np.concatenate(list(self.weights.pieces(name, layer))).reshape(shape)


def up(*arrays: Array) -> list[Any]:
    """Copy arrays to the GPU."""
    return [cuda.array(np.ascontiguousarray(x)) for x in arrays]


# What stays small beside the weights


def rows(m: Maker) -> Iterator[GpuWork]:
    """Make embedding, rmsnorm, rope and the cache's write."""
    c, n = m.config, m.phase.tokens
    x, w = m.normal(n, c.hidden_size), m.weight("input_layernorm")
    held, norm = up(x, w)
    yield GpuWork(
        "rmsnorm", m.shape, [partial(cuda.rmsnorm, held, norm)], 8.0 * x.size, 0.0,
        lambda: agree(cuda.rmsnorm(held, norm).numpy(), ops.rmsnorm(x, w), "rmsnorm"),
        peer=lambda torch: torch.rmsnorm(n, c.hidden_size),
    )  # fmt: skip
    heads = c.num_attention_heads + c.num_key_value_heads
    qk, half = m.normal(n, heads, c.head_dim), c.head_dim // 2
    cos, sin = m.normal(n, half), m.normal(n, half)
    there = up(qk, cos, sin)
    yield GpuWork(
        "rope", m.shape, [partial(cuda.rope, *there)], 8.0 * qk.size + 8.0 * cos.size, 0.0,
        lambda: agree(cuda.rope(*there).numpy(), ops.rope(qk, cos, sin), "rope"),
    )  # fmt: skip
    k, v = (m.normal(n, c.num_key_value_heads, c.head_dim) for _ in range(2))
    shape = (-(-n // 256), c.num_key_value_heads, 256, c.head_dim)
    caches = up(*(np.zeros(shape, BF16) for _ in range(2)))
    parts = up(k, v), caches, up(np.arange(n, dtype=np.int64))

    def write() -> None:
        cuda.kv_cache_write(*parts[0], *parts[1], parts[2][0])

    def check() -> None:
        write()
        got = caches[0].numpy().transpose(0, 2, 1, 3).reshape(-1, *shape[1::2])[:n]
        agree(got, k.astype(BF16), "kv_cache_write")

    yield GpuWork("kv_cache_write", m.shape, [write], 12.0 * k.size, 0.0, check)


def embedding(m: Maker) -> Iterator[GpuWork]:
    """Make the look-up."""
    c, n = m.config, m.phase.tokens
    table, ids = m.weight("embed_tokens"), m.rng.integers(0, c.vocab_size, n)
    there = up(ids, table)
    yield GpuWork(
        "embedding", m.shape, [partial(cuda.embedding, *there)], 6.0 * n * c.hidden_size, 0.0,
        lambda: agree(cuda.embedding(*there).numpy(), table[ids].astype(np.float32), "embedding"),
    )  # fmt: skip


# Dense products


def _dense(m: Maker, op: str, names: tuple[str, ...], residual: bool) -> GpuWork:
    n, costs = m.phase.tokens, Costs(m.config)
    tokens = n if op != "lm_head" or m.phase.decodes else 1  # of a prompt, the last token alone gets logits
    has_bias = op != "lm_head"

    def layer(i: int) -> list[tuple[Array, Array | None]]:
        return [(m.weight(f"{w}_weight" if has_bias else w, i), m.weight(f"{w}_bias", i) if has_bias else None)
                for w in names]  # fmt: skip

    first = layer(0)
    features, columns = sum(len(w) for w, _ in first), first[0][0].shape[1]
    x = m.normal(tokens, columns)
    r = m.normal(tokens, features) if residual else None
    nbytes = costs.dense_bytes(features, columns, bias=has_bias)
    nbytes += 4.0 * tokens * (columns + (1 + residual) * features)
    (held,), extra = up(x), up(r)[0] if r is not None else None
    layers = [first, *(layer(i) for i in range(1, copies(nbytes)))]
    there = [[(*up(w), None, None if b is None else up(b)[0]) for w, b in parts] for parts in layers]

    def call(parts: list[tuple[Any, Any, Any]]) -> Any:
        if len(parts) > 1:
            return cuda.linear_group(held, parts)
        return cuda.linear(held, parts[0][0], parts[0][2], residual=extra)

    def check() -> None:
        got = call(there[0])[:2].numpy()
        weight, bias = first[-1]
        few = slice(0, min(512, len(weight)))
        own = slice(features - len(weight), features - len(weight) + few.stop)
        b, on = None if bias is None else bias[few], None if r is None else np.ascontiguousarray(r[:2, own])
        want = ops.linear(x[:2], weight[few], b, activations="bf16", residual=on)
        agree(got[:, own], want, op)

    return GpuWork(
        op, f"{m.shape} ({tokens}x{columns} @ {features})", [partial(call, parts) for parts in there], nbytes,
        2.0 * tokens * columns * features, check,
        peer=lambda torch: torch.linear(tokens, columns, features, len(layers)),
    )  # fmt: skip


def dense(m: Maker) -> Iterator[GpuWork]:
    """Make the projections."""
    yield _dense(m, "qkv", ("q_proj", "k_proj", "v_proj"), residual=False)
    yield _dense(m, "o_proj", ("o_proj",), residual=True)


def fused_qkv(m: Maker) -> Iterator[GpuWork]:
    """Make what a decoding step begins a layer with, in one launch: norm, projections, RoPE, the cache's write."""
    c, n, names = m.config, m.phase.tokens, ("q_proj", "k_proj", "v_proj")
    features = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    nbytes = Costs(c).dense_bytes(features, c.hidden_size, bias=True) + 4.0 * n * c.hidden_size + 2.0 * n * features
    x, norm = m.normal(n, c.hidden_size), m.weight("input_layernorm")
    held, scale = up(x, norm)
    layers = [[tuple(up(m.weight(f"{w}_weight", i), m.weight(f"{w}_bias", i))) for w in names]
              for i in range(copies(nbytes))]  # fmt: skip
    angle = m.rng.uniform(0, 6.28, (n, c.head_dim // 2)).astype(np.float32)
    shape = (-(-n // 256), c.num_key_value_heads, 256, c.head_dim)
    order = np.arange(n, dtype=np.int64)
    places = [*up(np.cos(angle), np.sin(angle), order, order), *up(*(np.zeros(shape, BF16) for _ in range(2)))]

    def call(layer: Any) -> Any:
        return cuda.rmsnorm_qkv_rope(held, scale, 1e-5, *layer, *places)

    def check() -> None:
        weight, bias = m.weight("q_proj_weight"), m.weight("q_proj_bias")
        q = ops.linear(ops.rmsnorm(x, norm), weight, bias, activations="bf16").reshape(n, -1, c.head_dim)
        agree(call(layers[0]).numpy(), ops.rope(q, np.cos(angle), np.sin(angle)), "rmsnorm_qkv_rope")

    yield GpuWork(
        "rmsnorm_qkv_rope", m.shape, [partial(call, layer) for layer in layers], nbytes,
        2.0 * n * c.hidden_size * features, check,
    )  # fmt: skip


def head(m: Maker) -> Iterator[GpuWork]:
    """Make lm_head and the choice of the likeliest."""
    yield _dense(m, "lm_head", ("lm_head",), residual=False)
    n = m.phase.tokens
    if not m.phase.decodes:
        return
    logits = m.normal(n, m.config.vocab_size)
    (held,) = up(logits)
    yield GpuWork(
        "greedy_sample", m.shape, [partial(cuda.greedy_sample, held)], 4.0 * logits.size, 0.0,
        lambda: agree(cuda.greedy_sample(held)[0].numpy(), logits.argmax(axis=1), "greedy_sample"),
    )  # fmt: skip


# Experts


def routing(m: Maker) -> Iterator[GpuWork]:
    """Make norm, router and choice of the experts: in one launch, and the choice alone."""
    c, n, k = m.config, m.phase.tokens, m.config.experts_per_token
    x, names = m.normal(n, c.hidden_size), ("input_layernorm", "router_weight", "router_bias")
    (held,) = up(x)
    nbytes = Costs(c).router_bytes + 2.0 * c.hidden_size + 6.0 * x.size + 4.0 * n * (c.num_experts + 2 * k)
    layers = [tuple(up(*(m.weight(name, i) for name in names))) for i in range(min(8, copies(nbytes)))]

    def call(parts: Any) -> Any:
        return cuda.rmsnorm_routing(held, parts[0], 1e-5, parts[1], parts[2], k)

    def check() -> None:
        norm, weight, bias = (m.weight(name) for name in names)
        want = ops.linear(ops.rmsnorm(x[:2], norm), weight, bias, activations="float32")
        agree(call(layers[0])[1][:2].numpy(), want, "rmsnorm_routing")

    operations = 2.0 * n * c.hidden_size * c.num_experts
    yield GpuWork(
        "rmsnorm_routing", m.shape, [partial(call, w) for w in layers], nbytes, operations, check, "float32"
    )
    logits = m.normal(n, c.num_experts)
    (scores,) = up(logits)
    yield GpuWork(
        "expert_routing", m.shape, [partial(cuda.expert_routing, scores, k)], 4.0 * n * (c.num_experts + 2 * k), 0.0,
        lambda: agree(cuda.expert_routing(scores, k)[0].numpy(), ops.expert_routing(logits, k)[0], "expert_routing"),
    )  # fmt: skip


def experts(m: Maker) -> Iterator[GpuWork]:
    """Make the experts of a layer; another choice of them each time is other memory."""
    c, n, k = m.config, m.phase.tokens, m.config.experts_per_token
    weights = {name: m.weight(name) for name in EXPERTS}
    there = up(*weights.values())
    foldable = cuda.scales_are_foldable(*(w for name, w in weights.items() if name.endswith("scales")))
    x = m.normal(n, c.hidden_size)
    (held,) = up(x)
    one = Costs(c).expert_bytes
    choices = [
        ops.expert_routing(m.normal(n, c.num_experts), k) for _ in range(copies(one * min(c.num_experts, n * k)))
    ]
    read = float(np.mean([len(np.unique(ids)) for ids, _ in choices])) * one
    chosen = [up(*choice) for choice in choices]

    def check() -> None:
        ids, shares = choices[0]
        want = ops.mxfp4_moe(x[:1], ids[:1], shares[:1], *weights.values(), activations="bf16", residual=x[:1])
        agree(call(chosen[0])[:1].numpy(), want, "mxfp4_moe")

    def call(choice: Any) -> Any:
        return cuda.mxfp4_moe(held, *choice, *there, activations="bf16", foldable_scales=foldable, residual=held)

    operations = 2.0 * 3 * c.intermediate_size * c.hidden_size * k * n
    yield GpuWork(
        "mxfp4_moe", m.shape, [partial(call, choice) for choice in chosen], read + 12.0 * x.size, operations, check,
        peer=lambda torch: torch.experts(c, n, [ids for ids, _ in choices]),
        goal=None if m.phase.decodes or n < 8192 else 0.4,
    )  # fmt: skip


# Attention


def _seen(phase: Phase, window: int | None) -> tuple[float, float]:
    """Keys that are read, and (query, key) pairs."""
    new = phase.tokens // phase.sequences
    last = np.arange(phase.keys - new, phase.keys) + 1
    pairs = last if window is None else np.minimum(last, window)
    keys = phase.keys if window is None else min(phase.keys, window + new - 1)
    return float(keys * phase.sequences), float(pairs.sum() * phase.sequences)


class _Attention:
    """One layer's attention over a cache with pages of 256 in any order, other ones for each call.

    Parameters
    ----------
    m : Maker
    window : int or None
    kv : {"bf16", "int8"}
    """

    def __init__(self, m: Maker, window: int | None, kv: str) -> None:
        c, p = m.config, m.phase
        width, self.window = -(-p.keys // 256), window
        keys, pairs = _seen(p, window)
        a_key = Costs(c, kv=kv).kv_bytes(0) / c.num_hidden_layers  # type: ignore[arg-type]
        self.nbytes = a_key * keys + 8.0 * p.tokens * c.num_attention_heads * c.head_dim
        self.operations = 4.0 * c.num_attention_heads * c.head_dim * pairs
        held = 256 * width * p.sequences * a_key
        self.turns = max(1, min(copies(self.nbytes), int(MOST_CACHE_BYTES // held))) if p.decodes else 1
        blocks = p.sequences * width * self.turns
        shape = (blocks, c.num_key_value_heads, 256, c.head_dim)
        drawn = m.normal(524287)  # a prime: no two keys are the same
        self.host: dict[str, Any] = {"sinks": m.weight("sinks")}
        for side, sign in (("k", 1.0), ("v", -1.0)):
            if kv == "int8":
                codes = np.rint(sign * 40 * drawn).clip(-127, 127).astype(np.int8)
                self.host[f"{side}_cache"] = np.resize(codes, shape)
                self.host[f"{side}_scales"] = np.resize(0.02 * np.abs(drawn), shape[:3])
            else:
                self.host[f"{side}_cache"] = np.resize((sign * drawn).astype(BF16), shape)
        self.there = {name: up(x)[0] for name, x in self.host.items()}
        self.q = m.normal(p.tokens, c.num_attention_heads, c.head_dim)
        self.held = up(self.q)[0]
        self.tables = m.rng.permutation(blocks).astype(np.int32).reshape(self.turns, p.sequences, width)
        self.lengths = np.full(p.sequences, p.keys, np.int32)
        self.options = {"sm_scale": c.head_dim**-0.5, "sliding_window": window, "activations": "bf16"}
        starts = np.linspace(0, p.tokens, p.sequences + 1).astype(np.int32)
        self.batch = dict(zip(("cu_seqlens", "seq_lens"), up(starts, self.lengths), strict=True))
        self.max_seq_len = p.keys
        self.turn_tables = up(*self.tables)

    def call(self, turn: int) -> Any:
        """Run it on the GPU."""
        return cuda.sink_attention(
            self.held, **self.there, **self.batch, block_table=self.turn_tables[turn], **self.options,
            max_seq_len=self.max_seq_len,
        )  # fmt: skip

    def check(self) -> None:
        """Compare each sequence's last token."""
        last = len(self.q) // len(self.lengths)
        starts = np.arange(len(self.lengths) + 1, dtype=np.int32)
        want = ops.sink_attention(
            self.q[last - 1 :: last], **self.host, cu_seqlens=starts, seq_lens=self.lengths,
            block_table=self.tables[0], **self.options,
        )  # fmt: skip
        agree(self.call(0).numpy()[last - 1 :: last], want, "sink_attention")


def attention(m: Maker, window: int | None, kv: str = "bf16") -> GpuWork:
    """Make attention of a full or a sliding layer."""
    made, c, p = _Attention(m, window, kv), m.config, m.phase
    what = "full" if window is None else f"window {window}"
    return GpuWork(
        "sink_attention", f"{m.shape}, {what}, {kv}", [partial(made.call, i) for i in range(made.turns)], made.nbytes,
        made.operations, made.check,
        # Only full attention is torch's own, and that without sinks.
        peer=None if window or kv != "bf16" else lambda torch: torch.attention(c, p, made.turns),
        goal=0.5 if window is None and p.tokens >= 8192 else None,
    )  # fmt: skip


def works(size: str, config: ModelConfig, phases: tuple[Phase, ...], *, quick: bool = False) -> Iterator[Any]:
    """Yield functions that make the works of a model, some at a time: memory is short when all are made at once.

    Parameters
    ----------
    size : str
        The model's name.
    config : ModelConfig
    phases : tuple of Phase
    quick : bool
        Leave out what is heavy or says little.
    """
    for phase in phases:
        if quick and phase.heavy:
            continue
        m = Maker(config, size, phase)
        yield partial(experts, m)
        if size == "120b":  # whose other layers are 20b's
            yield partial(routing, m)
            continue
        yield partial(dense, m)
        if phase.decodes:
            yield partial(fused_qkv, m)
        yield partial(routing, m)
        yield partial(_all_attention, m, not quick)
        yield partial(rows, m)
        if phase.decodes:
            yield partial(head, m)
            if not quick:
                yield partial(embedding, m)
    if size != "120b":
        keys = config.max_position_embeddings if size == "20b" else 150
        deep = replace(phases[0], name=f"decode at {keys}", keys=keys)
        yield partial(_all_attention, Maker(config, size, deep), not quick)


def _all_attention(m: Maker, every_form: bool) -> Iterator[GpuWork]:
    yield attention(m, m.config.sliding_window)
    for kv in KV_FORMS if every_form else KV_FORMS[:1]:
        yield attention(m, None, kv)
