"""Safetensors files, opened by the safetensors library and then read in place through a memory map."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mxmoe import _core
from mxmoe.config import read_json

__all__ = ["CheckpointError", "Shards", "shown"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}
# How a repository that was cloned without its large files begins each of them.
_LFS = b"version https://git-lfs"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# gpt-oss-120b comes in 15 shards; every one is a file descriptor and a mapping.
_MAX_SHARDS = 1024
# Elements of a bf16 tensor that are checked at a time.
_SCAN = 1 << 21


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, is damaged, or does not fit its configuration."""


def shown(text: object) -> str:
    """Return text out of a file so that it can neither flood a message nor steer a terminal."""
    line = str(text)
    line = line if line.isprintable() else ascii(line)
    return line if len(line) <= 250 else line[:247] + "..."


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: its shard, its dtype as safetensors names it, its shape, its bytes."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Shards:
    """All tensors of a folder, as read-only arrays on the files themselves.

    Parameters
    ----------
    folder : Path
        Holds ``model.safetensors``, or ``model.safetensors.index.json`` with the shards it names, or shards
        without an index (all ``*.safetensors``).

    Raises
    ------
    CheckpointError
        When a file is missing, damaged or contradicts the index, or a tensor stands in two files.

    Notes
    -----
    The files must not be changed while they are mapped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, shards = _find_shards(folder)
        self._maps: dict[str, mmap.mmap] = {}
        self._entries: dict[str, _Entry] = {}
        for shard in shards:
            self._maps[shard], entries = _open(folder / shard, shard)
            for name, entry in entries.items():
                if name in self._entries:
                    where = f"stands in {self._entries[name].shard} and again in {shard}"
                    raise CheckpointError(f"{folder}: tensor {shown(name)} {where}, expected once")
                self._entries[name] = entry
        if index is not None:
            self._check_index(index)

    def _check_index(self, index: Mapping[str, str]) -> None:
        path = self.folder / _INDEX
        for name, shard in index.items():
            entry = self._entries.get(name)
            if entry is None or entry.shard != shard:
                found = "in no shard" if entry is None else f"in {entry.shard}"
                came = f"weight_map puts tensor {shown(name)} in {shard}"
                raise CheckpointError(f"{path}: {came}, but it is {found}")
        for name, entry in self._entries.items():
            if name not in index:
                lacks = f"weight_map lacks tensor {shown(name)}"
                raise CheckpointError(f"{path}: {lacks}, which {entry.shard} holds")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def refuse_others(self, expected: Iterable[str]) -> None:
        """Raise `CheckpointError` when there is a tensor that `expected` does not name."""
        for name in sorted(self._entries.keys() - set(expected)):
            where = self.folder / self._entries[name].shard
            raise CheckpointError(f"{where}: unexpected tensor {shown(name)}, which the config has no place for")

    def check(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Raise `CheckpointError` unless tensor `name` exists with `dtype` ("BF16", "U8") and `shape`."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing, expected {dtype} {list(shape)}")
        if (entry.dtype, entry.shape) != (dtype, shape):
            came = f"{entry.dtype} {list(entry.shape)}"
            where = self.folder / entry.shard
            raise CheckpointError(f"{where}: tensor {name} is {came}, expected {dtype} {list(shape)}")

    def array(self, name: str) -> NDArray[Any]:
        """Return tensor `name` as a read-only view of the file; `check` must have passed."""
        entry = self._entries[name]
        dtype = _DTYPES[entry.dtype]
        count = entry.nbytes // dtype.itemsize
        flat: NDArray[Any]
        if entry.start % dtype.itemsize:
            # The format does not promise alignment, and reading 16-bit values at odd addresses is undefined
            # in C++.
            raw = bytearray(self._maps[entry.shard][entry.start : entry.start + entry.nbytes])
            flat = np.frombuffer(raw, dtype=dtype, count=count)
            flat.flags.writeable = False
        else:
            flat = np.frombuffer(self._maps[entry.shard], dtype=dtype, count=count, offset=entry.start)
        return flat.reshape(entry.shape)

    def refuse_bad_values(self, name: str, *, keep: bool = True) -> None:
        """Raise `CheckpointError` when a bf16 tensor holds NaN or infinity, or scales hold the byte 255.

        Without `keep` no more than a few MiB of it are resident at a time.
        """
        flat = self.array(name).reshape(-1)
        where = f"{self.folder / self._entries[name].shard}: tensor {name}"
        if flat.dtype == np.uint8:
            if flat.size and flat.max() == 255:
                at = int(np.argmax(flat == 255))
                raise CheckpointError(f"{where} has scale byte 255 (NaN) at element {at}, expected 0 to 254")
            return
        for start in range(0, flat.size, _SCAN):
            found = _core.first_not_finite(flat[start : start + _SCAN])
            if found >= 0:
                at = start + found
                raise CheckpointError(f"{where} holds {flat[at]} at element {at}, expected finite values")
            if not keep:
                self.release(name)

    def release(self, name: str) -> None:
        """Give back the resident pages of tensor `name`; the next use reads them again.

        Does nothing where the platform has no ``madvise``.
        """
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is None:
            return
        entry = self._entries[name]
        # Only pages that lie wholly inside: the outer ones are shared with the neighbouring tensors.
        first = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (entry.start + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._maps[entry.shard].madvise(advice, first, last - first)

    def nbytes(self, name: str) -> int:
        """Return the bytes that tensor `name` takes in its file."""
        return self._entries[name].nbytes


def _find_shards(folder: Path) -> tuple[dict[str, str] | None, list[str]]:
    """Return the index (None without one) and the names of the shards in `folder`."""
    if (folder / _SINGLE).is_file():
        return None, [_SINGLE]
    if (folder / _INDEX).is_file():
        index = _read_index(folder / _INDEX)
        return index, sorted(set(index.values()))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder}: no weights, expected {_SINGLE} or {_INDEX}")
    if len(shards) > _MAX_SHARDS:
        raise CheckpointError(f"{folder}: {len(shards)} shards, expected at most {_MAX_SHARDS}")
    return None, shards


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path}: weight_map is not a non-empty object from tensors to shards")
    shards = set()
    for name, shard in index.items():
        came = f"weight_map puts tensor {shown(name)} in {shown(shard)}"
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(f"{path}: {came}, expected a .safetensors file of the same folder")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: {came}, which does not exist")
        shards.add(shard)
        if len(shards) > _MAX_SHARDS:
            raise CheckpointError(f"{path}: weight_map names more than {_MAX_SHARDS} shards")
    return index


def _is_plain_name(name: str) -> bool:
    # Both path grammars, so that "..\\x" is refused on Linux as well and a checkpoint means the same
    # everywhere.
    plain = PurePosixPath(name).name == name and PureWindowsPath(name).name == name
    # No file system takes longer names, and asking one about them is an error of its own.
    return plain and name.isprintable() and len(name) <= 255 and name.endswith(".safetensors")


def _open(path: Path, shard: str) -> tuple[mmap.mmap, dict[str, _Entry]]:
    """Map one file; the safetensors library judges its header first."""
    try:
        with path.open("rb") as raw:
            if raw.read(len(_LFS)) == _LFS:
                raise ValueError("a Git LFS pointer: fetch the file itself with `git lfs pull`")
        with safe_open(str(path), framework="numpy") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size), object_pairs_hook=_unique)
            mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path}: not a readable safetensors file ({shown(problem)})") from None
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        if shapes.get(name) != tuple(fields["shape"]):
            raise CheckpointError(f"{path}: tensor {shown(name)} has two different descriptions")
        entries[name] = _entry(path, shard, name, fields, 8 + size, len(mapped))
    return mapped, entries


def _entry(path: Path, shard: str, name: str, fields: dict[str, Any], base: int, size: int) -> _Entry:
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {shown(name)} is {dtype}, expected BF16 or U8")
    # The library has checked this too, but it is by these very numbers that the map is read.
    if not 0 <= begin <= end <= size - base or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CheckpointError(f"{path}: tensor {shown(name)} lies at {begin} to {end}, unlike its shape")
    return _Entry(shard, dtype, shape, base + begin, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return result
