"""The kernels, on anyone's arrays.

Every op takes NumPy arrays (``ml_dtypes.bfloat16`` among them), torch tensors and anything else in CPU memory that
speaks DLPack or the buffer protocol, without copying. Results go into ``out`` when it is given, else into a new
array of the kind the first argument is. ``out`` is written in place and returned. What `mxmoe.cuda` has under
the same name takes arrays on a GPU.

Errors common to all ops: ``TypeError`` for what is no array or has a dtype that is not listed, ``ValueError`` for a
shape, stride, alignment, device, value range or overlap that does not fit, or an output that is read-only. The
message names the argument, what came and what was wanted. Nothing is written before the arguments are checked.

Results do not depend on the number of threads, on the other rows of a batch, on how a prompt was split or on the
caller's floating-point settings (such as ``torch.set_flush_denormal``), which are left as they are; they may differ
in the last bits between instruction sets.

This file is long because every op's contract stands in its docstring.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

import ml_dtypes
import numpy as np

from mxmoe import _core, cuda

__all__ = [
    "embedding",
    "expert_offsets",
    "expert_routing",
    "int8_quantize",
    "isa",
    "kv_cache_write",
    "linear",
    "linear_group",
    "mxfp4_dequantize",
    "mxfp4_moe",
    "mxfp4_quantize",
    "num_threads",
    "rmsnorm",
    "rope",
    "rope_cos_sin",
    "rope_inv_freq",
    "sink_attention",
]

Array = Any
"""An array in CPU memory: NumPy, torch, or anything with DLPack or the buffer protocol."""

Activations = Literal["float32", "bf16", "int8"]

# More than any model has; bounds what is allocated for a count that came from outside.
_MAX_EXPERTS = 65536

_NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _also_on_gpu(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let `mxmoe.cuda` do what has arrays on a GPU, and floats nowhere else: the one place where devices part."""

    @functools.wraps(op)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        on_gpu = False
        for x in (*args, *kwargs.values()):
            # As a rule the first argument settles it: arrays of the host must not pay for the question.
            if type(x) is np.ndarray and x.dtype.kind not in "iu":
                return op(*args, **kwargs)
            on_gpu = on_gpu or cuda.is_on_gpu(x)
        if not on_gpu:
            return op(*args, **kwargs)
        result: _R = getattr(cuda, op.__name__)(*args, **kwargs)
        return result

    return call


def _empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Make an uninitialised array of the kind `like` is: torch for torch, NumPy for everything else."""
    if type(like) is not np.ndarray and type(like).__module__.split(".")[0] == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return np.empty(shape, _NUMPY_DTYPES[dtype])


def _shape(name: str, x: Array, ndim: int) -> tuple[int, ...]:
    """Shape of `x`, needed to make an output before the kernel has checked anything."""
    # NumPy's arrays say it faster themselves.
    shape: tuple[int, ...] = x.shape if type(x) is np.ndarray else _core.describe(x, name)[0]
    if len(shape) != ndim:
        raise ValueError(f"{name} has shape {shape}; wanted {ndim} axes")
    return shape


def _out_features(name: str, weight: Array) -> int:
    """Rows of a weight as stored or packed."""
    shape = weight.shape if type(weight) is np.ndarray else _core.describe(weight, name)[0]
    if len(shape) == 3:
        return 16 * int(shape[0])
    return _shape(name, weight, 2)[0]


def _float_dtype(name: str, x: Array) -> str:
    if type(x) is np.ndarray and x.dtype == np.float32:
        return "float32"
    dtype: str = _core.describe(x, name)[1]
    if dtype not in ("float32", "bfloat16"):
        raise TypeError(f"{name} has dtype {dtype}; wanted float32 or bfloat16")
    return dtype


def _integers(name: str, values: Array) -> Array:
    """Convert to contiguous int64 what is an array, a list or a scalar of integers, and nothing else."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is no array of integers: {error}") from None
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} has dtype {array.dtype}; wanted integers")
    return array.astype(np.int64, order="C", copy=False)


