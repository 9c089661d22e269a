"""Arrays of every kind in and out, and one clear error for every array that does not fit."""

from __future__ import annotations

import array
import re
import sys

import numpy as np
import pytest
import torch

import op_calls
from compare import assert_exact
from mxmoe import _core, ops
from op_helpers import BF16, to_torch

ARGUMENTS = [(name, argument) for name in op_calls.NAMES for argument in op_calls.make(name).arrays]
every_argument = pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
every_op = pytest.mark.parametrize("name", op_calls.NAMES)


class Device:
    """Something that claims to lie in CUDA memory; whoever asks for its data has not looked at that."""

    shape, dtype = (4, 6), np.dtype(np.float32)

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **kwargs):
        raise AssertionError("data in device memory was asked for")


class Producer:
    """A bare DLPack exporter, of today's protocol or of the one before 1.0."""

    def __init__(self, source, versioned=True):
        self.source, self.versioned = source, versioned

    def __dlpack_device__(self):
        return self.source.__dlpack_device__()

    def __dlpack__(self, **kwargs):
        if self.versioned:
            return self.source.__dlpack__(**kwargs)
        if kwargs:
            raise TypeError(f"__dlpack__() got unexpected keywords {sorted(kwargs)}")
        return self.source.__dlpack__()


def rejects(call, argument, value, error, message):
    """The call fails, names the argument, says what came and what was wanted, and has written nothing."""
    before = {name: a.tobytes() for name, a in call.arrays.items()}
    with pytest.raises(error) as raised:
        call(**{argument: value})
    text = str(raised.value)
    assert re.match(rf"{argument}\b", text) and re.search(message, text), text
    assert {name: a.tobytes() for name, a in call.arrays.items()} == before


def stepped(source, axis):
    """The same values with every second place of one axis between them."""
    memory = np.zeros([n * 2 if i == axis else n for i, n in enumerate(source.shape)], source.dtype)
    view = memory[tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(source.ndim))]
    view[...] = source
    return view


def misaligned(source):
    raw = np.zeros(source.nbytes + 1, np.uint8)[1:].view(source.dtype).reshape(source.shape)
    raw[...] = source
    return raw


@every_op
def test_valid_calls_are_valid(name):
    call = op_calls.make(name)
    for got, again in zip(call.result(), op_calls.make(name).result(), strict=True):
        assert_exact(got, again)
    assert any(
        np.any(out != op_calls.make(name).arrays[o]) for o, out in zip(call.outputs, call.result(), strict=True)
    )


@every_argument
def test_no_array(name, argument):
    call = op_calls.make(name)
    for value in (call.arrays[argument].tolist(), "text", 3.5, object()):
        rejects(call, argument, value, TypeError, "is of type .*; wanted an array")
    made_when_missing = argument == "out" and name != "mxfp4_dequantize"
    missing_in_other_words = argument in ("k_scales", "v_scales") or (
        name.startswith("linear") and argument == "scales"
    )
    if argument not in call.optional and not made_when_missing and not missing_in_other_words:
        rejects(call, argument, None, TypeError, "is None; wanted an array")


@every_argument
def test_wrong_dtype(name, argument):
    call = op_calls.make(name)
    source = call.arrays[argument]
    for dtype in {np.int64, np.float64} - {source.dtype.type}:  # known, but not here
        rejects(call, argument, np.ones(source.shape, dtype), TypeError, rf"has dtype {np.dtype(dtype)}; wanted")
    for dtype in (np.float16, np.int16, np.uint32, np.bool_, np.complex64, object, "U3", "M8[s]", [("a", "f4")]):
        rejects(call, argument, np.ones(source.shape, bool).astype(dtype), TypeError, "has dtype .*; wanted")


@every_argument
def test_wrong_byte_order(name, argument):
    source = op_calls.make(name).arrays[argument]
    if source.dtype.itemsize == 1 or source.dtype == BF16:  # has none, or no other in NumPy
        assert source.dtype.byteorder == "|" or source.dtype == BF16
        return
    swapped = source.astype(source.dtype.newbyteorder(">"))
    rejects(op_calls.make(name), argument, swapped, TypeError, "has dtype >.*; wanted .* in native byte order")


