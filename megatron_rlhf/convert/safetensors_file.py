"""The safetensors format, read without trust and written as a stream: an 8-byte length, a JSON header, the data.

Every number of a header is checked against the size of the file before anything is allocated: known dtypes, shapes
whose product is the stored range, ranges that lie one after another without hole or overlap and end with the file. A
tensor is read by itself into memory of its own size; nothing is mapped.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput

LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
_DIMENSIONS, _SIZE = 8, 1 << 48
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What can be read; a file with any other dtype is refused."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in its file, in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """The tensors of one file by name."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header. Raises BadInput with one sentence where it is none."""
        self.path = path
        self.tensors: Mapping[str, Stored] = _entries(path)

    def read(self, name: str) -> Tensor:
        """One tensor. Raises BadInput when the file has become shorter than its header says."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        if not tensor.numel():
            return tensor
        with self.path.open("rb") as file:
            file.seek(stored.start)
            view = tensor.view(-1).view(torch.uint8).numpy().data
            while len(view):
                count = file.readinto(view[: 1 << 26])
                if not count:
                    raise BadInput(f"{self.path} ends inside {name}: it was cut short; copy it again")
                view = view[count:]
        return tensor


def _entries(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise BadInput(
                    f"{path} is no safetensors file: its header would be {length} bytes long, the file has {size}; "
                    "copy it again"
                )
            text = file.read(length)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no safetensors file: its header is no JSON ({_first(error)})") from error
    if not isinstance(header, dict):
        raise BadInput(f"{path} is no safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_tiling(path, found, 8 + length, size)
    return found


def _entry(path: Path, name: str, entry: object, base: int, size: int) -> Stored:
    def refuse(what: str) -> BadInput:
        return BadInput(f"{path}: the header's entry of {name[:80]!r} {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not dtype, shape and data_offsets")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in DTYPES:
        raise refuse(f"has dtype {str(word)[:20]!r}, which is not one of {', '.join(DTYPES)}")
    if not _numbers(shape, _DIMENSIONS):
        raise refuse(f"has a shape that is not at most {_DIMENSIONS} whole numbers")
    if not _numbers(offsets, 2) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - base:
        raise refuse(f"has data_offsets outside the {size - base} bytes of data")
    dtype = DTYPES[word]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise refuse(f"says {word} {shape}, and {offsets[1] - offsets[0]} bytes")
    return Stored(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _numbers(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(number) is int and 0 <= number < _SIZE for number in value)
    )


def _check_tiling(path: Path, found: Mapping[str, Stored], start: int, size: int) -> None:
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != start:
            raise BadInput(f"{path}: the data of {name[:80]!r} overlaps its neighbour, or leaves a hole before it")
        start = stored.end
    if start != size:
        raise BadInput(f"{path} has {size - start} bytes behind its last tensor")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:80]!r} stands there twice")
    return found


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class SafetensorsWriter:
    """One file, written tensor by tensor; the header comes last, into room that was left for it."""

    def __init__(self, path: Path, planned: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
        """Leaves room for the header of `planned` (name, shape), all of `dtype`."""
        self._dtype = dtype
        self._entries: dict[str, dict[str, Any]] = {}
        self._offset = 0
        offset = 0
        entries = {}
        for name, shape in planned:
            end = offset + math.prod(shape) * dtype.itemsize
            entries[name] = _said(dtype, shape, offset, end)
            offset = end
        self._room = -(-len(_header(entries)) // 8) * 8
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one of the planned tensors, in their order; some may be left out."""
        if tensor.dtype != self._dtype or name in self._entries:
            raise ValueError(f"{name} was not planned so")
        if tensor.numel():
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        end = self._offset + tensor.numel() * tensor.dtype.itemsize
        self._entries[name] = _said(tensor.dtype, tuple(tensor.shape), self._offset, end)
        self._offset = end

    def close(self) -> None:
        """Write the header and bring the file to disk."""
        header = _header(self._entries).ljust(self._room)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close a file that nobody will read."""
        self._file.close()


def _said(dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _header(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
