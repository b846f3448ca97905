"""The GGUF format, versions 2 and 3, read without trust: metadata, the table of tensors, then their data.

Every count, length and offset is checked against the size of the file before anything of that size is allocated, and
nothing is mapped. Source of the layout: the specification in ggml's repository (docs/gguf.md).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import gguf_blocks
from megatron_rlhf.convert.gguf_blocks import Kind

LARGEST_HEADER = 1 << 28
"""Bytes of metadata and table; the largest vocabularies take some ten MiB."""
_KEYS, _TENSORS, _STRING, _ITEMS, _DEPTH, _DIMENSIONS = 1 << 14, 1 << 16, 1 << 24, 1 << 22, 2, 4
_MAGIC = b"GGUF"
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY, _SINGLE = 8, 9, 6
_PIECE = 1 << 15
"""Blocks that are read and spread out at a time."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in its file, in bytes from the start of the file, and what its blocks are."""

    kind: Kind
    shape: tuple[int, ...]
    start: int


class GgufFile:
    """The metadata of one file by key and its tensors by name."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header. Raises BadInput with one sentence where it is none."""
        self.path = path
        try:
            with path.open("rb") as file:
                header = _Header(path, file, os.fstat(file.fileno()).st_size)
                self.metadata, self.tensors = header.read()
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror or error}; name the .gguf file itself") from error

    def read(self, name: str) -> Tensor:
        """One tensor; blocks of small integers come as the float32 numbers that they stand for.

        Raises BadInput when the file has become shorter than its header says.
        """
        stored = self.tensors[name]
        kind = stored.kind
        out = torch.empty(stored.shape, dtype=kind.dtype)
        flat = out.view(-1)
        with self.path.open("rb") as file:
            file.seek(stored.start)
            for start in range(0, flat.numel(), _PIECE * kind.numbers):
                piece = flat[start : start + _PIECE * kind.numbers]
                size = piece.numel() // kind.numbers * kind.size
                data = file.read(size)
                if len(data) != size:
                    raise BadInput(f"{self.path} ends inside {name}: it was cut short; copy it again")
                piece.copy_(gguf_blocks.numbers(kind, data))
        return out