@every_argument
def test_wrong_number_of_axes(name, argument):
    call = op_calls.make(name)
    source = call.arrays[argument]
    rejects(call, argument, source.reshape(-1)[0:1].reshape(()), ValueError, "has no axes")
    if source.ndim < 4:
        rejects(call, argument, source[..., None], ValueError, "has shape .*; wanted")
    rejects(call, argument, source.reshape(source.shape + (1,) * (5 - source.ndim)), ValueError, "has 5 axes")
    if source.ndim > 1:
        rejects(call, argument, source[0], ValueError, "has shape .*; wanted")


@every_argument
def test_wrong_shape(name, argument):
    call = op_calls.make(name)
    source = call.arrays[argument]
    free = {("sink_attention", "block_table"): 1, ("embedding", "weight"): 0, ("expert_routing", "router_logits"): 1}
    for axis in set(range(source.ndim)) - {free.get((name.split()[0], argument))}:
        with pytest.raises(ValueError) as raised:
            call(**{argument: np.concatenate([source, source], axis=axis)})
        # It is the other arrays that may be said not to fit.
        named = str(raised.value).split()[0]
        assert named.split("[")[0] in call.arrays and "; wanted" in str(raised.value), str(raised.value)


@every_argument
def test_wrong_strides(name, argument):
    call = op_calls.make(name)
    source = call.arrays[argument]
    rejects(
        call, argument, stepped(source, source.ndim - 1), ValueError, "has a stride of 2 elements on its last axis"
    )
    turned = np.ascontiguousarray(source[::-1])[::-1]
    rejects(call, argument, turned, ValueError, r"has a stride of -\d+ bytes on axis 0; wanted a non-negative")
    # Rows or tokens may lie apart where the op says so (and its own tests show it); nothing else may.
    apart = {"x", "out", "q", "k", "v", "weight", "residual", "router_logits"}
    if name.startswith("linear"):
        apart.add("scales")
    if name.startswith("sink_attention") and source.ndim == 4 and source.dtype != np.int8:
        return  # any multiple of head_dim will do
    for axis in range(1 if argument in apart else 0, source.ndim - 1):
        rejects(call, argument, stepped(source, axis), ValueError, "stride|not contiguous")


@every_argument
def test_misaligned(name, argument):
    call = op_calls.make(name)
    source = call.arrays[argument]
    if source.dtype.itemsize == 1:  # any address will do
        assert_exact(np.array(call.result()[0]), replace_argument(call, argument, misaligned(source)).result()[0])
        return
    rejects(call, argument, misaligned(source), ValueError, f"is not aligned to its items of {source.dtype.itemsize}")


def replace_argument(call, argument, value):
    call.arrays[argument] = value
    return call


@every_argument
def test_wrong_device(name, argument):
    rejects(op_calls.make(name), argument, Device(), ValueError, "is on DLPack device type 2; wanted .* CPU memory")


@every_op
def test_read_only_outputs_and_inputs(name):
    call = op_calls.make(name)
    want = call.result()
    for argument, source in call.arrays.items():
        source.setflags(write=False)
        if argument in call.outputs:
            rejects(call, argument, source, ValueError, "is read-only; wanted a writable array")
            source.setflags(write=True)
    for got, expected in zip(call.result(), want, strict=True):
        assert_exact(got, expected)


@every_op
def test_outputs_share_no_memory_with_anything(name):
    for out in op_calls.make(name).outputs:
        for other in op_calls.make(name).arrays:
            call = op_calls.make(name)
            if other == out:
                continue
            source, target = call.arrays[other], call.arrays[out]
            shift = 8 if source.nbytes > 8 else 0
            memory = np.zeros(max(source.nbytes, target.nbytes + shift), np.uint8)
            inside = memory[: source.nbytes].view(source.dtype).reshape(source.shape)
            inside[...] = source
            overlapping = memory[shift : shift + target.nbytes].view(target.dtype).reshape(target.shape)
            before = memory.tobytes()
            with pytest.raises(ValueError, match=r"shares memory with .*; wanted separate arrays") as raised:
                call(**{other: inside, out: overlapping})
            assert out in str(raised.value) and other in str(raised.value)
            assert memory.tobytes() == before


