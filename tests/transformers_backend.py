"""What the tests of the transformers backend share: small checkpoints, loaded plainly and through mxmoe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

import checkpoints
from mxmoe.checkpoint import Checkpoint
from mxmoe.config import RopeConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if VERSION < (5, 0):
    pytest.skip("transformers 5 or newer is wanted", allow_module_level=True)

import mxmoe.integrations.transformers as backend  # noqa: E402
from mxmoe.integrations._transformers import attention as attention_module  # noqa: E402
from transformers_models import load_transformers  # noqa: E402

backend.register()

TINY = Path(backend.__file__).parents[1] / "tiny"
EVERY_TOKEN = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
# What float32 adds up to over a few layers, in standard deviations of the logits.
NOISE = 2e-4
named_experts = pytest.mark.skipif(VERSION < (5, 7), reason="this transformers takes no other experts than its own")

CONFIGS = {
    "short windows, two groups": checkpoints.small_config(),
    "three layers, eight experts, odd heads": checkpoints.small_config(
        num_hidden_layers=3,
        hidden_size=160,
        num_experts=8,
        experts_per_token=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=5,
        rope=RopeConfig(10000.0, 4.0, 64, 8.0, 2.0, False),
    ),
    "full layers first, no grouping, heads of 80": checkpoints.small_config(
        hidden_size=96,
        intermediate_size=32,
        num_experts=3,
        experts_per_token=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=80,
        sliding_window=33,
        layer_types=("full_attention", "sliding_attention"),
    ),
}


def load_mxmoe(folder: Path, **options: Any) -> Any:
    """Load a checkpoint through the backend: its attention, and its experts packed."""
    config = backend.MxmoeConfig(options.pop("activations", None), options.pop("dense", None))
    options = {"attn_implementation": "mxmoe", "dtype": torch.float32} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


class Case:
    """A checkpoint and the models on it: `eager` is transformers' own in float32 on decoded experts."""

    def __init__(self, folder: Path, name: str, seed: int) -> None:
        self.config, self.seed = CONFIGS[name], seed
        self.checkpoint = Checkpoint.open(checkpoints.write(folder, seed=seed, config=self.config))
        self.path = self.checkpoint.path

    @cache  # noqa: B019 - as long as the module's fixture
    def eager(self, dtype: Any = torch.float32) -> Any:
        return load_transformers(self.checkpoint, dtype)

    @cache  # noqa: B019
    def mxmoe(self) -> Any:
        return load_mxmoe(self.path)

    def ids(self, *shape: int, seed: int = 0) -> Any:
        return torch.randint(self.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def padded(case: Case, lengths: list[int], side: str, seed: int = 0) -> dict[str, Any]:
    """Draw a batch of prompts of these lengths, padded on one side."""
    ids, longest = case.ids(len(lengths), max(lengths), seed=seed), max(lengths)
    place = torch.arange(longest)
    mask = torch.stack([place >= longest - n if side == "left" else place < n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@contextmanager
def counted_attention() -> Iterator[mock.Mock]:
    """Count how often the kernel is called."""
    kernel = attention_module.sink_attention_bhsd
    with mock.patch.object(attention_module, "sink_attention_bhsd", side_effect=kernel) as calls:
        yield calls


def assert_logits(got: Any, want: Any, mask: Any = None, limit: float = NOISE) -> None:
    """Compare logits (batch, tokens, vocab_size) where `mask` (batch, tokens) is not 0."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    rows = torch.ones(got.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert torch.isfinite(got[rows]).all()
    error = (got - want)[rows].abs().amax(-1) / want[rows].std(-1)
    assert error.median() <= limit and (error > 10 * limit).double().mean() <= 0.02, f"off by up to {error.max():.3g}"


def tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape, key
        assert torch.equal(got[key].view(torch.uint8), tensor.view(torch.uint8)), key
