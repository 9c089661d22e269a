"""Decoding steps, recorded once and then made again: the bits of the layers, and no step that should not be."""

from __future__ import annotations

import copy
import gc
import itertools
import signal
import time
import weakref

import ml_dtypes
import numpy as np
import pytest

import mxmoe
from compare import assert_exact
from mxmoe import _core, layers, ops
from mxmoe.layers import LowRank
from small_models import CONFIG, MODES, in_chunks, random_ids, write

LAST = "layers.2.residual"  # capturing anything makes the layers run one by one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("replay") / "x")


@pytest.fixture
def model(folder):
    return mxmoe.load(folder, **MODES["bf16"])


class Steps:
    """Decodes the same tokens twice, once as users do and once with somebody watching, and counts calls of layers."""

    def __init__(self, model, prompts, max_tokens=700):
        self.model, self.bodies = model, 0
        self.caches = [model.new_cache(max_tokens, num_sequences=len(prompts)) for _ in range(2)]
        for cache in self.caches:
            for sequence, prompt in enumerate(prompts):
                in_chunks(model, prompt, [], cache, sequence)
        self._body = model.body
        model.body = self._counted

    def _counted(self, *args):
        self.bodies += 1
        return self._body(*args)

    def check(self, seed, sequences=None, recorded=None):
        """Run a step; `recorded` is whether it is expected to need no layer."""
        count = len(self.caches[0].lengths if sequences is None else sequences)
        ids, how = random_ids(count, seed), {"cu_seqlens": range(count + 1), "sequences": sequences}
        before = self.bodies
        got = self.model.forward(ids, cache=self.caches[0], **how)
        ran = self.bodies - before
        want, _ = self.model.forward(ids, cache=self.caches[1], capture=[LAST], **how)
        assert_exact(got, want)
        if recorded is not None:
            assert ran == (0 if recorded else 1)
        return got


@pytest.mark.parametrize(
    ("dense", "kv", "activations"),
    list(itertools.product(("bf16", "int8"), ("float32", "bf16", "int8"), ("float32", "bf16", "int8"))),
)
def test_recorded_steps_give_the_same_bits(folder, dense, kv, activations):
    model = mxmoe.load(folder, dense=dense, kv=kv, activations=activations)
    # From within the window to far past it, and into another block of the cache.
    steps = Steps(model, [random_ids(3, 1), random_ids(250, 2)])
    for i in range(12):
        steps.check(i, recorded=i > 0)


def test_one_sequence_reaches_the_end_of_its_cache(model):
    steps = Steps(model, [random_ids(500)], max_tokens=530)
    for i in range(30):
        steps.check(i, recorded=i > 0)
    with pytest.raises(ValueError, match="530 of 530"):
        model.forward([1], cache=steps.caches[0])


def test_other_sequences_and_their_numbers(model):
    steps = Steps(model, [random_ids(n, n) for n in (5, 30, 7)])
    steps.check(0, [2, 0], recorded=False)
    steps.check(1, [0, 2], recorded=True)
    steps.check(2, [1, 2], recorded=True)
    steps.check(3, [1], recorded=False)
    steps.check(4, [0], recorded=True)
    steps.check(5, recorded=False)
    for cache in steps.caches:
        cache.reset(1)
        in_chunks(model, random_ids(9), [], cache, 1)
    steps.check(6, recorded=True)


def test_many_sequences_call_the_layers(model):
    steps = Steps(model, [random_ids(2, n) for n in range(17)])
    for i in range(3):
        steps.check(i, recorded=False)


def test_prompts_between_steps(model):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    for cache in steps.caches:
        in_chunks(model, random_ids(40), [13], cache)
    steps.check(1, recorded=True)


def test_token_ids_are_checked(model):
    steps = Steps(model, [random_ids(5)])
    for i in range(2):
        with pytest.raises(ValueError, match="wanted 0 to 199"):
            model.forward([200], cache=steps.caches[0])
        steps.check(i)


def test_threads_and_instruction_sets(folder):
    model = mxmoe.load(folder, num_threads=3, **MODES["int8"])
    steps = Steps(model, [random_ids(5)])
    for i in range(3):
        steps.check(i)
    with ops.isa("scalar"):
        steps.check(4, recorded=True)


# What changes what a step does


def test_weights_assigned_anew(model):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    steps.check(1, recorded=True)
    layer = model.layers[1]
    layer.input_layernorm.weight = layer.input_layernorm.weight * np.float32(2)
    steps.check(2, recorded=False)
    steps.check(3, recorded=True)
    layer.mlp.experts.gate_up_scales = layer.mlp.experts.gate_up_scales + np.uint8(1)
    steps.check(4, recorded=False)
    steps.check(5, recorded=True)
    layer.self_attn.k_proj.weight = -layer.self_attn.k_proj.weight
    steps.check(6, recorded=False)
    steps.check(7, recorded=True)
    model.embed_tokens.weight = model.embed_tokens.weight[::-1].copy()
    steps.check(8, recorded=False)


