"""One program in a process of its own, told by `peers.py` through JSON lines what to run; no command for people.

Reads ``{"model": ..., "threads": ..., "max_tokens": ..., "options": {...}}``, then one command a line:
``{"do": "prefill" | "decode", "depth_ids": [...], "ids": [...]}`` answers the seconds that `ids` took after
`depth_ids`, in one piece or token by token; ``{"do": "logits", "ids": [...], "to": FILE}`` saves every token's
logits. Needs nothing of mxmoe for the other programs, so that they may live in an environment of their own.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Tokens that the other programs take at a time, their own default.
_UBATCH = 512


class Program(Protocol):
    """A model that has been loaded."""

    def clear(self) -> None:
        """Forget all tokens."""
        ...

    def forward(self, ids: Sequence[int], logits: str) -> NDArray[np.float32]:
        """Run the next tokens of the sequence; logits of the "last" or of "all"."""
        ...


class Mxmoe:
    """The package itself."""

    def __init__(self, model: str, threads: int, max_tokens: int, options: dict[str, Any]) -> None:
        import mxmoe

        self._model = mxmoe.load(model, num_threads=threads, progress=False, **options)
        self._cache = self._model.new_cache(max_tokens)

    def clear(self) -> None:
        self._cache.reset()

    def forward(self, ids: Sequence[int], logits: str) -> NDArray[np.float32]:
        return self._model.forward(ids, cache=self._cache, logits=logits)  # type: ignore[call-overload, no-any-return]


class _Llama(ABC):
    """What llama.cpp and ik_llama.cpp have in common: a C interface through ctypes, `C`."""

    C: Any

    def __init__(self, model: str, threads: int, max_tokens: int, options: dict[str, Any]) -> None:
        C = self.C
        C.llama_backend_init()
        model_params = C.llama_model_default_params()
        for name, value in options.items():
            setattr(model_params, name, value)
        self._model = C.llama_model_load_from_file(model.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"cannot load {model}")
        params = C.llama_context_default_params()
        params.n_ctx = -(-max_tokens // 256) * 256
        params.n_batch, params.n_ubatch = params.n_ctx, _UBATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = C.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("cannot make a context")
        self._vocab_size = int(C.llama_vocab_n_tokens(C.llama_model_get_vocab(self._model)))
        self._position = 0

    def clear(self) -> None:
        self._clear()
        self._position = 0

    @abstractmethod
    def _clear(self) -> None:
        """Empty the cache; the two programs name the function differently."""

    def forward(self, ids: Sequence[int], logits: str) -> NDArray[np.float32]:
        C, count = self.C, len(ids)
        batch = C.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = int(token), self._position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = logits == "all" or i == count - 1
            status = C.llama_decode(self._context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status} for {count} tokens")
        finally:
            C.llama_batch_free(batch)
        self._position += count
        rows = range(count) if logits == "all" else [count - 1]
        return np.stack([self._row(i) for i in rows])

    def _row(self, i: int) -> NDArray[np.float32]:
        pointer = self.C.llama_get_logits_ith(self._context, i)
        row = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
        return np.array(row, np.float32)


class LlamaCpp(_Llama):
    """llama.cpp, from the package llama-cpp-python."""

    def __init__(self, *args: Any) -> None:
        from llama_cpp import llama_cpp

        self.C = llama_cpp
        super().__init__(*args)

    def _clear(self) -> None:
        self.C.llama_memory_clear(self.C.llama_get_memory(self._context), True)


class IkLlamaCpp(_Llama):
    """ik_llama.cpp, from the package ik-llama-cpp-python."""

    def __init__(self, *args: Any) -> None:
        from ik_llama_cpp import _ctypes_api

        self.C = _ctypes_api
        super().__init__(*args)

    def _clear(self) -> None:
        self.C.llama_kv_cache_clear(self._context)


PROGRAMS: dict[str, Any] = {"mxmoe": Mxmoe, "llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlamaCpp}


def answer(program: Program, command: dict[str, Any]) -> dict[str, Any]:
    """Do what one command says."""
    program.clear()
    if command["do"] == "logits":
        np.save(command["to"], program.forward(command["ids"], "all"))
        return {"saved": command["to"]}
    if command["depth_ids"]:
        program.forward(command["depth_ids"], "last")
    pieces = [command["ids"]] if command["do"] == "prefill" else [[token] for token in command["ids"]]
    begin = time.perf_counter()
    for piece in pieces:
        program.forward(piece, "last")
    return {"seconds": time.perf_counter() - begin}


def main() -> int:
    """Serve one program until its input ends."""
    # What the programs print must not get between the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(data: dict[str, Any]) -> None:
        replies.write(json.dumps(data) + "\n")
        replies.flush()

    program: Program | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if program is None:
                arguments = [command[key] for key in ("model", "threads", "max_tokens", "options")]
                program = PROGRAMS[sys.argv[1]](*arguments)
                reply({"ready": sys.argv[1]})
            else:
                reply(answer(program, command))
        except Exception as problem:  # whatever it is, the other end says which program it was
            reply({"error": f"{type(problem).__name__}: {problem}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
