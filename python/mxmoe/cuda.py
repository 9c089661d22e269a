"""The kernels on NVIDIA GPUs, and arrays in a GPU's memory.

The ops have the names and arguments of `mxmoe.ops`, which calls them for arrays on a GPU: a `DeviceArray` of this
module, a torch tensor, or anything else on a CUDA device that speaks DLPack. Results go into ``out`` when it is
given, else into a torch tensor for torch tensors and a `DeviceArray` for everything else. Host arrays are taken for
small integers alone (token ids, positions, tables); weights and activations must be on the GPU already.

Work is queued on the current stream and runs on its own; `DeviceArray.numpy` waits for it, and whoever takes an array
by DLPack is ordered behind it. An op on arrays of torch or CuPy stands in the order of their current stream too;
arrays of others are waited for. Values of arrays on the GPU cannot be checked beforehand: each op says what an id or
slot out of range does.

This file is long because every op's contract stands in its docstring.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

__all__ = [
    "architecture",
    "array",
    "embedding",
    "empty",
    "expert_routing",
    "from_dlpack",
    "graph",
    "greedy_sample",
    "is_on_gpu",
    "kv_cache_advance",
    "kv_cache_write",
    "linear",
    "linear_group",
    "mxfp4_moe",
    "on_stream",
    "overlapping",
    "pooled",
    "problem",
    "rmsnorm",
    "rmsnorm_qkv_rope",
    "rmsnorm_routing",
    "rope",
    "rope_kv_write",
    "sample",
    "scales_are_foldable",
    "sink_attention",
    "synchronize",
    "use",
]

Array = Any
"""An array on a GPU: a `DeviceArray`, a torch tensor, or anything with DLPack."""

_CUDA_DEVICES = (2, 13)  # DLPack's numbers of plain and managed CUDA memory
_HOST_TYPES = frozenset({np.ndarray, type(None), bool, int, float, str, list, tuple})

_backend: ModuleType | None = None


def use(module: ModuleType | None) -> None:
    """Take another build of the extension, such as the emulation; None for the one that was installed."""
    global _backend
    _backend = module


def extension() -> Any:
    """Return the extension module.

    Raises
    ------
    RuntimeError
        mxmoe was built without CUDA.
    """
    global _backend
    if _backend is None:
        try:
            from mxmoe import _cuda
        except ImportError as error:
            raise RuntimeError(f"mxmoe was built without CUDA ({error}); install it where nvcc is found") from None
        _backend = _cuda
    return _backend


def problem() -> str | None:
    """Say what keeps this machine from running on a GPU; None when nothing does."""
    try:
        text: str = extension().status().problem
    except RuntimeError as error:
        return str(error)
    return text or None


@contextmanager
def architecture(name: str) -> Iterator[None]:
    """Force an architecture's kernels for all ops of the process within the ``with`` block.

    Parameters
    ----------
    name : str
        ``"sm_90a"``, with Hopper's own instructions, or ``"sm_80"``, which runs everywhere. The environment variable
        ``MXMOE_CUDA_ARCH`` does the same for a whole process.

    Raises
    ------
    ValueError
        The name is unknown. That the device lacks it is said by the first op.
    """
    if not name:
        raise ValueError("architecture is empty; wanted sm_80 or sm_90a")
    extension().set_architecture(name)
    try:
        yield
    finally:
        extension().set_architecture("")


def is_on_gpu(x: Any) -> bool:
    """Whether `x` is an array in the memory of a CUDA device."""
    if type(x) in _HOST_TYPES:
        return False
    is_cuda = getattr(x, "is_cuda", None)  # torch's answer, which is faster than DLPack's
    if isinstance(is_cuda, bool):
        return is_cuda
    ask = getattr(x, "__dlpack_device__", None)
    if ask is None:
        return False
    try:
        device = ask()
    except Exception:  # whoever takes the array says what is wrong with it
        return False
    return isinstance(device, tuple) and len(device) == 2 and device[0] in _CUDA_DEVICES


_P = ParamSpec("_P")
_R = TypeVar("_R")

# How to ask a library for the handle of its current stream.
_CURRENT_STREAM: dict[str, Callable[[Any], int]] = {
    "torch": lambda torch: torch.cuda.current_stream().cuda_stream,
    "cupy": lambda cupy: cupy.cuda.get_current_stream().ptr,
}


def _owners(values: Iterator[Any]) -> set[str]:
    """Name the libraries whose arrays on the GPU are among `values`."""
    found: set[str] = set()
    for x in values:
        if isinstance(x, tuple | list):
            found |= _owners(iter(x))
        elif not isinstance(x, extension().DeviceArray) and is_on_gpu(x):
            found.add(type(x).__module__.partition(".")[0])
    return found


def _handing_back(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Order the owners of others' arrays behind the op: DLPack orders only the way here."""

    @functools.wraps(op)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        result = op(*args, **kwargs)
        stream = extension().current_stream()
        for owner in _owners(iter((*args, *kwargs.values()))):
            if owner in _CURRENT_STREAM:
                stream.let_wait(_CURRENT_STREAM[owner](sys.modules[owner]))
            else:
                stream.synchronize()
        return result

    return call