def test_weights_changed_in_place(model):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    steps.check(1, recorded=True)
    norm = model.layers[1].input_layernorm.weight = model.layers[1].input_layernorm.weight.copy()
    steps.check(2)
    steps.check(3, recorded=True)
    norm[:] = norm * np.float32(2)
    steps.check(4, recorded=True)


def test_layers_taken_out_and_exchanged(model):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    steps.check(1, recorded=True)
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]
    steps.check(2, recorded=False)
    steps.check(3, recorded=True)
    model.layers[0] = copy.copy(model.layers[1])
    steps.check(4, recorded=False)


def test_hooks_are_called(model):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    steps.check(1, recorded=True)
    seen = []
    with model.hook("layers.1.router_logits", lambda logits, context: seen.append(int(context.positions[0]))):
        steps.check(2, recorded=False)
    assert seen == [7, 7]
    steps.check(3, recorded=True)


def low_rank(rows, columns, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((4, columns), (rows, 4)))
    return LowRank(ops, (a,), (b,), "bf16")


def test_adapters(model):
    steps = Steps(model, [random_ids(5)])
    without = steps.check(0)
    width = CONFIG.num_attention_heads * CONFIG.head_dim
    model.layers[1].self_attn.o_proj.adapter = low_rank(CONFIG.hidden_size, width, 0)
    steps.check(1, recorded=False)
    steps.check(2, recorded=True)
    # What the experts' begins with is no op.
    model.layers[1].mlp.experts.adapter = low_rank(CONFIG.hidden_size, CONFIG.hidden_size, 1)
    steps.check(3, recorded=False)
    steps.check(4, recorded=False)
    assert not np.array_equal(without, steps.check(0))


class Doubled(layers.RMSNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_layers_of_users_own(model):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    steps.check(1, recorded=True)
    norm = model.layers[2].input_layernorm
    model.layers[2].input_layernorm = Doubled(norm.ops, norm.weight, norm.eps)
    steps.check(2, recorded=False)
    steps.check(3, recorded=False)


def test_a_class_or_an_op_with_something_in_its_place(model, monkeypatch):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    steps.check(1, recorded=True)
    with monkeypatch.context() as patch:
        own = layers.MoE.__call__
        patch.setattr(layers.MoE, "__call__", lambda self, x, *rest: own(self, x + 1, *rest))
        steps.check(2, recorded=False)
        steps.check(3, recorded=False)
    steps.check(4, recorded=False)
    steps.check(5, recorded=True)
    with monkeypatch.context() as patch:
        rmsnorm = ops.rmsnorm
        patch.setattr(ops, "rmsnorm", lambda *args: 2 * rmsnorm(*args))
        steps.check(6, recorded=False)
        steps.check(7, recorded=False)


def test_nothing_is_kept_past_its_cache(model):
    steps = Steps(model, [random_ids(5)])
    steps.check(0)
    weight = model.layers[0].input_layernorm.weight = model.layers[0].input_layernorm.weight.copy()
    steps.check(1)
    kept = weakref.ref(weight)
    model.layers[0].input_layernorm.weight = weight.copy()
    del weight
    assert kept() is not None  # until the next step, or the end of the cache
    steps.caches.clear()
    gc.collect()
    assert kept() is None


# The recording itself


def test_recorded_calls_are_made_again_on_what_arrays_then_hold():
    x, weight, out = np.ones((2, 8), np.float32), np.full(8, 3, np.float32), np.empty((2, 8), np.float32)
    recording = _core.Recording()
    with recording:
        ops.rmsnorm(x, weight, 0.0, out=out)
        with pytest.raises(ValueError, match="weight"):
            ops.rmsnorm(x, weight[:4], 0.0, out=out)  # what fails is not recorded
    ops.rmsnorm(x, weight, 0.0)  # nor what comes later
    assert len(recording) == 1
    x *= -5
    recording.replay()
    assert_exact(out, np.full((2, 8), -3, np.float32))


def test_one_recording_at_a_time():
    recording = _core.Recording()
    with recording:
        with pytest.raises(ValueError, match="recording already"):
            _core.Recording().__enter__()
        with pytest.raises(ValueError, match="still being made"):
            recording.replay()
        ops.rope_cos_sin([1], np.ones(4))
    assert len(recording) == 1


def test_a_signal_ends_a_replay():
    x, weight = np.ones((64, 512), np.float32), np.ones((2048, 512), ml_dtypes.bfloat16)
    recording, begin = _core.Recording(), time.perf_counter()
    with recording:
        while time.perf_counter() < begin + 1:
            ops.linear(x, weight)

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        begin = time.perf_counter()
        with pytest.raises(TimeoutError):
            recording.replay()
        assert time.perf_counter() - begin < 0.5  # half of what it would take; 70 ms when nobody else is there
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
