"""Calls of every op whose results are subnormal, and a program that makes them with subnormals flushed."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch

import c_library
import op_calls
from mxmoe import _core, ops

# What floating-point inputs are multiplied by: products of two, one with a weight of about 1, sums with epsilon.
CASES = {"as they are": 1.0, "products": 2.0**-66, "tiny": 2.0**-128, "least": 2.0**-140}
FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


@contextmanager
def nothing() -> Iterator[None]:
    yield


def make(name: str, case: str) -> op_calls.Call:
    """Make a call of `c_library` with inputs so small that subnormals come out."""
    call = c_library.make(name)
    for argument, array in call.arrays.items():
        if argument in call.outputs:
            continue
        if name == "mxfp4_dequantize" and argument == "scales":
            array[:, 0] = 0
        elif array.dtype in FLOATS and argument not in ("cos", "sin", "sinks"):
            array[...] = (array.astype(np.float64) * CASES[case]).astype(array.dtype)
    return call


def _digest(call: op_calls.Call) -> str:
    return hashlib.sha256(b"".join(call.arrays[name].tobytes() for name in call.outputs)).hexdigest()


def _made() -> dict[str, tuple[str, op_calls.Call]]:
    return {
        f"{name}, {case}, {isa}": (isa, make(name, case))
        for isa in _core.available_isas()
        for name in c_library.NAMES
        for case in CASES
    }


def _call_all(made: dict[str, tuple[str, op_calls.Call]]) -> dict[str, str]:
    for isa, call in made.values():
        with ops.isa(isa), ops.num_threads(3):
            call()
    return {key: _digest(call) for key, (_, call) in made.items()}


def all_hashes() -> dict[str, str]:
    """Make every call under every instruction set, and hash what comes out."""
    return _call_all(_made())


def _flushed() -> bool:
    return bool(np.float32(2.0**-120) * np.float32(2.0**-20) == 0)


def _replay_all(made: dict[str, tuple[str, op_calls.Call]], flush: Any) -> dict[str, str]:
    """Record calls first, forget what they wrote, then flush and make them again."""
    recordings = {}
    for key, (isa, call) in made.items():
        with ops.isa(isa), _core.Recording() as recording:
            call()
        if len(recording):
            recordings[key] = recording
        for name in call.outputs:
            call.arrays[name].view(np.uint8)[...] = 0
    flush()
    for key, recording in recordings.items():
        with ops.isa(made[key][0]), ops.num_threads(3):
            recording.replay()
    return {key: _digest(made[key][1]) for key in recordings}


def main(how: str) -> None:
    """Print the hashes, and whether subnormals were flushed before and after."""
    made = _made()  # with subnormals among the inputs
    answer: dict[str, Any] = {}

    def run() -> None:
        seen = []

        def flush() -> None:
            assert torch.set_flush_denormal(True)
            seen.append(_flushed())

        if how == "replayed":
            answer["hashes"] = _replay_all(made, flush)
        else:
            flush()
            answer["hashes"] = _call_all(made)
        answer["flushed"] = [*seen, _flushed()]

    if how == "other thread":
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
