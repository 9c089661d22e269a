"""Arrays on a GPU: shapes, copies, DLPack, streams, graphs, arenas, uploads, and what goes wrong."""

from __future__ import annotations

import gc
import sys
import types
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from compare import assert_exact
from cuda_helpers import down, poisoned_up, up
from mxmoe import cuda, ops

DTYPES = [np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32, np.int64]
CUDA = 2


def values(shape, dtype=np.float32):
    return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)


class Exporter:
    """Somebody else's array on the GPU, which keeps what it was asked."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array, self.changes, self.asked = array, changes, {}

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.changes.get("device", self.array.__dlpack_device__())

    def __dlpack__(self, **kwargs: Any) -> Any:
        self.asked = kwargs
        if self.changes.get("old") and "max_version" in kwargs:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.changes.get("capsule") or self.array.__dlpack__(**kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5,), (0, 3), (3, 4), (2, 3, 4), (2, 1, 3, 2)])
def test_there_and_back(gpu, dtype, shape):
    x = values(shape, dtype)
    array = cuda.array(x)
    assert (array.shape, array.dtype, array.ndim) == (shape, np.dtype(dtype).name, len(shape))
    assert (array.size, array.nbytes, len(array)) == (x.size, x.nbytes, shape[0])
    assert_exact(array.numpy(), x)
    assert repr(array) == f"DeviceArray(shape={shape}, dtype={np.dtype(dtype).name}, device=0)"


def test_torch_arrays_of_the_host_are_copied_too(gpu):
    x = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert_exact(cuda.array(x).numpy(), values((2, 3), ml_dtypes.bfloat16))


def test_views_share_memory(gpu):
    x = values((4, 6))
    array = cuda.array(x)
    assert_exact(array.reshape(2, -1, 3).numpy(), x.reshape(2, -1, 3))
    assert_exact(array.reshape((24,)).numpy(), x.reshape(24))
    assert_exact(array[1:3].numpy(), x[1:3])
    assert_exact(array[1:, 2:5].numpy(), x[1:, 2:5])
    assert_exact(array[-2:].numpy(), x[-2:])
    array[1:3, 1:2].set(np.full((2, 1), -1, np.float32))
    x[1:3, 1:2] = -1
    assert_exact(array.numpy(), x)
    part = array[2:]
    del array
    gc.collect()
    assert_exact(part.numpy(), x[2:])


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda a: a.reshape(5), ValueError, r"shape \(2, 3\) does not fit into shape \(5,\)"),
        (lambda a: a.reshape(-1, 4), ValueError, "does not fit"),
        (lambda a: a.reshape(-1, -1), ValueError, "at most one -1"),
        (lambda a: a[:, 1:].reshape(4), ValueError, "not contiguous"),
        (lambda a: a[::2], ValueError, "a slice has a step of 2; wanted 1"),
        (lambda a: a[0], TypeError, "indexed by slices alone"),
        (lambda a: a[:, :, :], ValueError, "an array of 2 axes is indexed by 3"),
        (lambda a: a.set(np.zeros((3, 2), np.float32)), ValueError, r"array is float32 of shape \(3, 2\); wanted"),
        (lambda a: a.set(np.zeros((2, 3))), ValueError, "array is float64"),
        (lambda a: cuda.empty((1,) * 5), ValueError, "wanted 1 to 4 axes"),
        (lambda a: cuda.empty((-1,)), ValueError, "wanted sizes of 0 or more"),
        (lambda a: cuda.empty((2**40, 2**40)), ValueError, "more than memory can hold"),
        (lambda a: cuda.empty((2,), "float8"), ValueError, "dtype is 'float8'; wanted float32"),
    ],
)
def test_what_does_not_fit_is_named(gpu, act, error, message):
    with pytest.raises(error, match=message):
        act(cuda.array(values((2, 3))))


def test_no_room_says_how_much_for_what(emulation):
    emulation.set_memory_limit(10 << 20)
    with pytest.raises(MemoryError, match=r"no room for the weights: wanted 16.00 MiB, free 1?\d.\d\d MiB of 10.00"):
        cuda.empty((4 << 20,), "float32", "the weights")
    arena = emulation.Arena(4 << 20, "the model")
    arena.empty([1 << 19], "uint8", "a")
    with pytest.raises(MemoryError, match=r"no room for layer 3 \(the model has 4.00 MiB already\): wanted 9.00 MiB"):
        arena.empty([9 << 20], "uint8", "layer 3")


def test_memory_is_given_back(emulation):
    cuda.synchronize()
    gc.collect()
    before = emulation.device_bytes()
    arrays = [cuda.empty((1000,)) for _ in range(5)]
    assert emulation.device_bytes() == before + 5 * 4000
    del arrays
    cuda.synchronize()  # released in stream order
    assert emulation.device_bytes() == before


@pytest.mark.parametrize("old", [False, True])
def test_dlpack_round_trip(gpu, old):
    x = values((3, 4))
    theirs = Exporter(cuda.array(x), old=old)
    ours = cuda.from_dlpack(theirs)
    assert ours.data_ptr == theirs.array.data_ptr
    assert theirs.asked["stream"] == gpu.current_stream().handle
    del theirs
    gc.collect()
    assert_exact(ours.numpy(), x)
    assert ours.__dlpack_device__() == (CUDA, 0)


def test_ops_take_and_write_others_arrays(gpu):
    x, weight = values((2, 8)), np.ones(8, np.float32)
    out = Exporter(poisoned_up((2, 8)))
    assert ops.rmsnorm(Exporter(up(x)), Exporter(up(weight)), out=out) is out
    assert_exact(down(out.array), down(ops.rmsnorm(up(x), up(weight))))


def test_the_owner_of_an_array_is_ordered_behind_the_op(gpu, monkeypatch):
    x, weight = values((2, 64)) + 1, np.ones(64, np.float32)
    want = down(ops.rmsnorm(up(x), up(weight)))
    owner = gpu.Stream()

    def read_as_owner(array):
        gpu.set_current_stream(owner)
        try:
            return down(array)
        finally:
            gpu.set_current_stream(None)

    # A library that tells its current stream: that stream waits for the op, the host does not.
    library = types.ModuleType("somelib")
    monkeypatch.setitem(sys.modules, "somelib", library)
    monkeypatch.setitem(cuda._CURRENT_STREAM, "somelib", lambda module: owner.handle)
    theirs = type("Tensor", (Exporter,), {"__module__": "somelib.tensors"})
    out = theirs(poisoned_up((2, 64)))
    ops.rmsnorm(up(x), up(weight), out=out)
    assert_exact(read_as_owner(out.array), want)
    # One that does not: the op is waited for.
    out = Exporter(poisoned_up((2, 64)))
    ops.rmsnorm(up(x), up(weight), out=out)
    assert_exact(read_as_owner(out.array), want)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"device": (1, 0)}, ValueError, "array is on DLPack device type 1; wanted an array on a CUDA device"),
        ({"capsule": "no capsule"}, TypeError, "exports something that is no DLPack capsule"),
    ],
)
def test_bad_exports(gpu, changes, error, message):
    with pytest.raises(error, match=message):
        cuda.from_dlpack(Exporter(cuda.array(values((2,))), **changes))


def test_host_arrays_are_not_taken_for_device_arrays(gpu):
    with pytest.raises(ValueError, match="wanted an array on a CUDA device"):
        cuda.from_dlpack(np.zeros(3))
    with pytest.raises(Exception, match=r"[Uu]nsupported device|CPU|device"):
        np.from_dlpack(cuda.array(values((2,))))
    assert not cuda.is_on_gpu(np.zeros(3)) and not cuda.is_on_gpu(torch.zeros(3)) and not cuda.is_on_gpu([1])
    assert cuda.is_on_gpu(cuda.array(values((2,))))


def test_mixed_devices_are_an_error_that_names_the_argument(gpu):
    x, weight = values((2, 8)), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"x is on DLPack device type 2; wanted .* CPU memory"):
        ops.rmsnorm(up(x), weight)
    with pytest.raises(ValueError, match=r"weight is on DLPack device type 2; wanted .* CPU memory"):
        ops.rmsnorm(x, up(weight))
    with pytest.raises(ValueError, match="weight is on DLPack device type 1; wanted an array on a CUDA device"):
        cuda.rmsnorm(up(x), weight)
    with pytest.raises(ValueError, match="weight is on DLPack device type 1; wanted an array on a CUDA device"):
        ops.rmsnorm(up(x), torch.ones(8))


def test_read_only_stays_read_only(gpu):
    array = cuda.array(values((2, 8)))
    array.read_only = True
    taken = cuda.from_dlpack(array)
    assert taken.read_only
    for a in (array, taken):
        with pytest.raises(ValueError, match="read-only"):
            a.set(np.zeros((2, 8), np.float32))
        with pytest.raises(ValueError, match="out is read-only"):
            cuda.rmsnorm(cuda.array(values((2, 8))), cuda.array(values((8,))), out=a)
    with pytest.raises(ValueError, match="from version 1 on only"):
        array.__dlpack__(stream=-1)


def test_dlpack_keywords(gpu):
    array = cuda.array(values((2,)))
    for stream in (None, -1, 1, 2, gpu.current_stream().handle):
        array.__dlpack__(stream=stream, max_version=(1, 0), dl_device=(CUDA, 0), copy=False)
    with pytest.raises(ValueError, match="stream is 0"):
        array.__dlpack__(stream=0)
    with pytest.raises(ValueError, match=r"dl_device is \(1, 0\)"):
        array.__dlpack__(dl_device=(1, 0))
    with pytest.raises(ValueError, match="copy is True"):
        array.__dlpack__(copy=True)


def test_an_importer_is_ordered_behind_the_producer(gpu):
    x, weight = up(values((1, 64)) + 1), up(np.ones(64, np.float32))
    out = poisoned_up((1, 64))
    want = down(ops.rmsnorm(x, weight))
    producer, consumer = gpu.current_stream(), gpu.Stream()
    ops.rmsnorm(x, weight, out=out)
    # The consumer's number goes to __dlpack__ of an array whose values are still on their way.
    capsule = out.__dlpack__(stream=consumer.handle)
    gpu.set_current_stream(consumer)
    try:
        assert_exact(cuda.from_dlpack(Exporter(out, capsule=capsule)).numpy(), want)
    finally:
        gpu.set_current_stream(None)
    assert gpu.current_stream().handle == producer.handle


def test_graphs_replay_on_what_the_arrays_hold_then(gpu):
    x, weight, table = up(values((2, 64))), up(np.ones((5, 64), ml_dtypes.bfloat16)), up(np.ones(64, np.float32))
    h, y = poisoned_up((2, 64)), poisoned_up((2, 5))
    cuda.linear(h, weight, out=y)
    with cuda.graph() as step:
        cuda.rmsnorm(x, table, out=h)
        cuda.linear(h, weight, out=y)
    assert step.num_nodes == 2
    for seed in range(3):
        new = np.random.default_rng(seed).standard_normal((2, 64)).astype(np.float32)
        x.set(new)
        y.set(np.full((2, 5), np.nan, np.float32))
        step.replay()
        assert_exact(down(y), down(cuda.linear(cuda.rmsnorm(up(new), table), weight)))


def test_what_a_graph_cannot_hold_is_refused(gpu):
    x, weight = up(values((2, 64))), up(np.ones(64, np.float32))
    out = poisoned_up((2, 64))
    for forbidden, message in (
        (lambda: cuda.rmsnorm(x, weight), "cannot be allocated while a graph is captured"),
        (lambda: x.numpy(), "cannot be read while a graph is captured"),
        (lambda: x.set(values((2, 64))), "cannot be filled while a graph is captured"),
    ):
        with pytest.raises(ValueError, match=message), cuda.graph():
            forbidden()
    cuda.rmsnorm(x, weight, out=out)  # the stream works on
    assert np.isfinite(down(out)).all()
    unfinished = gpu.Graph()
    with pytest.raises(ValueError, match="holds nothing"):
        unfinished.replay()


def test_a_workspace_does_not_grow_in_a_capture(emulation):
    fresh = emulation.Stream()
    emulation.set_current_stream(fresh)
    try:
        x, weight = up(values((70, 64))), up(np.ones((5, 64), ml_dtypes.bfloat16))
        out = poisoned_up((70, 5))
        with pytest.raises(ValueError, match="run the same once before"), cuda.graph():
            cuda.linear(x, weight, out=out)
        cuda.linear(x, weight, out=out)
        with cuda.graph() as step:
            cuda.linear(x, weight, out=out)
        want = down(out)
        out.set(np.full((70, 5), np.nan, np.float32))
        # A later op grows the workspace; the graph keeps the one it knows.
        cuda.linear(up(np.zeros((3000, 640), np.float32)), up(np.ones((1, 640), ml_dtypes.bfloat16)))
        step.replay()
        assert_exact(down(out), want)
    finally:
        emulation.set_current_stream(None)


@pytest.mark.parametrize("buffer_bytes", [1, 7, 64, 4096])
def test_uploads_in_pieces(gpu, buffer_bytes):
    x = np.random.default_rng(0).integers(0, 256, (40, 25), dtype=np.uint8)
    x.flags.writeable = False  # as a mapped checkpoint is
    array = poisoned_up(x.shape, np.uint8)
    uploader = gpu.Uploader(buffer_bytes)
    uploader.copy(array, x)
    assert_exact(down(array), x)
    source = x.copy()
    uploader.copy(array[:20], source[20:])
    source[:] = 0  # the source may change at once
    assert_exact(down(array), np.concatenate([x[20:], x[20:]]))


def test_uploads_are_checked(gpu):
    array, uploader = cuda.array(values((4, 4))), gpu.Uploader(64)
    with pytest.raises(ValueError, match="array is float32 of shape"):
        uploader.copy(array, values((2, 2)))
    with pytest.raises(ValueError, match="to is not contiguous"):
        uploader.copy(array[:, :2], values((4, 2)))
    with pytest.raises(ValueError, match="array is not contiguous"):
        uploader.copy(array, values((4, 8))[:, :4])
    with pytest.raises(ValueError, match="buffer_bytes is 0"):
        gpu.Uploader(0)


def test_arenas_hand_out_pieces_that_live_as_long_as_any(gpu):
    arena = gpu.Arena(10_000, "test")
    arrays = [arena.empty([n], "float32", f"piece {n}") for n in (1, 100, 64, 3000, 0)]
    assert arena.used_bytes == 4 * (1 + 100 + 64 + 3000)
    assert arena.allocated_bytes >= arena.used_bytes
    assert all(array.data_ptr % 256 == 0 for array in arrays)
    spans = sorted((a.data_ptr, a.data_ptr + a.nbytes) for a in arrays)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    for i, array in enumerate(arrays):
        array.set(np.full(array.shape, i, np.float32))
    del arena
    gc.collect()
    assert all((down(array) == i).all() for i, array in enumerate(arrays))


def test_large_pieces_leave_no_chunk_half_empty(gpu):
    arena = gpu.Arena(64 << 10, "test")
    sizes = [1000, 90 << 10, 1000, 20 << 10, 1000] * 4
    arrays = [arena.empty([n], "uint8", "a piece") for n in sizes]
    assert arena.allocated_bytes < sum(sizes) + (64 << 10) + 8 * 512
    spans = sorted((a.data_ptr, a.data_ptr + a.nbytes) for a in arrays)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_copies_are_contiguous_and_their_own(gpu):
    x = values((5, 6))
    array = cuda.array(x)
    part, whole = array[1:4, 2:5].copy(), array.copy()
    array.set(np.zeros_like(x))
    assert part.shape == (3, 3)
    assert part.dtype == "float32"
    assert_exact(down(part), x[1:4, 2:5])
    assert_exact(down(whole), x)
    assert cuda.empty((0, 4)).copy().shape == (0, 4)


def test_a_pool_takes_back_what_it_gave(gpu):
    pool = gpu.Pool()
    with cuda.pooled(pool):
        first, second = cuda.empty((100,), "float32"), cuda.empty((100,), "float32")
        place = first.data_ptr
        view = first[10:20]
        del first
        assert cuda.empty((100,), "float32").data_ptr != place  # the view still holds it
        del view
        assert cuda.empty((90,), "float32").data_ptr == place
        assert second.data_ptr != place
        held = pool.allocated_bytes
        for _ in range(5):
            cuda.rmsnorm(cuda.rmsnorm(second.reshape(1, 100), second), second)
        assert 0 < held == pool.allocated_bytes
    assert cuda.empty((90,), "float32").data_ptr != place


def test_what_ran_in_a_pool_can_be_captured(gpu):
    pool, x, weight = gpu.Pool(), up(values((3, 64))), up(np.ones(64, np.float32))

    def run():
        with cuda.pooled(pool):
            return cuda.rmsnorm(cuda.rmsnorm(cuda.rmsnorm(x, weight), weight), weight)

    want = down(run())
    with cuda.graph() as graph:
        y = run()
    x.set(2 * values((3, 64)))
    graph.replay()
    np.testing.assert_allclose(down(y), want, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot be allocated while a graph is captured"), cuda.graph():
        more = [run() for _ in range(3)]  # noqa: F841 - the pool has not as many


def test_work_on_another_stream_stands_in_order(gpu):
    x, y = up(values((4, 256))), poisoned_up((4, 256))
    stream = gpu.Stream()
    before = gpu.current_stream().handle
    with cuda.on_stream(stream):
        assert gpu.current_stream().handle == stream.handle != before
        cuda.rmsnorm(x, up(np.ones(256, np.float32)), out=y)
    assert gpu.current_stream().handle == before
    assert np.isfinite(down(y)).all()
    with pytest.raises(ZeroDivisionError), cuda.on_stream(stream):
        raise ZeroDivisionError
    assert gpu.current_stream().handle == before


def test_events_measure_time(gpu):
    before, after = gpu.Event(), gpu.Event()
    before.record()
    cuda.rmsnorm(up(values((2, 64))), up(np.ones(64, np.float32)))
    after.record()
    after.synchronize()
    assert 0 <= after.milliseconds_since(before) < 60_000


def test_a_device_that_is_not_there(gpu):
    with pytest.raises(ValueError, match="device is 99; wanted 0 to"):
        gpu.Stream(99)