def empty(shape: Sequence[int], dtype: str = "float32", what: str = "an array") -> Any:
    """Make an uninitialised array on the GPU.

    Parameters
    ----------
    shape : sequence of int
        1 to 4 axes.
    dtype : str
        float32, float64, bfloat16, int8, uint8, int32 or int64.
    what : str
        What it is for; named when there is no room.

    Raises
    ------
    MemoryError
        There is no room. Says how much was wanted for what, and how much is free.
    """
    return extension().empty(list(shape), dtype, what)


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Give this thread's work to a stream within the ``with`` block, behind what the current one has been given.

    Afterwards the current stream waits for it in turn.
    """
    before = extension().current_stream()
    stream.wait_for(before)
    extension().set_current_stream(stream)
    try:
        yield
    finally:
        extension().set_current_stream(before)
        before.wait_for(stream)


@contextmanager
def overlapping() -> Iterator[None]:
    """Let kernels of the current stream begin before those ahead have ended, within the ``with`` block.

    For work that reads weights which were there before the block: kernels ask for those without waiting. Nothing on
    GPUs that cannot (compute capability below 9.0), or with ``MXMOE_CUDA_OVERLAP=0`` in the environment, which is
    for finding faults and for measuring.
    """
    stream = extension().current_stream()
    before = stream.overlaps
    stream.overlaps = os.environ.get("MXMOE_CUDA_OVERLAP", "1") != "0"
    try:
        yield
    finally:
        stream.overlaps = before


@contextmanager
def pooled(pool: Any) -> Iterator[None]:
    """Take this thread's new arrays from a pool within the ``with`` block.

    Ops that run twice in the same way, with the first time's arrays gone, allocate nothing the second time, which
    may then be recorded as a `graph`.

    Parameters
    ----------
    pool : Pool
        Of the extension. Must live as long as its arrays and the graphs that use them.
    """
    before = extension().current_pool()
    extension().set_current_pool(pool)
    try:
        yield
    finally:
        extension().set_current_pool(before)


def array(x: Any, what: str = "an array") -> Any:
    """Copy a host array to the GPU.

    Parameters
    ----------
    x : array in CPU memory, contiguous
    what : str

    Returns
    -------
    DeviceArray
        Of the same shape and dtype.
    """
    x = x if hasattr(x, "__dlpack__") or isinstance(x, np.ndarray) else np.asarray(x)
    shape, dtype = _describe(x)
    made = empty(shape, dtype, what)
    made.set(x)
    return made


def _describe(x: Any) -> tuple[tuple[int, ...], str]:
    return tuple(x.shape), str(x.dtype).removeprefix("torch.")


def from_dlpack(x: Any) -> Any:
    """Take an array on the GPU without copying; the current stream then waits for its producer's."""
    return extension().from_dlpack(x)


def synchronize() -> None:
    """Wait for the current stream; errors of its kernels are raised here."""
    extension().current_stream().synchronize()


@contextmanager
def graph() -> Iterator[Any]:
    """Record the ops within the ``with`` block instead of running them; ``.replay()`` then runs all of them at once.

    Arrays must be made beforehand and passed as ``out`` (or come out of a pool, see `pooled`), and every op must have
    run once at these sizes: nothing can be allocated meanwhile. They must live as long as the graph, and be arrays of
    this module: take others' by `from_dlpack` before.

    Examples
    --------
    >>> with mxmoe.cuda.graph() as step:
    ...     mxmoe.cuda.rmsnorm(x, weight, out=h)
    ...     mxmoe.cuda.linear(h, projection, out=y)
    >>> step.replay()
    """
    recording = extension().Graph()
    recording.begin()
    try:
        yield recording
    except BaseException:
        recording.abandon()
        raise
    recording.end()