class _Header:
    """Reads on from a place in a file, never beyond its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size, self._at = path, file, size, 0

    def read(self) -> tuple[Mapping[str, Any], Mapping[str, Stored]]:
        """The metadata and the tensors."""
        if self._size < 24 or self._take(4, "its magic") != _MAGIC:
            raise BadInput(f"{self._path} is no GGUF file: it does not begin with the word GGUF and two counts")
        version = self._number("<u4", "its version")
        if version not in (2, 3):
            which = f"version {version}" if version < 1 << 16 else "big-endian, or its version is damaged"
            raise BadInput(f"{self._path} is GGUF of {which}; versions 2 and 3, little-endian, are read")
        tensors = self._count("<u8", _TENSORS, 24, "tensors")
        keys = self._count("<u8", _KEYS, 12, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("a key")
            if key in metadata:
                raise self._refuse(f"has the key {key[:80]!r} twice")
            metadata[key] = self._value(self._number("<u4", key), key, _DEPTH)
        rows = [self._row() for _ in range(tensors)]
        return metadata, self._table(rows, metadata.get("general.alignment", 32))

    def _table(self, rows: list[tuple[str, Kind, tuple[int, ...], int]], alignment: object) -> dict[str, Stored]:
        if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._refuse(f"has general.alignment={str(alignment)[:20]}, which is no power of 2 up to 65536")
        base = -(-self._at // alignment) * alignment
        found: dict[str, Stored] = {}
        for name, kind, shape, offset in rows:
            if name in found:
                raise self._refuse(f"has the tensor {name[:80]!r} twice")
            if offset % alignment:
                raise self._refuse(f"places {name[:80]!r} at {offset}, no multiple of its alignment {alignment}")
            if base + offset + _bytes(kind, shape) > self._size:
                raise self._refuse(f"places {name[:80]!r} beyond its end at {self._size} bytes; copy it again")
            found[name] = Stored(kind, shape, base + offset)
        end = base
        for name, stored in sorted(
            found.items(), key=lambda item: (item[1].start, _bytes(item[1].kind, item[1].shape))
        ):
            if stored.start < end:
                raise self._refuse(f"has {name[:80]!r} overlap the tensor before it")
            end = stored.start + _bytes(stored.kind, stored.shape)
        return found

    def _row(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name = self._string("a tensor's name")
        count = self._number("<u4", name)
        if not 0 < count <= _DIMENSIONS:
            raise self._refuse(f"gives {name[:80]!r} {count} dimensions, 1 to {_DIMENSIONS} are possible")
        sizes = [self._number("<u8", name) for _ in range(count)]
        number = self._number("<u4", name)
        kind = gguf_blocks.KINDS.get(number)
        if kind is None:
            known = ", ".join(kind.name for kind in gguf_blocks.KINDS.values())
            said = gguf_blocks.OTHERS.get(number, f"of an unknown type {number}")
            raise self._refuse(f"has {name[:80]!r} in {said}, which cannot be read; quantise it as one of {known}")
        if not all(sizes) or math.prod(sizes) > 1 << 48 or sizes[0] % kind.numbers:
            raise self._refuse(f"gives {name[:80]!r} the sizes {sizes}, which {kind.name} blocks cannot make")
        return name, kind, tuple(reversed(sizes)), self._number("<u8", name)

    def _value(self, type_: int, key: str, depth: int) -> Any:
        if type_ in _NUMBERS:
            return self._numbers(type_, 1, key)[0]
        if type_ == _TEXT:
            return self._string(key)
        if type_ != _ARRAY:
            raise self._refuse(f"has a value of unknown type {type_} under {key[:80]!r}")
        if not depth:
            raise self._refuse(f"nests arrays more than {_DEPTH} deep under {key[:80]!r}")
        inner = self._number("<u4", key)
        smallest = np.dtype(_NUMBERS[inner]).itemsize if inner in _NUMBERS else 8
        count = self._count("<u8", _ITEMS, smallest, f"items of {key[:80]!r}")
        if inner in _NUMBERS:
            return self._numbers(inner, count, key)
        return [self._value(inner, key, depth - 1) for _ in range(count)]

    def _numbers(self, type_: int, count: int, key: str) -> list[Any]:
        data = self._take(count * np.dtype(_NUMBERS[type_]).itemsize, key)
        found = np.frombuffer(data, np.dtype("u1") if type_ == 7 else np.dtype(_NUMBERS[type_]))
        if type_ == 7:
            return [bool(value) for value in found]
        # the number that was meant: 1e-05, not 9.999999747378752e-06
        return [float(str(value)) for value in found] if type_ == _SINGLE else found.tolist()

    def _string(self, what: str) -> str:
        length = self._count("<u8", _STRING, 1, f"letters of {what[:80]!r}")
        return self._take(length, what).decode("utf-8", errors="replace")

    def _count(self, format: str, most: int, smallest: int, what: str) -> int:
        """A count of things of at least `smallest` bytes each, which the rest of the file has room for."""
        count = self._number(format, what)
        if count > most or count * smallest > self._size - self._at:
            raise self._refuse(f"claims {count} {what}; its {self._size} bytes hold fewer, or no model has as many")
        return count

    def _number(self, format: str, what: str) -> int:
        data = self._take(np.dtype(format).itemsize, what)
        return int(struct.unpack("<I" if len(data) == 4 else "<Q", data)[0])

    def _take(self, size: int, what: str) -> bytes:
        if self._at + size > LARGEST_HEADER:
            raise self._refuse(f"has a header of more than {LARGEST_HEADER >> 20} MiB, no model's is as large")
        data = self._file.read(size) if size <= self._size - self._at else b""
        if len(data) != size:
            raise self._refuse(f"ends inside its header, at {what[:80]!r}; copy it again")
        self._at += size
        return data

    def _refuse(self, what: str) -> BadInput:
        return BadInput(f"{self._path} {what}")


def _bytes(kind: Kind, shape: tuple[int, ...]) -> int:
    return math.prod(shape) // kind.numbers * kind.size
