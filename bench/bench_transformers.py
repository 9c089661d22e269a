"""transformers with mxmoe inside against transformers alone, on a few layers of 20b's shapes, in bfloat16.

The peers are transformers' eager attention, the only one it has for gpt-oss on a CPU, with each of its ways to run
experts on decoded weights, and `mxmoe.load` without transformers. Decoding goes on from 512 tokens, whose cache grows
as it is timed. `batched_mm` copies the weights of every token's experts, so it is not asked for prompts. "int8" is
the backend with ``MxmoeConfig(activations="int8", dense="int8")`` beside the same peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers

import mxmoe
import mxmoe.integrations.transformers as backend
from harness import Peer, Work
from make_checkpoint import BIG, write_checkpoint
from mxmoe.config import ModelConfig
from shapes import PHASES, Shape

# The head is as wide as the vocabulary; two layers beside the published one would tell of nothing else.
VOCABULARY = 4096
DEPTH = 512
SHAPES = [
    Shape("20b", phase, peer, full=peer.startswith("eager"))
    for phase, peers in (
        ("prefill 2048", ("grouped_mm", "grouped_mm, int8", "eager", "eager, int8", "native")),
        ("decode", ("grouped_mm", "grouped_mm, int8", "batched_mm", "eager", "eager, int8", "native")),
    )
    for peer in peers
]

Call = Callable[[], Any]


class Models:
    """One checkpoint three times: through the backend, decoded in transformers, and in mxmoe alone."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        backend.register()
        self.folder, self.config = folder, config
        self.ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (1, 2048)))
        self._ours: dict[bool, Any] = {}
        self._decoded: Any = None

    def _load(self, quantization: Any, attention: str) -> Any:
        options = {"quantization_config": quantization, "attn_implementation": attention, "dtype": torch.bfloat16}
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, **options)

    def ours(self, rounded: bool) -> Any:
        if rounded not in self._ours:
            how = backend.MxmoeConfig("int8", "int8") if rounded else backend.MxmoeConfig()
            self._ours[rounded] = self._load(how, "mxmoe")
        return self._ours[rounded]

    def decoded(self, experts: str) -> Any:
        if self._decoded is None:
            self._decoded = self._load(transformers.Mxfp4Config(dequantize=True), "eager")
        self._decoded.set_experts_implementation(experts)
        return self._decoded

    def of_torch(self, model: Any, decode: bool) -> Call:
        """Return a call that gives the last token's logits."""

        def forward(ids: torch.Tensor, cache: Any) -> Any:
            with torch.inference_mode():
                return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

        if not decode:
            return lambda: forward(self.ids, transformers.DynamicCache(config=model.config))
        cache = transformers.DynamicCache(config=model.config)
        chosen = model.config._experts_implementation
        if chosen == "batched_mm":  # which would copy the experts of every token of the prompt
            model.set_experts_implementation("grouped_mm")
        forward(self.ids[:, :DEPTH], cache)
        if chosen == "batched_mm":
            model.set_experts_implementation(chosen)
        return lambda: forward(self.ids[:, DEPTH : DEPTH + 1], cache)

    def native(self, decode: bool) -> Call:
        threads = mxmoe._core.current_num_threads()
        model = mxmoe.load(self.folder, kv="bf16", activations="bf16", num_threads=threads)
        ids = self.ids[0].numpy()
        if not decode:
            return lambda: model.forward(ids, cache=model.new_cache(len(ids)), logits="last")[-1]
        cache = model.new_cache(1 << 16)
        model.forward(ids[:DEPTH], cache=cache)
        return lambda: model.forward(ids[DEPTH : DEPTH + 1], cache=cache)[-1]


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    layers, experts = (request.config.getoption(name) for name in ("--layers", "--experts"))
    kinds = (BIG.layer_types * layers)[:layers]
    config = replace(BIG, num_hidden_layers=layers, layer_types=kinds, num_experts=experts, vocab_size=VOCABULARY)
    folder = tmp_path_factory.mktemp("layers")
    write_checkpoint(folder, replace(config, eos_token_ids=(VOCABULARY - 1,)))
    yield Models(folder, config)
    for path in folder.iterdir():
        path.unlink()


def costs(config: ModelConfig, tokens: int, rounded: bool) -> tuple[float, float]:
    """Bytes of the weights that are read, dense ones bfloat16 or int8, and operations in them, attention left out."""
    c, matrix = config, config.hidden_size * config.intermediate_size * 3
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    router = c.num_hidden_layers * c.hidden_size * c.num_experts
    dense = c.num_hidden_layers * c.hidden_size * heads * c.head_dim
    head = c.hidden_size * c.vocab_size
    used = min(c.num_experts, tokens * c.experts_per_token)
    nbytes = 2 * router + (34 / 32 if rounded else 2) * (dense + head) + c.num_hidden_layers * used * matrix * 17 / 32
    return nbytes, 2.0 * (tokens * (router + dense + c.num_hidden_layers * c.experts_per_token * matrix) + head)


def as_float(logits: Any) -> Any:
    return torch.as_tensor(np.asarray(logits.float() if isinstance(logits, torch.Tensor) else logits)).float()


def check(ours: Call, peer: Call) -> None:
    """Both round to bfloat16 between any two steps, and a router's near tie may fall either way."""
    got, want = as_float(ours()), as_float(peer())
    correlation = torch.corrcoef(torch.stack([got, want]))[0, 1]
    assert torch.isfinite(got).all() and correlation > 0.98, f"logits correlate by {correlation:.3f}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_transformers(shape: Shape, models: Models, bench: Callable[[Work], object]) -> None:
    decode, (peer, _, form) = shape.phase == "decode", shape.what.partition(", ")
    ours = models.of_torch(models.ours(form == "int8"), decode)
    theirs = models.native(decode) if peer == "native" else models.of_torch(models.decoded(peer), decode)
    name = "mxmoe alone" if peer == "native" else f"transformers, {peer}"
    nbytes, operations = costs(models.config, PHASES[shape.phase], form == "int8")
    peers = Peer(name, [theirs])
    kind: Literal["bf16", "int8"] = "int8" if form == "int8" else "bf16"
    bench(Work("transformers", str(shape), [ours], nbytes, operations, kind, lambda: check(ours, theirs), peers))
