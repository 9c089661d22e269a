"""A paged cache of keys and values for many sequences.

Keys and values live in blocks of a fixed number of tokens. Full-attention layers keep every block of a sequence;
sliding layers give a block back as soon as the window has moved past it. Layers of the same kind share one block
table, because they hold the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from mxmoe.config import ModelConfig
from mxmoe.devices import HOST, Device

__all__ = ["KVCache", "LayerCache", "Pages"]

Array = Any  # of the cache's device
KVDtype = Literal["float32", "bf16", "int8", "float64"]

_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "float64": np.float64,  # the reference backend's own
}


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes
    ----------
    k, v : (num_blocks, num_key_value_heads, block_size, head_dim) of the cache's dtype
    k_scales, v_scales : (num_blocks, num_key_value_heads, block_size) float32, or None unless int8
    """

    k: Array
    v: Array
    k_scales: Array | None
    v_scales: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(a.nbytes for a in (self.k, self.v, self.k_scales, self.v_scales) if a is not None)


@dataclass(frozen=True)
class Pages:
    """Where the new tokens of a step go, and where each sequence's keys are, for one kind of layer.

    Attributes
    ----------
    slots : (num_tokens,) int64
    block_table : (num_sequences, max_blocks) int32
    """

    slots: Array
    block_table: Array


