"""What a model takes of a GPU's memory: by the program's own accounts, and held to them on the emulation."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import gpu_models
import mxmoe
from make_checkpoint import SIZES
from mxmoe import cuda
from mxmoe.costs import Costs
from mxmoe.devices import Gpu
from mxmoe.kv_cache import KVCache
from small_models import CONFIG, random_ids, write

CONTEXT = 131072
CARD = 80 * 10**9  # what such a card is sold as; an H100's 81559 MiB are 85.5e9


@pytest.mark.parametrize(("size", "gib"), [("20b", 12.8), ("120b", 60.8)])
def test_weights_are_the_checkpoints(size, gib):
    costs = Costs(SIZES[size])
    assert costs.weight_bytes == gpu_models.RandomWeights(SIZES[size], False).nbytes
    assert costs.weight_bytes == pytest.approx(gib * 2**30, rel=5e-3)


@pytest.mark.parametrize(("kv", "left_gb"), [("bf16", 7.8), ("int8", 10.1)])
def test_120b_and_its_whole_context_fit_one_card(kv, left_gb):
    config = SIZES["120b"]
    costs = Costs(config, kv=kv)
    cache = KVCache(config, CONTEXT, dtype=kv, step_tokens=Gpu.step_tokens).nbytes
    # Full layers hold every token, sliding ones their window and a step.
    assert costs.kv_bytes(CONTEXT - 1) < cache < 1.1 * costs.kv_bytes(CONTEXT - 1)
    scratch = costs.gpu_scratch_bytes(Gpu.step_tokens, CONTEXT)
    assert scratch < 2.1e9
    needed = costs.weight_bytes + cache + scratch
    assert CARD - needed == pytest.approx(left_gb * 1e9, abs=0.2e9)
    assert needed + costs.gpu_scratch_bytes(Gpu.step_tokens, 0, Gpu.step_tokens) < CARD  # logits of every token, too


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_model_keeps_to_the_account(emulation, tmp_path, kv):
    cuda.synchronize()
    gc.collect()
    costs, tokens = Costs(CONFIG, kv=kv), 60
    model = mxmoe.load(write(tmp_path / "x"), device="cuda", kv=kv)
    held = emulation.device_bytes()
    cache = model.new_cache(tokens + 20)
    assert emulation.device_bytes() - held == cache.nbytes
    ids = random_ids(tokens)
    room = costs.gpu_scratch_bytes(tokens, tokens + 20, tokens)
    emulation.set_memory_limit(held + cache.nbytes + room)
    logits = model.forward(ids, cache=cache)
    assert np.isfinite(logits).all()
    for i in range(5):
        model.forward(ids[i : i + 1], cache=cache)
    emulation.set_memory_limit(emulation.device_bytes() + 1000)
    with pytest.raises(MemoryError):
        mxmoe.load(model.path, device="cuda", kv=kv).forward(ids)
