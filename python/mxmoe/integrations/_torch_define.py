"""What every torch operator is made with: its registration, the ways to its kernel, and what its tensors must be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from mxmoe import cuda, ops

__all__: list[str] = []

_INT32 = torch.iinfo(torch.int32)


class TensorOp(Protocol):
    """An operator with one result."""

    def __call__(self, *args: Any) -> Tensor: ...
    def register_autograd(self, backward: Any, /, *, setup_context: Any) -> None: ...


class PairOp(Protocol):
    """An operator with two results."""

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]: ...
    def register_autograd(self, backward: Any, /, *, setup_context: Any) -> None: ...


# The ops as they are behind the question where an array lies, which `_backend` has answered.
_CPU = SimpleNamespace(
    **{name: inspect.unwrap(getattr(ops, name)) for name in ops.__all__ if name not in ("isa", "num_threads")}
)


def _backend(tensor: Tensor) -> Any:
    """Find the kernels for the memory a tensor lies in: the one place that knows devices."""
    kind = tensor.device.type
    if kind == "cpu":
        return _CPU
    if kind != "cuda":
        raise ValueError(f"a tensor is on {tensor.device}; wanted the CPU or a CUDA device")
    problem = cuda.problem()
    if problem is not None:
        raise ValueError(f"a tensor is on {tensor.device}, where mxmoe cannot compute: {problem}")
    return ops


def _given(name: str, tensor: Tensor) -> Tensor:
    """Pass on what must be as the op wants it: weights, caches and outputs are never copied in secret."""
    if tensor.dtype == torch.float16:
        raise TypeError(f"{name} has dtype float16; wanted float32 or bfloat16")
    return tensor.detach() if tensor.requires_grad else tensor


def _optional(name: str, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _given(name, tensor)


def _rows(name: str, tensor: Tensor, axes: int = 1) -> Tensor:
    """Pass on an input whose last `axes` axes lie side by side, or a copy where they do not."""
    tensor = _given(name, tensor)
    apart = 1
    for axis in range(-1, -min(axes, tensor.dim()) - 1, -1):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != apart:
            return tensor.contiguous()
        apart *= tensor.shape[axis]
    return tensor


def _cache(name: str, tensor: Tensor) -> Tensor:
    """Pass on dense keys or values, (batch, heads, keys, head_dim), with whole rows between any two, or a copy."""
    tensor = _rows(name, tensor)
    whole = all(tensor.stride(axis) % max(1, tensor.shape[-1]) == 0 for axis in range(tensor.dim() - 1))
    return tensor if whole else tensor.contiguous()


def _int32(name: str, tensor: Tensor) -> Tensor:
    """Convert small integers; what int32 cannot hold becomes its nearest number, which is out of range as well."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; wanted int32 or int64")
    if tensor.dtype == torch.int64:
        tensor = tensor.clamp(_INT32.min, _INT32.max).to(torch.int32)
    return tensor.detach().contiguous()


def _frozen(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, which mxmoe does not compute; detach it")


def _no_tensor(*_: Any) -> None:
    """Stand in for an operator that only writes."""


_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def _watched() -> bool:
    """Whether others want to know of a call: a compiler, a tracer, a transform, a mode, a profiler."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


class _Operator:
    """A torch operator, passed by where only its kernel matters: torch's way there is longer than a small kernel."""

    def __init__(self, operator: Any, kernel: Callable[..., Any]) -> None:
        self._operator, self._kernel = operator, kernel

    def __call__(self, *args: Any) -> Any:
        if _watched():
            return self._operator(*args)
        grad = torch.is_grad_enabled()
        for x in args:
            for tensor in x if type(x) is list else (x,):
                if isinstance(tensor, Tensor) and (type(tensor) not in _PLAIN or (grad and tensor.requires_grad)):
                    return self._operator(*args)
        return self._kernel(*args)

    def register_autograd(self, backward: Any, /, *, setup_context: Any) -> None:
        self._operator.register_autograd(backward, setup_context=setup_context)


def _define(
    name: str,
    inputs: str,
    result: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    written: str | None = None,
) -> Any:
    """Register an operator and, where `written` names what it can write into, its ``_out`` form.

    `kernel` takes the inputs and then, by position and None by default, what is written.
    """
    operator = torch.library.custom_op(f"mxmoe::{name}", kernel, mutates_args=(), schema=f"({inputs}) -> {result}")
    operator.register_fake(fake)
    if written is not None:

        def write(*args: Any) -> None:
            kernel(*args)

        schema = f"({inputs}, {written}) -> ()"
        names = [part.split()[-1] for part in written.split(",")]
        out = torch.library.custom_op(f"mxmoe::{name}_out", write, mutates_args=names, schema=schema)
        out.register_fake(_no_tensor)
    return _Operator(operator, kernel)


def _define_backward(name: str, inputs: str, result: str, kernel: Callable[..., Any], like: tuple[int, ...]) -> Any:
    """Register a gradient as an operator, so that torch.compile need not look into it.

    Its results have the shapes and dtypes of the inputs numbered in `like`.
    """

    def fake(*args: Any) -> Any:
        results = tuple(args[i].new_empty(args[i].shape) for i in like)
        return results if len(results) > 1 else results[0]

    def run(*args: Any) -> Any:
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        results = kernel(*args)
        if isinstance(results, Tensor):
            return results.to(args[like[0]].dtype).contiguous()
        return tuple(x.to(args[i].dtype).contiguous() for x, i in zip(results, like, strict=True))

    return _define(name, inputs, result, run, fake)