@every_op
def test_rows_of_an_output_do_not_overlap(name):
    call = op_calls.make(name)
    for out in call.outputs:
        target = call.arrays[out]
        if target.ndim < 2:
            continue
        folded = np.lib.stride_tricks.as_strided(
            np.zeros(target.size, target.dtype), target.shape, (0, *target.strides[1:])
        )
        rejects(call, out, folded, ValueError, "has a stride of 0 elements on axis 0; wanted at least")


@every_op
def test_torch_in_and_out(name):
    call = op_calls.make(name)
    want = call.result()
    tensors = {key: to_torch(source) for key, source in op_calls.make(name).arrays.items()}
    call(**tensors)
    for out, expected in zip(call.outputs, want, strict=True):
        assert_exact(tensors[out], expected)


@pytest.mark.parametrize("versioned", [True, False])
@every_op
def test_any_dlpack_exporter(name, versioned):
    call = op_calls.make(name)
    want = call.result()
    fresh = op_calls.make(name).arrays
    # NumPy does not export bfloat16; torch does.
    sources = {key: to_torch(source) if source.dtype == BF16 else source for key, source in fresh.items()}
    call(**{key: Producer(source, versioned) for key, source in sources.items()})
    for out, expected in zip(call.outputs, want, strict=True):
        assert_exact(sources[out], expected)


@every_op
def test_read_only_exporters(name):
    call = op_calls.make(name)
    want = call.result()
    for argument, source in call.arrays.items():
        if source.dtype == BF16:
            continue
        source.setflags(write=False)
        if argument in call.outputs:
            rejects(call, argument, Producer(source), ValueError, "is read-only; wanted a writable array")
            source.setflags(write=True)
        else:
            call(**{argument: Producer(source)})
    for out, expected in zip(call.outputs, want, strict=True):
        assert_exact(call.arrays[out], expected)


def test_results_are_of_the_kind_of_the_first_array():
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    assert type(ops.rmsnorm(x, weight)) is np.ndarray
    assert type(ops.rmsnorm(memoryview(x), to_torch(weight))) is np.ndarray
    for dtype in (torch.float32, torch.bfloat16):
        got = ops.rmsnorm(to_torch(x).to(dtype), weight)
        assert isinstance(got, torch.Tensor) and got.dtype == dtype
    assert ops.rmsnorm(x.astype(BF16), weight).dtype == BF16
    assert ops.rmsnorm(Producer(x), weight).dtype == np.float32
    assert ops.rmsnorm(Producer(to_torch(x.astype(BF16))), weight).dtype == BF16
    ids, weights = ops.expert_routing(to_torch(x), 2)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert isinstance(ops.linear(to_torch(x), np.ones((3, 8), BF16)), torch.Tensor)
    blocks, scales = ops.mxfp4_quantize(torch.ones(2, 3, 64, dtype=torch.bfloat16))
    assert blocks.shape == (2, 3, 2, 16) and isinstance(scales, torch.Tensor)
    assert ops.mxfp4_dequantize(blocks, scales, dtype="bfloat16").dtype == torch.bfloat16


def test_buffers():
    weight = np.ones(6, np.float32)
    x = np.random.default_rng(0).standard_normal((2, 6), np.float32)
    want = ops.rmsnorm(x, weight)
    assert_exact(ops.rmsnorm(memoryview(x), memoryview(weight)), want)
    assert_exact(ops.rmsnorm(memoryview(x.tobytes()).cast("f", (2, 6)), array.array("f", weight)), want)
    out = array.array("f", bytes(48))
    ops.rmsnorm(x, weight, out=memoryview(out).cast("B").cast("f", (2, 6)))
    assert_exact(np.array(out, np.float32).reshape(2, 6), want)
    with pytest.raises(ValueError, match="out is read-only"):
        ops.rmsnorm(x, weight, out=memoryview(bytes(48)).cast("f", (2, 6)))
    with pytest.raises(TypeError, match="weight has dtype float64; wanted float32 or bfloat16"):
        ops.rmsnorm(x, array.array("d", weight))
    blocks, scales = ops.mxfp4_quantize(np.ones((2, 3, 32), np.float32))
    assert_exact(ops.mxfp4_dequantize(memoryview(blocks), Producer(scales)), np.ones((2, 3, 32), np.float32))