def _reshape(name: str, x: Array, *shape: int) -> Array:
    """Reshape also what has no such method: bare buffers and DLPack exporters."""
    if _core.describe(x, name)[0] == shape:
        return x
    if not hasattr(x, "reshape"):
        x = np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
    return x.reshape(shape)


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Set the number of threads of the ops called from this thread within the ``with`` block.

    Parameters
    ----------
    n : int
        Threads, the calling one included; 0 for as many as this process has CPUs.

    Raises
    ------
    ValueError
        `n` is negative or above 1024.
    """
    before = _core.current_num_threads()
    _core.set_num_threads(n)
    try:
        yield
    finally:
        _core.set_num_threads(before if before != _core.hardware_threads() else 0)


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Force an instruction set for all ops of the process within the ``with`` block.

    Parameters
    ----------
    name : str
        ``"scalar"``, ``"avx2"``, ``"avxvnni"`` (AVX2 with AVX-VNNI), ``"avx512base"`` (without VNNI and BF16),
        ``"avx512vnni"`` (without BF16) or ``"avx512"``. The environment variable ``MXMOE_ISA`` does the same for a
        whole process.

    Raises
    ------
    ValueError
        The name is unknown or this CPU lacks the instruction set.
    """
    if not name:
        raise ValueError("isa is empty; wanted the name of an instruction set")
    before = _core.active_isa()
    _core.set_isa(name)
    try:
        yield
    finally:
        _core.set_isa(before)


@_also_on_gpu
def embedding(token_ids: Array, weight: Array, *, out: Array | None = None) -> Array:
    """Look token ids up in the embedding matrix.

    Parameters
    ----------
    token_ids : array_like of int, shape (num_tokens,)
    weight : array, shape (vocab_size, hidden_size), bfloat16 or float32
    out : array, shape (num_tokens, hidden_size), float32, optional

    Returns
    -------
    array, shape (num_tokens, hidden_size), float32

    Raises
    ------
    ValueError
        An id is negative or not below vocab_size.
    """
    ids = _integers("token_ids", token_ids)
    if out is None:
        out = _empty(weight, (ids.size, _shape("weight", weight, 2)[1]), "float32")
    _core.embedding(ids, weight, out)
    return out


@_also_on_gpu
def rmsnorm(x: Array, weight: Array, eps: float = 1e-5, *, out: Array | None = None) -> Array:
    """Root mean square layer normalisation: ``x / sqrt(mean(x**2) + eps) * weight`` by row.

    Parameters
    ----------
    x : array, shape (num_tokens, hidden_size), float32 or bfloat16
    weight : array, shape (hidden_size,), float32 or bfloat16
    eps : float
        Added to the mean square; 0 or more.
    out : array, shape (num_tokens, hidden_size), float32 or bfloat16, optional
        May be `x` itself. Computed in float32, rounded once.

    Returns
    -------
    array, shape (num_tokens, hidden_size), dtype of `x`

    References
    ----------
    Zhang and Sennrich 2019, equation 4.
    """
    if out is None:
        out = _empty(x, _shape("x", x, 2), _float_dtype("x", x))
    _core.rmsnorm(x, weight, eps, out)
    return out


def rope_inv_freq(
    head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_max_position_embeddings: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = False,
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float]:
    """Frequencies of rotary position embedding, YaRN-scaled when `factor` is above 1.

    Parameters
    ----------
    head_dim : int
        Even.
    theta : float
        Base of the frequencies.
    factor : float
        By how much the context is extended; 1 for plain rotary embedding.
    original_max_position_embeddings : int
        Context length before the extension, in tokens.
    beta_fast, beta_slow : float
        Rotations within the original context above which a frequency stays, below which it is divided by `factor`.
    truncate : bool
        Round the range of blended dimensions outwards to whole numbers.

    Returns
    -------
    inv_freq : ndarray, shape (head_dim // 2,), float64
        Radians per token.
    scaling : float
        What cos and sin are multiplied by: ``0.1 * ln(factor) + 1``.

    References
    ----------
    Peng et al. 2023 (YaRN), sections 3.2 and 3.4.
    """
    inv_freq, scaling = _core.rope_inv_freq(
        head_dim, theta, factor, original_max_position_embeddings, beta_fast, beta_slow, truncate
    )
    return inv_freq, scaling