class _Pool:
    """The blocks of all layers of one kind: which are free, and which hold what of which sequence."""

    def __init__(self, num_sequences: int, blocks_per_sequence: int, max_blocks: int, block_size: int) -> None:
        self.num_blocks = num_sequences * blocks_per_sequence
        self.block_size = block_size
        self.table = np.full((num_sequences, max_blocks), -1, np.int32)
        self._first = [0] * num_sequences  # block of each sequence that may be held
        # Taken from the end: what was given back last is still warm.
        self._free = list(range(self.num_blocks))[::-1]

    def extend(self, sequence: int, begin: int, end: int) -> None:
        """Make room for the positions from `begin` to `end` of a sequence."""
        for block in range(begin // self.block_size, -(-end // self.block_size)):
            if self.table[sequence, block] < 0:
                self.table[sequence, block] = self._free.pop()

    def release(self, sequence: int, below: int) -> None:
        """Take back the blocks of a sequence that hold only positions under `below`."""
        begin, end = self._first[sequence], below // self.block_size
        if end <= begin:
            return
        row = self.table[sequence, begin:end]
        self._free.extend(int(block) for block in row[row >= 0])
        row[:] = -1
        self._first[sequence] = end

    def clear(self, sequence: int) -> None:
        """Take back all blocks of a sequence."""
        self.release(sequence, self.table.shape[1] * self.block_size)
        self._first[sequence] = 0

    def slots(self, sequence: int, begin: int, end: int) -> list[int]:
        """Where the positions from `begin` to `end` of a sequence go."""
        if end == begin + 1:  # a decoding step, in which NumPy would take longer
            return [int(self.table[sequence, begin // self.block_size]) * self.block_size + begin % self.block_size]
        positions = np.arange(begin, end)
        blocks = self.table[sequence, positions // self.block_size].astype(np.int64)
        slots: list[int] = (blocks * self.block_size + positions % self.block_size).tolist()
        return slots


class KVCache:
    """Keys and values of up to `num_sequences` sequences of up to `max_tokens` tokens each.

    Memory of the host is taken as it is first written, so a long `max_tokens` costs nothing until it is used; a
    GPU's is taken at once. Sliding layers never hold more than their window and one step's new tokens.

    Parameters
    ----------
    config : ModelConfig
    max_tokens : int
        Tokens a sequence may reach; at most ``config.max_position_embeddings``.
    num_sequences : int
    dtype : {"bf16", "float32", "int8"}
        int8 keeps one float32 scale for each token and head. ("float64" is for the reference backend.)
    block_size : int
        Tokens in a block: long enough that a head's keys are long runs of memory.
    step_tokens : int
        The most new tokens of one sequence in one step.
    device : Device
        Where keys and values lie; tables and lengths are the host's.

    Attributes
    ----------
    changes : int
        Calls so far that changed what the cache holds or is about to hold.

    Raises
    ------
    ValueError, TypeError
        When a parameter is out of range or no whole number.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_tokens: int,
        *,
        num_sequences: int = 1,
        dtype: KVDtype = "bf16",
        block_size: int = 256,
        step_tokens: int = 512,
        device: Device = HOST,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"kv is {dtype!r}; wanted 'float32', 'bf16' or 'int8'")
        sizes = {"num_sequences": num_sequences, "block_size": block_size, "step_tokens": step_tokens}
        for name, value in {"max_tokens": max_tokens, **sizes}.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} is {value!r}; wanted a whole number")
        if not 1 <= max_tokens <= config.max_position_embeddings:
            raise ValueError(
                f"max_tokens is {max_tokens}; wanted 1 to the model's context of {config.max_position_embeddings}"
            )
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; wanted 1 or more")
        self.config, self.max_tokens, self.dtype = config, max_tokens, dtype
        self.num_sequences, self.block_size, self.step_tokens = num_sequences, block_size, step_tokens
        self.device = device
        self._lengths = [0] * num_sequences
        self.changes = 0

        max_blocks = -(-max_tokens // block_size)
        window = config.sliding_window or 1
        # A window that begins anywhere in a block, then a step's new tokens.
        sliding_blocks = min(max_blocks, -(-(window - 1 + step_tokens) // block_size) + 1)
        per_sequence = {"full_attention": max_blocks, "sliding_attention": sliding_blocks}
        self._pools = {
            kind: _Pool(num_sequences, per_sequence[kind], max_blocks, block_size)
            for kind in dict.fromkeys(config.layer_types)
        }
        self.layers = [self._allocate(i) for i in range(config.num_hidden_layers)]

    def _allocate(self, i: int) -> LayerCache:
        num_blocks = self._pools[self.config.layer_types[i]].num_blocks
        shape = (num_blocks, self.config.num_key_value_heads, self.block_size, self.config.head_dim)
        arrays: list[tuple[tuple[int, ...], Any]] = [(shape, _DTYPES[self.dtype])] * 2
        if self.dtype == "int8":
            arrays += [(shape[:3], np.float32)] * 2
        room = f"layer {i}'s keys and values of {self.num_sequences} x {self.max_tokens} tokens"
        k, v, *scales = self.device.together(arrays, room)
        return LayerCache(k, v, *(scales or (None, None)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held of each sequence."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that a full cache takes."""
        return sum(layer.nbytes for layer in self.layers)

    def check_room(self, sequence: int, new_tokens: int) -> None:
        """Raise ValueError unless `sequence` exists and `new_tokens` more fit in it."""
        if not 0 <= sequence < self.num_sequences:
            raise ValueError(f"sequence is {sequence}; the cache has 0 to {self.num_sequences - 1}")
        length = self._lengths[sequence]
        if length + new_tokens > self.max_tokens:
            raise ValueError(
                f"sequence {sequence} holds {length} of {self.max_tokens} tokens; {new_tokens} more do not fit"
            )

    def reserve(self, sequences: Sequence[int], new_tokens: Sequence[int]) -> dict[str, Pages]:
        """Find places for the next tokens of some sequences. They count only after `commit`.

        Parameters
        ----------
        sequences, new_tokens : sequence of int
            Which sequences, each at most once, and how many tokens each gets.

        Returns
        -------
        dict
            Pages by kind of layer.

        Raises
        ------
        ValueError
            When the tokens do not fit.
        """
        for sequence, count in zip(sequences, new_tokens, strict=True):
            self.check_room(sequence, count)
            if count > self.step_tokens:
                raise ValueError(f"a step has {count} new tokens; the cache takes up to {self.step_tokens}")
        self.changes += 1
        pages: dict[str, Pages] = {}
        for kind, pool in self._pools.items():
            slots: list[int] = []
            for sequence, count in zip(sequences, new_tokens, strict=True):
                begin = self._lengths[sequence]
                pool.extend(sequence, begin, begin + count)
                slots += pool.slots(sequence, begin, begin + count)
            pages[kind] = Pages(np.array(slots, np.int64), pool.table[list(sequences)])
        return pages

    def commit(self, sequences: Sequence[int], new_tokens: Sequence[int]) -> None:
        """Count tokens whose keys and values have been written in every layer; sliding layers let go of the past."""
        self.changes += 1
        for sequence, count in zip(sequences, new_tokens, strict=True):
            self._lengths[sequence] += count
            pool = self._pools.get("sliding_attention")
            if pool is not None and self.config.sliding_window is not None:
                pool.release(sequence, max(0, self._lengths[sequence] - self.config.sliding_window + 1))

    def reset(self, sequence: int = 0) -> None:
        """Forget a sequence."""
        self.check_room(sequence, 0)
        self.changes += 1
        for pool in self._pools.values():
            pool.clear(sequence)
        self._lengths[sequence] = 0