def _empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    if type(like).__module__.split(".")[0] == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return empty(shape, dtype, "an op's result")


def _shape(name: str, x: Array, ndim: int) -> tuple[int, ...]:
    shape = getattr(x, "shape", None)
    if shape is None or not is_on_gpu(x):
        raise TypeError(f"{name} is of type {type(x).__name__}; wanted an array on the GPU")
    if len(shape) != ndim:
        raise ValueError(f"{name} has shape {tuple(shape)}; wanted {ndim} axes")
    return tuple(shape)


def _float_dtype(name: str, x: Array) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise TypeError(f"{name} has dtype {dtype}; wanted float32 or bfloat16")
    return dtype


def _integers(name: str, values: Any, dtype: Any) -> Array:
    """Bring integers to the GPU that may be on the host or a list."""
    if is_on_gpu(values):
        return values
    try:
        host = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is no array of integers: {error}") from None
    if host.dtype.kind not in "iu" and host.size:
        raise TypeError(f"{name} has dtype {host.dtype}; wanted integers")
    limits = np.iinfo(dtype)
    if host.size and (int(host.min()) < limits.min or int(host.max()) > limits.max):
        raise ValueError(f"{name} holds values beyond {np.dtype(dtype)}")
    return array(np.ascontiguousarray(host, dtype), name)


@_handing_back
def embedding(token_ids: Any, weight: Array, *, out: Array | None = None) -> Array:
    """Look token ids up, as `mxmoe.ops.embedding`; an id out of range gives a row of NaN.

    Parameters
    ----------
    token_ids : array_like of int, shape (num_tokens,)
        int64 when on the GPU.
    weight : array, shape (vocab_size, hidden_size), bfloat16 or float32
    out : array, shape (num_tokens, hidden_size), float32, optional
    """
    ids = _integers("token_ids", token_ids, np.int64)
    if out is None:
        out = _empty(weight, (_shape("token_ids", ids, 1)[0], _shape("weight", weight, 2)[1]), "float32")
    extension().embedding(ids, weight, out)
    return out


@_handing_back
def rmsnorm(x: Array, weight: Array, eps: float = 1e-5, *, out: Array | None = None) -> Array:
    """Root mean square layer normalisation, as `mxmoe.ops.rmsnorm`."""
    if out is None:
        out = _empty(x, _shape("x", x, 2), _float_dtype("x", x))
    extension().rmsnorm(x, weight, eps, out)
    return out


@_handing_back
def rope(x: Array, cos: Array, sin: Array, *, out: Array | None = None) -> Array:
    """Rotary position embedding, as `mxmoe.ops.rope`; `cos` and `sin` on the GPU."""
    if out is None:
        out = _empty(x, _shape("x", x, 3), _float_dtype("x", x))
    extension().rope(x, cos, sin, out)
    return out