def test_torch_rows_apart_and_transposed():
    x, weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    assert_exact(ops.rmsnorm(x[::2, 4:12], weight), ops.rmsnorm(x[::2, 4:12].contiguous(), weight))
    with pytest.raises(ValueError, match="x has a stride of 16 elements on its last axis"):
        ops.rmsnorm(x.T[:, :], torch.ones(6))
    with pytest.raises(ValueError, match="out has a stride of 0 elements on axis 0"):
        ops.rmsnorm(x[:, :8], weight, out=torch.zeros(1, 8).expand(6, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, 8, requires_grad=True), "x cannot be read through DLPack: .*gradient"),
        (lambda: torch.ones(2, 8, device="meta"), "x cannot be read through DLPack"),
        (lambda: torch.ones(2, 8).to_sparse(), "x cannot be read through DLPack"),
    ],
)
def test_tensors_that_torch_does_not_hand_out(make, message):
    with pytest.raises(ValueError, match=message):
        ops.rmsnorm(make(), np.ones(8, np.float32))


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        (dict(__dlpack_device__=lambda s: None), TypeError, "x names no DLPack device; wanted a pair"),
        (dict(__dlpack_device__=lambda s: (1, 0, 0)), TypeError, "x names no DLPack device"),
        (dict(__dlpack_device__=lambda s: ("cpu", 0)), ValueError, "x cannot be read through DLPack"),
        (dict(__dlpack__=lambda s, **k: "capsule"), TypeError, "x exports something that is no DLPack capsule"),
        (dict(__dlpack__=lambda s: 1 / 0), ValueError, "x cannot be read through DLPack: division by zero"),
        (dict(__dlpack__=lambda s, a, b: 0), ValueError, "x cannot be read through DLPack: .*missing"),
    ],
)
def test_exporters_that_break_the_protocol(methods, error, message):
    complete = dict(__dlpack_device__=lambda s: (1, 0), __dlpack__=lambda s, **k: None) | methods
    broken = type("Broken", (), complete)()
    with pytest.raises(error, match=message):
        ops.rmsnorm(broken, np.ones(8, np.float32))
    with pytest.raises(error, match=message.replace("x ", "out ", 1)):
        ops.rmsnorm(np.ones((2, 8), np.float32), np.ones(8, np.float32), out=broken)


def test_an_interrupt_is_no_argument_error():
    def interrupted(self, **kwargs):
        raise KeyboardInterrupt

    exporter = type("E", (), {"__dlpack_device__": lambda s: (1, 0), "__dlpack__": interrupted})()
    with pytest.raises(KeyboardInterrupt):
        ops.rmsnorm(exporter, np.ones(8, np.float32))


def test_exports_are_held_for_the_call_only():
    class Counted(Producer):
        held = 0

        def __dlpack__(self, **kwargs):
            type(self).held += 1
            return super().__dlpack__(**kwargs)

    x = np.ones((2, 8), np.float32)
    before = sys.getrefcount(x)
    exporter = Counted(x)
    out = ops.rmsnorm(exporter, np.ones(8, np.float32), out=np.empty_like(x))
    assert Counted.held == 1 and sys.getrefcount(x) == before + 1
    del exporter
    assert sys.getrefcount(x) == before and np.isfinite(out).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.rmsnorm(np.ones((2, 8), np.float32), np.ones(8, np.float32), "eps"),
        lambda: ops.rmsnorm(np.ones((2, 8), np.float32), np.ones(8, np.float32), None),
        lambda: ops.expert_routing(np.ones((2, 8), np.float32), 2.5),
        lambda: ops.expert_offsets(np.zeros((2, 1), np.int32), "5"),
        lambda: ops.linear(np.ones((2, 8), np.float32), np.ones((3, 8), BF16), activations=3),
        lambda: ops.rope_inv_freq(64.5, 1e4),
    ],
)
def test_options_of_the_wrong_type(call):
    with pytest.raises(TypeError):
        call()


def test_sizes_beyond_any_memory():
    # Rows repeated without memory behind them: a size must be refused, not wrapped around.
    rows = np.lib.stride_tricks.as_strided(np.zeros(32, np.float32), (2**55, 32), (0, 4), writeable=False)
    with pytest.raises(ValueError):
        ops.linear(rows, np.zeros((64, 32), BF16))
    table = np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), (2**40, 1), (0, 4), writeable=False)
    with pytest.raises(ValueError, match="topk_ids is not contiguous"):
        _core.expert_offsets(table, 3, np.zeros(4, np.int32), np.zeros(8, np.int32))