def rope_cos_sin(positions: Array, inv_freq: Array, scaling: float = 1.0) -> tuple[Array, Array]:
    """Cosines and sines of the rotations at given positions.

    Parameters
    ----------
    positions : array_like of int, shape (num_tokens,)
        0 or more. Angles are computed in float64.
    inv_freq : array, shape (head_dim // 2,), float64
    scaling : float

    Returns
    -------
    cos, sin : ndarray, shape (num_tokens, head_dim // 2), float32
    """
    positions = _integers("positions", positions)
    shape = (positions.size, _shape("inv_freq", inv_freq, 1)[0])
    cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
    _core.rope_cos_sin(positions, inv_freq, scaling, cos, sin)
    return cos, sin


@_also_on_gpu
def rope(x: Array, cos: Array, sin: Array, *, out: Array | None = None) -> Array:
    """Rotary position embedding, half-split.

    With ``x1, x2`` the halves of a head: ``[x1 * cos - x2 * sin, x2 * cos + x1 * sin]``.

    Parameters
    ----------
    x : array, shape (num_tokens, num_heads, head_dim), float32 or bfloat16
    cos, sin : array, shape (num_tokens, head_dim // 2), float32
    out : array, shape of `x`, float32 or bfloat16, optional
        May be `x` itself.

    Returns
    -------
    array, shape and dtype of `x`

    References
    ----------
    Su et al. 2021, section 3.4.2.
    """
    if out is None:
        out = _empty(x, _shape("x", x, 3), _float_dtype("x", x))
    _core.rope(x, cos, sin, out)
    return out


