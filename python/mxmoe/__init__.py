"""Run, inspect and extend OpenAI's gpt-oss models on your own machine.

``mxmoe.load`` gives a model, ``mxmoe.ops`` the kernels on anyone's arrays, ``mxmoe.cuda`` the same on
NVIDIA GPUs, ``mxmoe.harmony`` the conversation format, ``mxmoe.reference`` everything again in float64 NumPy.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxmoe import ceilings, costs, cuda, harmony, ops, reference
    from mxmoe.adapters import AdapterError
    from mxmoe.c_interface import get_cmake_dir, get_include, get_library
    from mxmoe.checkpoint import Checkpoint, CheckpointError
    from mxmoe.config import ConfigError, ModelConfig
    from mxmoe.doctor import doctor
    from mxmoe.generate import Generation, GenerationStep, Model
    from mxmoe.inspection import HookContext
    from mxmoe.kv_cache import KVCache
    from mxmoe.loading import load
    from mxmoe.tokenizer import Tokenizer, TokenizerError

# Imported when first asked for, so that the command line answers (and can be interrupted) at once.
_HOME = {
    "AdapterError": "adapters",
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "Generation": "generate",
    "GenerationStep": "generate",
    "HookContext": "inspection",
    "KVCache": "kv_cache",
    "Model": "generate",
    "ModelConfig": "config",
    "Tokenizer": "tokenizer",
    "TokenizerError": "tokenizer",
    "doctor": "doctor",
    "get_cmake_dir": "c_interface",
    "get_include": "c_interface",
    "get_library": "c_interface",
    "load": "loading",
}
_MODULES = ("ceilings", "costs", "cuda", "harmony", "ops", "reference")

__all__ = [
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Generation",
    "GenerationStep",
    "HookContext",
    "KVCache",
    "Model",
    "ModelConfig",
    "Tokenizer",
    "TokenizerError",
    "ceilings",
    "costs",
    "cuda",
    "doctor",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "harmony",
    "load",
    "ops",
    "reference",
]

try:
    __version__ = version("mxmoe")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mxmoe.{name}")
    if name in _HOME:
        # Kept in the module's own namespace: "doctor" is both a function and the module that holds it.
        value = globals()[name] = getattr(import_module(f"mxmoe.{_HOME[name]}"), name)
        return value
    raise AttributeError(f"module 'mxmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