@_handing_back
def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    scales: Array | None = None,
    activations: str = "bf16",
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Dense layer, as `mxmoe.ops.linear`: bfloat16 weights as stored, activations "float32" or "bf16"."""
    if out is None:
        out = _empty(x, (_shape("x", x, 2)[0], _shape("weight", weight, 2)[0]), "float32")
    extension().linear(x, weight, scales, bias, activations, residual, out)
    return out


@_handing_back
def linear_group(
    x: Array,
    layers: Sequence[tuple[Array, Array | None, Array | None]],
    *,
    activations: str = "bf16",
    out: Array | None = None,
) -> Array:
    """Several dense layers of the same input, as `mxmoe.ops.linear_group`; weights as in `linear`."""
    if out is None:
        features = sum(_shape("weight", weight, 2)[0] for weight, _, _ in layers)
        out = _empty(x, (_shape("x", x, 2)[0], features), "float32")
    extension().linear_group(x, list(layers), activations, out)
    return out


@_handing_back
def expert_routing(router_logits: Array, experts_per_token: int) -> tuple[Array, Array]:
    """Choose the experts of every token, as `mxmoe.ops.expert_routing`."""
    num_tokens, num_experts = _shape("router_logits", router_logits, 2)
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token is {experts_per_token}; wanted 1 to num_experts = {num_experts}")
    ids = _empty(router_logits, (num_tokens, experts_per_token), "int32")
    weights = _empty(router_logits, (num_tokens, experts_per_token), "float32")
    extension().expert_routing(router_logits, ids, weights)
    return ids, weights


@_handing_back
def rmsnorm_routing(
    x: Array,
    norm_weight: Array,
    eps: float,
    router_weight: Array,
    router_bias: Array,
    experts_per_token: int,
    *,
    h_dtype: str = "bfloat16",
    out: tuple[Array, Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Normalise, score the experts and choose among them in one launch.

    Parameters
    ----------
    x : array, shape (num_tokens, hidden_size), float32 or bfloat16
    norm_weight : array, shape (hidden_size,), bfloat16
    eps : float
    router_weight : array, shape (num_experts, hidden_size), bfloat16
    router_bias : array, shape (num_experts,), bfloat16
    experts_per_token : int
    h_dtype : {"bfloat16", "float32"}
        Of the normalised `x`; the router takes it unrounded.
    out : tuple of arrays, optional
        The four results, to be written in place.

    Returns
    -------
    h : array, shape (num_tokens, hidden_size)
    router_logits : array, shape (num_tokens, num_experts), float32
    topk_ids : array, shape (num_tokens, experts_per_token), int32
    topk_weights : array, shape (num_tokens, experts_per_token), float32
    """
    num_tokens, hidden_size = _shape("x", x, 2)
    num_experts = _shape("router_weight", router_weight, 2)[0]
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token is {experts_per_token}; wanted 1 to num_experts = {num_experts}")
    if out is None:
        out = (
            _empty(x, (num_tokens, hidden_size), h_dtype),
            _empty(x, (num_tokens, num_experts), "float32"),
            _empty(x, (num_tokens, experts_per_token), "int32"),
            _empty(x, (num_tokens, experts_per_token), "float32"),
        )
    extension().rmsnorm_routing(x, norm_weight, eps, router_weight, router_bias, *out)
    return out