@_also_on_gpu
def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    scales: Array | None = None,
    activations: Activations = "bf16",
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Dense layer: ``x @ weight.T + bias + residual``.

    Parameters
    ----------
    x : array, shape (num_tokens, in_features), float32 or bfloat16
    weight : array, shape (out_features, in_features), bfloat16 or int8
        Or packed by `mxmoe.packing.pack_linear`, as are `scales` then.
    bias : array, shape (out_features,), bfloat16 or float32, optional
    scales : array, shape (out_features, in_features // 32), bfloat16
        With int8 weights only: one scale per block of 32 weights.
    activations : {"float32", "bf16", "int8"}
        What `x` is rounded to: nothing, bfloat16, or int8 with a float32 scale per block of 32 (bfloat16 when the
        weights are). Products with the weights are exact, sums float32. On CPUs without fast bfloat16 dot products,
        bfloat16 meets int8 and MXFP4 weights as 16-bit integers: what is below a 128th of the power of two in the
        largest magnitude of its block of 32 is rounded to 2^-14 of that power, in addition (of the next power where
        that magnitude's eight bits are all ones).
    residual : array, shape (num_tokens, out_features), float32, optional
    out : array, shape (num_tokens, out_features), float32, optional
        May be `residual` itself.

    Returns
    -------
    array, shape (num_tokens, out_features), float32
    """
    if out is None:
        out = _empty(x, (_shape("x", x, 2)[0], _out_features("weight", weight)), "float32")
    _core.linear(x, weight, scales, bias, activations, residual, out)
    return out


@_also_on_gpu
def linear_group(
    x: Array,
    layers: Sequence[tuple[Array, Array | None, Array | None]],
    *,
    activations: Activations = "bf16",
    out: Array | None = None,
) -> Array:
    """Several dense layers of the same input, their results side by side.

    Gives what `linear` gives for each, to the last bit, but rounds `x` once and shares out all the work together.

    Parameters
    ----------
    x : array, shape (num_tokens, in_features), float32 or bfloat16
    layers : sequence of (weight, scales, bias)
        As in `linear`; scales and bias may be None.
    activations : {"float32", "bf16", "int8"}
    out : array, shape (num_tokens, sum of out_features), float32, optional

    Returns
    -------
    array, shape (num_tokens, sum of out_features), float32
    """
    if out is None:
        features = sum(_out_features("weight", weight) for weight, _, _ in layers)
        out = _empty(x, (_shape("x", x, 2)[0], features), "float32")
    _core.linear_group(x, layers, activations, out)
    return out


@_also_on_gpu
def expert_routing(router_logits: Array, experts_per_token: int) -> tuple[Array, Array]:
    """Choose the experts of every token.

    Parameters
    ----------
    router_logits : array, shape (num_tokens, num_experts), float32
    experts_per_token : int

    Returns
    -------
    topk_ids : array, shape (num_tokens, experts_per_token), int32
        By descending logit; equal logits by lower index; NaN last.
    topk_weights : array, shape (num_tokens, experts_per_token), float32
        Softmax over the chosen alone.

    References
    ----------
    gpt-oss model card (arXiv 2508.10925), section 2.2.
    """
    num_tokens, num_experts = _shape("router_logits", router_logits, 2)
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token is {experts_per_token}; wanted 1 to num_experts = {num_experts}")
    ids = _empty(router_logits, (num_tokens, experts_per_token), "int32")
    weights = _empty(router_logits, (num_tokens, experts_per_token), "float32")
    _core.expert_routing(router_logits, ids, weights)
    return ids, weights


def expert_offsets(topk_ids: Array, num_experts: int) -> tuple[Array, Array]:
    """Sort the (token, choice) pairs by expert, stably.

    Parameters
    ----------
    topk_ids : array, shape (num_tokens, experts_per_token), int32
        Within [0, num_experts).
    num_experts : int

    Returns
    -------
    expert_offsets : array, shape (num_experts + 1,), int32
        Expert e owns ``order[expert_offsets[e]:expert_offsets[e + 1]]``.
    order : array, shape (num_tokens * experts_per_token,), int32
        Pairs, as ``token * experts_per_token + choice``.
    """
    num_tokens, chosen = _shape("topk_ids", topk_ids, 2)
    if not 1 <= num_experts <= _MAX_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; wanted 1 to {_MAX_EXPERTS}")
    offsets = _empty(topk_ids, (num_experts + 1,), "int32")
    order = _empty(topk_ids, (num_tokens * chosen,), "int32")
    _core.expert_offsets(topk_ids, num_experts, offsets, order)
    return offsets, order


@_also_on_gpu
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
    activations: Activations = "bf16",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    first_expert: int = 0,
    foldable_scales: bool = False,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Mixture of experts on MXFP4 weights: two grouped products around a clamped SwiGLU.

    ``residual + sum_c topk_weights[:, c] * expert(topk_ids[:, c], x)`` with, in an expert,
    ``g = W1 x + b1; gate = min(g[0::2], limit); up = clip(g[1::2], -limit, limit);
    y = W2 (gate * sigmoid(alpha * gate) * (up + 1)) + b2``.

    Parameters
    ----------
    x : array, shape (num_tokens, hidden_size), float32 or bfloat16
    topk_ids : array, shape (num_tokens, experts_per_token), int32
        Ids outside ``[first_expert, first_expert + num_experts)`` contribute nothing, so that holders of different
        ranges of experts can add up their results.
    topk_weights : array, shape (num_tokens, experts_per_token), float32
    gate_up_blocks : array, shape (num_experts, 2 * intermediate_size, hidden_size // 32, 16), uint8
        MXFP4 codes, two to a byte, low nibble first; gate and up rows alternate.
    gate_up_scales : array, shape (num_experts, 2 * intermediate_size, hidden_size // 32), uint8
        e8m0; 255 (NaN) must have been ruled out. Blocks and scales of both matrices may also be packed by
        `mxmoe.packing.pack_mxfp4`.
    gate_up_bias : array, shape (num_experts, 2 * intermediate_size), bfloat16 or float32
    down_blocks : array, shape (num_experts, hidden_size, intermediate_size // 32, 16), uint8
    down_scales : array, shape (num_experts, hidden_size, intermediate_size // 32), uint8
    down_bias : array, shape (num_experts, hidden_size), bfloat16 or float32
    activations : {"float32", "bf16", "int8"}
        What `x` and the SwiGLU's result are rounded to before each product, as in `linear`.
    swiglu_alpha, swiglu_limit : float
    first_expert : int
        Id of the first expert held here.
    foldable_scales : bool
        Whether every scale is known to be 2 to 128 (`mxmoe.cuda.scales_are_foldable`), which the kernels for
        Hopper GPUs need; a wrong word gives wrong results there. Of no meaning elsewhere.
    residual : array, shape (num_tokens, hidden_size), float32, optional
    out : array, shape (num_tokens, hidden_size), float32, optional
        May be `residual` itself.

    Returns
    -------
    array, shape (num_tokens, hidden_size), float32

    References
    ----------
    gpt-oss model card, section 2.2; OCP Microscaling Formats v1.0, section 5.
    """
    if out is None:
        out = _empty(x, _shape("x", x, 2), "float32")
    _core.mxfp4_moe(
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
        residual,
        out,
    )
    return out


@_also_on_gpu
def kv_cache_write(
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    slots: Array,
    *,
    k_scales: Array | None = None,
    v_scales: Array | None = None,
) -> None:
    """Write the keys and values of new tokens into a paged cache, in place.

    Parameters
    ----------
    k, v : array, shape (num_tokens, num_key_value_heads, head_dim), float32 or bfloat16
    k_cache, v_cache : array, shape (num_blocks, num_key_value_heads, block_size, head_dim)
        float32, bfloat16 or int8; written.
    slots : array_like of int, shape (num_tokens,)
        ``block * block_size + offset``.
    k_scales, v_scales : array, shape (num_blocks, num_key_value_heads, block_size), float32
        With an int8 cache only; written: amax / 127 of each token's head.

    References
    ----------
    Kwon et al. 2023 (PagedAttention), section 4.
    """
    slots = _integers("slots", slots)
    _core.kv_cache_write(k, v, k_cache, v_cache, slots, k_scales, v_scales)


@_also_on_gpu
def sink_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    sinks: Array,
    *,
    block_table: Array,
    cu_seqlens: Array,
    seq_lens: Array,
    sm_scale: float,
    sliding_window: int | None = None,
    key_starts: Array | None = None,
    activations: Activations = "bf16",
    k_scales: Array | None = None,
    v_scales: Array | None = None,
    sink_share: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Causal grouped-query attention with sinks, on a ragged batch over a paged cache.

    Query i of sequence b stands at position ``seq_lens[b] - (cu_seqlens[b + 1] - cu_seqlens[b]) + i`` and sees the
    keys up to its own, on sliding layers the last `sliding_window` of them. Each head's sink is one more logit in the
    softmax's denominator, without a value.

    Parameters
    ----------
    q : array, shape (num_tokens, num_attention_heads, head_dim), float32 or bfloat16
        The new tokens of all sequences, one sequence after the other. head_dim is at most 256.
    k_cache, v_cache : array, shape (num_blocks, num_key_value_heads, block_size, head_dim)
        float32, bfloat16 or int8, the new tokens' keys and values included. Any strides that are multiples of
        head_dim, but for int8, which is contiguous.
    sinks : array, shape (num_attention_heads,), float32 or bfloat16
    block_table : array, shape (num_sequences, max_blocks), int32
        Block of the cache that holds a sequence's places ``[i * block_size, (i + 1) * block_size)``; entries without
        a visible key are not looked at.
    cu_seqlens : array, shape (num_sequences + 1,), int32
        Where each sequence's new tokens begin in `q`.
    seq_lens : array, shape (num_sequences,), int32
        Keys of each sequence, the new tokens' included (but for padding before `key_starts`).
    sm_scale : float
        Multiplies the scores; usually ``head_dim ** -0.5``.
    sliding_window : int, optional
        In keys, the query's own included; None or 0 for full attention.
    key_starts : array, shape (num_sequences,), int32, optional
        Place of each sequence's first key; 0 without. What lies before (left padding) is never looked at and has no
        influence on a single bit. New tokens may begin there, too: one that stands before the first key sees nothing
        and gives zeros.
    activations : {"float32", "bf16", "int8"}
        "float32" rounds nothing before `out`, nor do the others with a float32 cache. The others, which are one here,
        round queries for a bfloat16 cache to bfloat16, for an int8 cache to 1 / 16256 of a head's largest magnitude,
        and round the softmax weights to bfloat16 as they multiply the values; where an int8 cache meets integers
        (AVX-512 with VNNI), finer. The denominator sums the weights of a bfloat16 cache as rounded. The scales of an
        int8 cache multiply the scores and, before their rounding, the weights.
    k_scales, v_scales : array, shape (num_blocks, num_key_value_heads, block_size), float32
        With an int8 cache only. Below 0, a value's scale may make what sees it NaN.
    sink_share : array, shape (num_tokens, num_attention_heads), float32, optional
        Written: the sink's share of each softmax.
    out : array, shape of `q`, float32 or bfloat16, optional

    Returns
    -------
    array, shape and dtype of `q`

    References
    ----------
    gpt-oss model card, section 2.3; Xiao et al. 2023; Dao 2023, section 3.1.
    """
    if out is None:
        out = _empty(q, _shape("q", q, 3), _float_dtype("q", q))
    _core.sink_attention(
        q,
        k_cache,
        v_cache,
        sinks,
        block_table,
        cu_seqlens,
        seq_lens,
        key_starts,
        sm_scale,
        sliding_window or 0,
        activations,
        k_scales,
        v_scales,
        sink_share,
        out,
    )
    return out


def mxfp4_dequantize(blocks: Array, scales: Array, *, dtype: Literal["float32", "bfloat16"] = "float32") -> Array:
    """Decode MXFP4, exactly.

    Parameters
    ----------
    blocks : array, shape (..., k // 32, 16), uint8
        e2m1 codes, two to a byte, low nibble first.
    scales : array, shape (..., k // 32), uint8
        e8m0: ``2 ** (scale - 127)``; 255 gives NaN.
    dtype : {"float32", "bfloat16"}

    Returns
    -------
    array, shape (..., k)

    References
    ----------
    OCP Microscaling Formats v1.0, section 5.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; wanted 'float32' or 'bfloat16'")
    shape, scales_shape = _core.describe(blocks, "blocks")[0], _core.describe(scales, "scales")[0]
    if len(shape) < 2 or shape[-1] != 16 or scales_shape != shape[:-1]:
        raise ValueError(
            f"blocks and scales have shapes {shape} and {scales_shape}; wanted (..., k // 32, 16) and (..., k // 32)"
        )
    *lead, per_row, _ = shape
    rows = math.prod(lead)
    out = _empty(blocks, (rows, per_row * 32), dtype)
    _core.mxfp4_dequantize(
        _reshape("blocks", blocks, rows, per_row, 16), _reshape("scales", scales, rows, per_row), out
    )
    return out.reshape(*lead, per_row * 32)


def mxfp4_quantize(x: Array) -> tuple[Array, Array]:
    """Quantise to MXFP4: per block of 32 the scale ``2 ** (floor(log2(amax)) - 2)``, codes to nearest, ties to even.

    Values that are exactly MXFP4 come back exactly. Magnitudes past 6 scales saturate; a block of zeros gets scale
    byte 0.

    Parameters
    ----------
    x : array, shape (..., k), float32 or bfloat16
        Finite; k a multiple of 32.

    Returns
    -------
    blocks : array, shape (..., k // 32, 16), uint8
    scales : array, shape (..., k // 32), uint8

    References
    ----------
    OCP Microscaling Formats v1.0, section 6.3.
    """
    *lead, k = _core.describe(x, "x")[0]
    if k % 32 != 0 or k == 0:
        raise ValueError(f"x has {k} columns; wanted a positive multiple of 32")
    rows = math.prod(lead)
    blocks = _empty(x, (rows, k // 32, 16), "uint8")
    scales = _empty(x, (rows, k // 32), "uint8")
    _core.mxfp4_quantize(_reshape("x", x, rows, k), blocks, scales)
    return blocks.reshape(*lead, k // 32, 16), scales.reshape(*lead, k // 32)


def int8_quantize(x: Array) -> tuple[Array, Array]:
    """Quantise to int8 with a bfloat16 scale per block of 32 columns.

    Parameters
    ----------
    x : array, shape (rows, k), float32 or bfloat16
        Finite; k a multiple of 32.

    Returns
    -------
    codes : array, shape (rows, k), int8
        Within [-127, 127].
    scales : array, shape (rows, k // 32), bfloat16
        amax / 127, rounded up.
    """
    rows, k = _shape("x", x, 2)
    codes = _empty(x, (rows, k), "int8")
    scales = _empty(x, (rows, k // 32), "bfloat16")
    _core.int8_quantize(x, codes, scales)
    return codes, scales
