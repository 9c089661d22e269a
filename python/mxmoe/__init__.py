"""Run, inspect and extend OpenAI's gpt-oss models on your own machine.

``mxmoe.load`` gives a model, ``mxmoe.ops`` the kernels on anyone's arrays, ``mxmoe.harmony`` the conversation format,
``mxmoe.reference`` everything again in float64 NumPy.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from mxmoe import harmony, ops
from mxmoe.checkpoint import Checkpoint, CheckpointError
from mxmoe.config import ConfigError, ModelConfig
from mxmoe.doctor import doctor
from mxmoe.generate import Generation, GenerationStep
from mxmoe.inspection import HookContext
from mxmoe.kv_cache import KVCache
from mxmoe.model import Model, load
from mxmoe.tokenizer import Tokenizer, TokenizerError

__all__ = [
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
    "doctor",
    "harmony",
    "load",
    "ops",
]

try:
    __version__ = version("mxmoe")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"