@_handing_back
def mxfp4_moe(
    x: Array,
    topk_ids: Array,
    topk_weights: Array,
    gate_up_blocks: Array,
    gate_up_scales: Array,
    gate_up_bias: Array,
    down_blocks: Array,
    down_scales: Array,
    down_bias: Array,
    *,
    activations: str = "bf16",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    first_expert: int = 0,
    foldable_scales: bool = False,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Mixture of experts on MXFP4 weights as stored, as `mxmoe.ops.mxfp4_moe`; activations "float32" or "bf16".

    An id in `topk_ids` that is not held here contributes nothing, be it negative.
    """
    if out is None:
        out = _empty(x, _shape("x", x, 2), "float32")
    extension().mxfp4_moe(
        x,
        topk_ids,
        topk_weights,
        gate_up_blocks,
        gate_up_scales,
        gate_up_bias,
        down_blocks,
        down_scales,
        down_bias,
        activations,
        swiglu_alpha,
        swiglu_limit,
        first_expert,
        foldable_scales,
        residual,
        out,
    )
    return out


def scales_are_foldable(*scales: Any) -> bool:
    """Whether `mxfp4_moe` may fold these scales into the weights: all are 2 to 128.

    A weight is then a normal bfloat16 and its scale, halved, a bfloat16 factor, so that nothing is rounded.

    Parameters
    ----------
    *scales : array of uint8, on the GPU or the host
    """
    for x in scales:
        host = from_dlpack(x).numpy() if is_on_gpu(x) else np.asarray(x)
        if host.size and not (host.min() >= 2 and host.max() <= 128):
            return False
    return True


@_handing_back
def kv_cache_write(
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    slots: Any,
    *,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
) -> None:
    """Write keys and values into a paged cache, as `mxmoe.ops.kv_cache_write`.

    Parameters
    ----------
    slots : array_like of int, shape (num_tokens,)
        int64 when on the GPU. A slot out of range writes nothing, and none must be named twice.
    """
    extension().kv_cache_write(k, v, k_cache, v_cache, _integers("slots", slots, np.int64), k_scales, v_scales)


@_handing_back
def kv_cache_advance(
    seq_lens: Array, positions: Array, tables: Sequence[tuple[Array, Array]], *, block_size: int
) -> None:
    """Make room for one token more of every sequence, on the GPU: what lies between two decoding steps.

    Parameters
    ----------
    seq_lens : array, shape (num_sequences,), int32
        Goes up by one in place.
    positions : array, shape (num_sequences,), int64
        Takes the new tokens' positions.
    tables : sequence of (block_table, slots), at most 4
        Block tables (num_sequences, max_blocks) int32, and what takes the new tokens' slots (num_sequences,) int64:
        -1, where nothing is written, when a table has no block for them.
    block_size : int
    """
    extension().kv_cache_advance(seq_lens, positions, list(tables), block_size)


@_handing_back
def rope_kv_write(
    qkv: Array,
    bias: Array | None,
    cos: Array,
    sin: Array,
    positions: Any,
    slots: Any,
    k_cache: Array,
    v_cache: Array,
    *,
    q_dtype: str = "bfloat16",
    out: Array | None = None,
) -> Array:
    """Add a bias, rotate queries and keys, and write keys and values into a paged cache, in one launch.

    Parameters
    ----------
    qkv : array, shape (num_tokens, (num_attention_heads + 2 * num_key_value_heads) * head_dim), float32
        Queries, keys and values of each token, one after the other.
    bias : array, of as many values, float32 or bfloat16, or None
    cos, sin : array, shape (max_positions, head_dim // 2), float32
    positions : array_like of int, shape (num_tokens,)
        int64 when on the GPU. One out of range gives NaN in `out` and writes nothing.
    slots : array_like of int, shape (num_tokens,)
        As in `kv_cache_write`.
    k_cache, v_cache : array, shape (num_blocks, num_key_value_heads, block_size, head_dim)
    q_dtype : {"bfloat16", "float32"}
    out : array, shape (num_tokens, num_attention_heads, head_dim), float32 or bfloat16, optional

    Returns
    -------
    array, shape (num_tokens, num_attention_heads, head_dim)
        The rotated queries.
    """
    if out is None:
        num_tokens, features = _shape("qkv", qkv, 2)
        _, kv_heads, _, head_dim = _shape("k_cache", k_cache, 4)
        out = _empty(qkv, (num_tokens, max(features // head_dim - 2 * kv_heads, 0), head_dim), q_dtype)
    at, places = _integers("positions", positions, np.int64), _integers("slots", slots, np.int64)
    extension().rope_kv_write(qkv, bias, cos, sin, at, places, k_cache, v_cache, out)
    return out


@_handing_back
def rmsnorm_qkv_rope(
    x: Array,
    norm_weight: Array,
    eps: float,
    q: tuple[Array, Array | None],
    k: tuple[Array, Array | None],
    v: tuple[Array, Array | None],
    cos: Array,
    sin: Array,
    positions: Any,
    slots: Any,
    k_cache: Array,
    v_cache: Array,
    *,
    out: Array | None = None,
) -> Array:
    """Normalise, make queries, keys and values, rotate, and write the cache: one launch for up to 8 tokens.

    The bits are those of `rmsnorm`, `linear_group` with activations "bf16", `rope` and `kv_cache_write`.

    Parameters
    ----------
    x : array, shape (num_tokens, hidden_size), float32
        `hidden_size` a multiple of 8.
    norm_weight : array, shape (hidden_size,), bfloat16
    eps : float
    q, k, v : tuple of weight and bias
        Weights (heads * head_dim, hidden_size) bfloat16, rows aligned to 16 bytes; biases of as many rows, bfloat16
        or float32, or None. `head_dim` a multiple of 16.
    cos, sin, positions, slots, k_cache, v_cache
        As in `rope_kv_write`.
    out : array, shape (num_tokens, num_attention_heads, head_dim), optional

    Returns
    -------
    array, shape (num_tokens, num_attention_heads, head_dim)
        The rotated queries, of the cache's dtype.
    """
    if out is None:
        head_dim = _shape("k_cache", k_cache, 4)[3]
        heads = _shape("q_weight", q[0], 2)[0] // head_dim
        out = _empty(x, (_shape("x", x, 2)[0], heads, head_dim), _float_dtype("k_cache", k_cache))
    at, places = _integers("positions", positions, np.int64), _integers("slots", slots, np.int64)
    extension().rmsnorm_qkv_rope(x, norm_weight, eps, q, k, v, cos, sin, at, places, k_cache, v_cache, out)
    return out


@_handing_back
def sink_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    sinks: Array,
    *,
    block_table: Any,
    cu_seqlens: Any,
    seq_lens: Any,
    sm_scale: float,
    sliding_window: int | None = None,
    key_starts: Any = None,
    activations: str = "bf16",
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    sink_share: Array | None = None,
    out: Array | None = None,
    max_seq_len: int | None = None,
) -> Array:
    """Causal grouped-query attention with sinks, as `mxmoe.ops.sink_attention`.

    Parameters
    ----------
    block_table, cu_seqlens, seq_lens, key_starts : array_like of int
        int32 when on the GPU. A block out of range counts as keys that nobody sees. A value that is not finite, in a
        bfloat16 cache, may also reach the few rows that stand before its token in the same tile of 16.
    max_seq_len : int, optional
        The largest of `seq_lens`, or more: sizes the launch. What `block_table` has room for by default.
    """
    if out is None:
        out = _empty(q, _shape("q", q, 3), _float_dtype("q", q))
    table = _integers("block_table", block_table, np.int32)
    if max_seq_len is None:
        max_seq_len = _shape("block_table", table, 2)[1] * _shape("k_cache", k_cache, 4)[2]
    extension().sink_attention(
        q,
        k_cache,
        v_cache,
        sinks,
        table,
        _integers("cu_seqlens", cu_seqlens, np.int32),
        _integers("seq_lens", seq_lens, np.int32),
        None if key_starts is None else _integers("key_starts", key_starts, np.int32),
        max_seq_len,
        sm_scale,
        sliding_window or 0,
        activations,
        k_scales,
        v_scales,
        sink_share,
        out,
    )
    return out


@_handing_back
def greedy_sample(
    logits: Array,
    *,
    out: tuple[Array, Array] | None = None,
    copies: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Take the likeliest token of each row, the lowest id among equals.

    Parameters
    ----------
    logits : array, shape (num_tokens, vocab_size), float32
    out : tuple of arrays, optional
        The two results, to be written in place.
    copies : tuple of arrays, optional
        Positions (num_tokens,) int64, and where the results are written once more: (2, num_tokens) int64 and float32,
        the first row for tokens at even positions. So a step's can still be read while the next one runs.

    Returns
    -------
    token_ids : array, shape (num_tokens,), int64
        A NaN counts as the largest logit.
    logprobs : array, shape (num_tokens,), float32
        NaN where a logit is NaN or the largest is infinite.
    """
    if out is None:
        num_tokens = _shape("logits", logits, 2)[0]
        out = (_empty(logits, (num_tokens,), "int64"), _empty(logits, (num_tokens,), "float32"))
    extension().greedy_sample(logits, *out, *(copies or (None, None, None)))
    return out


@_handing_back
def sample(
    logits: Array,
    temperature: Array,
    top_p: Array,
    top_k: Array,
    min_p: Array,
    uniforms: Array,
    positions: Array,
    *,
    out: tuple[Array, Array] | None = None,
    copies: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Draw a token from each row of logits, as `mxmoe.sampling.Sampler` does.

    Parameters
    ----------
    logits : array, shape (num_tokens, vocab_size), float32
    temperature, top_p, min_p : array, shape (num_tokens,), float64
        As in `mxmoe.sampling.SamplingParams`. They are on the GPU and cannot be checked here.
    top_k : array, shape (num_tokens,), int64
    uniforms : array, shape (2, num_tokens), float64
        In [0, 1): a number for each draw, of which the first row is taken for tokens at even positions, so that the
        next step's can be written while one runs. The same number gives the choice that the sampler would make of
        it, but for a chance of about 1e-7: probabilities are kept to 22 bits.
    positions : array, shape (num_tokens,), int64
    out : tuple of arrays, optional
        The two results, to be written in place.
    copies : tuple of arrays, optional
        Where the results are written once more: see `greedy_sample`.

    Returns
    -------
    token_ids, logprobs
        As of `greedy_sample`; logprobs before temperature and cuts.
    """
    if out is None:
        num_tokens = _shape("logits", logits, 2)[0]
        out = (_empty(logits, (num_tokens,), "int64"), _empty(logits, (num_tokens,), "float32"))
    more = copies or (None, None)
    extension().sample(logits, temperature, top_p, top_k, min_p, uniforms, positions, *out, *more)
    return out
