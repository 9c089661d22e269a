"""Where a model's arrays live, and how they get there and back: the host's memory or a GPU's.

Layers know nothing of it: they call the ops of their device on that device's arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe import cuda, ops
from mxmoe.memory import zeros

__all__ = ["HOST", "Device", "Gpu", "Host"]

Array = Any  # of the device's kind
HostArray = NDArray[Any]


class Device(ABC):
    """What a model asks of the place where its arrays are.

    Attributes
    ----------
    name : str
        As `mxmoe.load` takes it.
    ops : module
        The functions of `mxmoe.ops` for the device's arrays.
    host_ops : module
        The same for arrays of the host.
    step_tokens : int
        New tokens that pass through the layers at a time.
    """

    name: str
    ops: ModuleType
    host_ops: ModuleType
    step_tokens: int

    @abstractmethod
    def put(self, array: HostArray, what: str = "an array") -> Array:
        """Bring an array of the host to the device; `what` it is, where there is no room."""

    @abstractmethod
    def get(self, array: Array) -> HostArray:
        """Bring an array to the host; there it is the array itself."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: Any, what: str = "an array") -> Array:
        """Make an array of any content."""

    @abstractmethod
    def together(self, arrays: Sequence[tuple[Sequence[int], Any]], what: str) -> list[Array]:
        """Make arrays (shape and dtype each) of any content that live and die together."""

    @abstractmethod
    def threads(self, count: int) -> AbstractContextManager[None]:
        """Run what follows on so many threads of the host; 0 for all CPUs."""


class Host(Device):
    """The CPU's memory: NumPy arrays.

    Parameters
    ----------
    ops : module
        `mxmoe.ops` or `mxmoe.reference.ops`.
    """

    name = "cpu"
    # Enough to use every weight tile many times, few enough that the experts' working memory stays around 100 MB at
    # gpt-oss's sizes.
    step_tokens = 512

    def __init__(self, ops: ModuleType) -> None:
        self.ops = self.host_ops = ops

    def put(self, array: HostArray, what: str = "an array") -> HostArray:
        """Return the array."""
        return array

    def get(self, array: HostArray) -> HostArray:
        """Return the array."""
        return array

    def empty(self, shape: Sequence[int], dtype: Any, what: str = "an array") -> HostArray:
        """Make an array of zeros: memory that the system hands out when it is first written."""
        return np.zeros(shape, dtype)

    def together(self, arrays: Sequence[tuple[Sequence[int], Any]], what: str) -> list[HostArray]:
        """Make arrays of zeros, large ones in huge pages; they take memory as they are first written."""
        return zeros(arrays, what)

    def threads(self, count: int) -> AbstractContextManager[None]:
        """Set the number of the kernels' threads for a ``with`` block."""
        return nullcontext() if self.ops is not ops else ops.num_threads(count)


class Gpu(Device):
    """An NVIDIA GPU's memory: arrays of `mxmoe.cuda`.

    Parameters
    ----------
    weight_bytes : int
        How much the model's weights will take.

    Raises
    ------
    RuntimeError
        There is none that mxmoe can run on; says what is missing.
    """

    name = "cuda"
    host_ops = ops  # before the name is another's
    ops = cuda
    # Enough for each of 128 experts to get work, and logits of all of them still fit beside a large model.
    step_tokens = 2048

    def __init__(self, weight_bytes: int) -> None:
        if problem := cuda.problem():
            raise RuntimeError(f"device is 'cuda', but this machine cannot run there: {problem}")
        # Weights live and die together. What is small shares chunks, the last of which may stay half empty.
        chunk_bytes = min(64 << 20, max(64 << 10, weight_bytes // 64))
        self._arena = cuda.extension().Arena(chunk_bytes, "the model")
        self._uploader: Any = None

    def put(self, array: HostArray, what: str = "an array") -> Array:
        """Copy an array to the GPU."""
        return cuda.array(np.ascontiguousarray(array), what)

    def put_weight(self, array: HostArray, what: str) -> Array:
        """Copy a weight to where the model's are, from the mapped file by way of two small buffers."""
        if cuda.is_on_gpu(array):
            weight = self._arena.empty(array.shape, str(array.dtype), what)
            weight.set(array)
            return weight
        if self._uploader is None:
            self._uploader = cuda.extension().Uploader()
        array = np.ascontiguousarray(array)
        weight = self._arena.empty(array.shape, array.dtype.name, what)
        self._uploader.copy(weight, array)
        return weight

    def finish_weights(self) -> None:
        """Wait until all weights are there, and give back the buffers."""
        cuda.synchronize()
        self._uploader = None

    def get(self, array: Array) -> HostArray:
        """Wait for an array and copy it to the host."""
        copy: HostArray = array.numpy()
        return copy

    def empty(self, shape: Sequence[int], dtype: Any, what: str = "an array") -> Array:
        """Make an uninitialised array."""
        return cuda.empty(shape, dtype if isinstance(dtype, str) else np.dtype(dtype).name, what)

    def together(self, arrays: Sequence[tuple[Sequence[int], Any]], what: str) -> list[Array]:
        """Make uninitialised arrays."""
        return [self.empty(shape, dtype, what) for shape, dtype in arrays]

    def threads(self, count: int) -> AbstractContextManager[None]:
        """Do nothing: the host only launches."""
        return nullcontext()


HOST = Host(ops)
