"""One pool of threads at a time: torch's rest while mxmoe's decode."""

from __future__ import annotations

import threading
from typing import Any

import torch

__all__ = ["rest_while_decoding"]

# With so few tokens nothing but the weights is worth sharing out.
_FEW_TOKENS = 16


class _Rest:
    """Hooks around a model's forward.

    Threads of torch's go on spinning for a while when they have done something, on the very CPUs that the kernels'
    threads want next: decoding takes half as long again. All that is left to torch in a step with few tokens is too
    small for a second thread.
    """

    def __init__(self) -> None:
        # By calling thread, innermost forward last: several may run one model at once.
        self._before: dict[int, list[int | None]] = {}

    def begin(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds"))]
        tokens = next((x for x in given if isinstance(x, torch.Tensor)), None)
        few = tokens is not None and tokens.shape[:2].numel() <= _FEW_TOKENS
        self._before.setdefault(threading.get_ident(), []).append(torch.get_num_threads() if few else None)
        if few:
            torch.set_num_threads(1)

    def end(self, *_: Any) -> None:
        stack = None if torch.compiler.is_compiling() else self._before.get(threading.get_ident())
        if not stack:
            return
        before = stack.pop()
        if not stack:
            del self._before[threading.get_ident()]
        if before is not None:
            torch.set_num_threads(before)


def rest_while_decoding(model: torch.nn.Module) -> None:
    """Let a model's forward on few tokens run torch's own operators in the calling thread."""
    rest = _Rest()
    model.register_forward_pre_hook(rest.begin, with_kwargs=True, prepend=True)
    model.register_forward_hook(rest.end, always_call=True)
