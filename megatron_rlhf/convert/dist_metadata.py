"""`.metadata` of a Megatron-Core checkpoint: which tensor lies in which bytes of which file.

PyTorch writes it with pickle. It is read here without any class of its own: a few names stand for records that only
hold what they are given, every other name is refused, and so is every opcode that such a file does not need.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rlhf.config.rules import BadInput

FILE = ".metadata"
LARGEST = 1 << 30
"""Bytes; that of a checkpoint of a thousand ranks has some tens of MiB."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool)
}  # fmt: skip

_CHECKPOINT = "torch.distributed.checkpoint."
_RECORDS = {
    "metadata": ("ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata", "Metadata", "MetadataIndex",
                 "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "planner": ("WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData", "SavePlan"),
    "filesystem": ("_StorageInfo",),
}  # fmt: skip
_WORDS = """
PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT
UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET
ADDITEMS FROZENSET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
"""
_OPCODES = frozenset(_WORDS.split())
"""What builds containers, numbers, text and objects of classes; all else a pickle can say is refused."""
_SIZE = 1 << 48


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor, at `offset`, that lies in `length` bytes of a file from `start` on."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor and the pieces that it is made of."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `folder` by its key; nothing else of the file is kept.

    Raises BadInput where the file is no such metadata, asks for anything to be run, or names bytes that its files do
    not have.
    """
    path = folder / FILE
    if not path.is_file():
        raise BadInput(f"{folder} has no {FILE}: it is no checkpoint of megatron.core.dist_checkpointing (torch_dist)")
    if path.stat().st_size > LARGEST:
        raise BadInput(f"{path} is larger than {LARGEST >> 30} GiB, no metadata is")
    found = _unpickled(path)
    try:
        return dict(_tensors(folder, found))
    except BadInput:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path} is no metadata of a checkpoint ({_first(error)}); copy it again") from error


def _unpickled(path: Path) -> Any:
    data = path.read_bytes()
    try:
        _check_opcodes(path, data)
        return _Reader(path, data).load()
    except BadInput:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise BadInput(f"{path} is no pickled metadata ({_first(error)}); copy it again") from error


def _check_opcodes(path: Path, data: bytes) -> None:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        if opcode.name not in _OPCODES:
            raise BadInput(f"{path} holds the opcode {opcode.name}, which no metadata has; it is not read")
        # the memo is an array as long as the largest index
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise BadInput(f"{path} is no pickled metadata (memo {argument}); copy it again")


class _Record:
    """An object that holds what it was given and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and all(isinstance(name, str) for name in state):
            self.__dict__.update(state)
        else:
            self.state = state


class _Index(_Record):
    """The key of a piece: hashable by tensor and offset."""

    def key(self) -> tuple[str, tuple[int, ...]]:
        """The tensor's key and the piece's offset."""
        offset = self.__dict__.get("offset")
        return _text(self.fqn), () if offset is None else _sizes(offset)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self.key() == other.key()


class _Reader(pickle.Unpickler):
    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        # classes of this one reading: what a pickle might set on a class ends with it
        self._known: dict[tuple[str, str], Any] = {
            (f"{_CHECKPOINT}{module}", name): type(name, (_Index if name == "MetadataIndex" else _Record,), {})
            for module, names in _RECORDS.items()
            for name in names
        }
        self._known |= {("torch", name): type(name, (_Record,), {"dtype": dtype}) for name, dtype in DTYPES.items()}
        self._known["torch", "Size"] = lambda sizes=(): _sizes(sizes)
        self._known["torch.serialization", "_get_layout"] = lambda name: None
        # where it was saved
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            self._known["pathlib", name] = self._known["pathlib._local", name] = type(name, (_Record,), {})
        for name in ("MCoreMetadata", "MCoreSavePlan"):
            module = "megatron.core.dist_checkpointing.strategies.torch"
            self._known[module, name] = type(name, (_Record,), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and re.fullmatch(r"(float8|u?int|complex|bits|q)\w*", name):
            return type(name, (_Record,), {"dtype": None})
        raise BadInput(f"{self._path} asks for {module}.{name}, which no metadata has; it is not read")


def _tensors(folder: Path, found: Any) -> Iterator[tuple[str, Stored]]:
    places = {index.key(): info for index, info in _items(found.storage_data) if "offset" in index.__dict__}
    sizes: dict[str, int] = {}
    for key, entry in _items(found.state_dict_metadata):
        if type(entry).__name__ != "TensorStorageMetadata":
            continue
        properties = entry.properties
        kind = properties.state[0] if "state" in properties.__dict__ else properties.dtype
        shape = _sizes(entry.size)
        pieces = tuple(_piece(folder, _text(key), chunk, places, sizes, len(shape)) for chunk in entry.chunks)
        if kind.dtype is not None:
            yield key, _checked(folder, key, Stored(kind.dtype, shape, pieces))


def _piece(
    folder: Path, key: str, chunk: Any, places: Mapping[Any, Any], sizes: dict[str, int], dimensions: int
) -> Piece:
    offset, shape = _sizes(chunk.offsets), _sizes(chunk.sizes)
    if (key, offset) not in places or len(offset) != dimensions or len(shape) != dimensions:
        raise BadInput(f"{folder / FILE} has no place for the piece {list(offset)} of {key[:120]}; copy it again")
    info = places[key, offset]
    file, start, length = _text(info.relative_path), _number(info.offset), _number(info.length)
    if info.__dict__.get("transform_descriptors"):
        raise BadInput(f"{folder / file} is compressed ({info.transform_descriptors!r:.80}); save it plain")
    if not re.fullmatch(r"[\w-][\w.-]*", file):
        raise BadInput(f"{folder / FILE} names the file {file[:120]!r}; it must be a file of its own folder")
    if file not in sizes:
        if not (folder / file).is_file():
            raise BadInput(f"{folder / FILE} names {file}, which is not there; copy it too")
        sizes[file] = (folder / file).stat().st_size
    if start + length > sizes[file]:
        raise BadInput(f"{folder / file} has {sizes[file]} bytes, {key[:120]} ends at {start + length}; copy it again")
    return Piece(offset, shape, file, start, length)


def _checked(folder: Path, key: str, stored: Stored) -> Stored:
    """The entry, unless its pieces do not fill it or have fewer bytes than numbers."""
    filled = 0
    for piece in stored.pieces:
        spans = zip(piece.offset, piece.shape, stored.shape, strict=True)
        inside = all(at + size <= whole for at, size, whole in spans)
        if not inside or math.prod(piece.shape) * stored.dtype.itemsize > piece.length:
            raise BadInput(
                f"{folder / FILE}: a piece of {key[:120]} at {list(piece.offset)} does not fit; copy it again"
            )
        filled += math.prod(piece.shape)
    if filled != math.prod(stored.shape):
        raise BadInput(f"{folder / FILE}: the pieces of {key[:120]} do not fill {list(stored.shape)}; copy it again")
    return stored


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise TypeError("a table is missing")
    yield from value.items()


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 16:
        raise ValueError("no shape")
    return tuple(_number(size) for size in value)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _SIZE:
        raise ValueError("no size")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 4096:
        raise ValueError("no name")
    return value


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
