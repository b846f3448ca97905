"""Files of `torch.save` from strangers: read with `weights_only=True`, their tensors mapped, nothing of theirs run.

Megatron keeps its arguments beside the weights, an `argparse.Namespace` with enumerations of its own in it. Classes of
Megatron, NeMo and NumPy are replaced by a stand-in that only holds what it is given; any other is refused by name.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput

_STAND_INS = ("megatron", "nemo", "numpy", "omegaconf", "lightning", "pytorch_lightning", "transformer_engine")
"""Packages whose classes may be named in a file; none of them is imported or called for it."""
_NAMESPACE = "argparse.Namespace"


class StandIn:
    """Stands for an object that is not wanted: takes any arguments and any state, and does nothing."""

    def __init__(self, *values: Any, **_: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load(path: Path) -> Any:
    """What `torch.save` wrote to `path`: plain containers, tensors on the CPU that are mapped from the file, stand-ins.

    Raises BadInput where the file is damaged, compressed, of a PyTorch before 1.6, or names a class of its own.
    """
    with _readable(path) as file:
        _check_zip(str(path), file, path.stat().st_size)
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        allowed = [_allowed(str(path), name) for name in asked]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except BadInput:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise _unreadable(str(path), error) from error


def tensor(path: Path, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The one tensor that `torch.save` wrote into `length` bytes of a file from `start` on, of this dtype and shape."""
    where = f"{path} at {start}"
    with _readable(path) as file:
        window = io.BufferedReader(_Window(file, start, length))
        _check_zip(where, window, length)
        window.seek(0)
        try:
            found = torch.load(window, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises nearly anything
            raise _unreadable(where, error) from error
    if not dense(found) or found.dtype != dtype or tuple(found.shape) != shape:
        raise BadInput(f"{where} holds no tensor of {dtype} {list(shape)}, as the metadata says; copy it again")
    return found


def dense(value: Any) -> bool:
    """Whether it is a tensor with every one of its numbers in the file: not expanded, sparse, quantised or empty of
    storage."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= value.numel() * value.dtype.itemsize
    )


def arguments(value: Any) -> dict[str, Any]:
    """The settings of Megatron-LM's `args` as a dict: a Namespace, or a dict already; empty for anything else."""
    found = vars(value) if isinstance(value, argparse.Namespace) else value
    return {name: item for name, item in found.items() if isinstance(name, str)} if isinstance(found, dict) else {}


def _allowed(where: str, name: str) -> Any:
    if name == _NAMESPACE:
        return argparse.Namespace
    if name.partition(".")[0] in _STAND_INS:
        # a class of this one reading: what a file might set on it ends with it
        return type("StandIn", (StandIn,), {}), name
    raise BadInput(f"{where} asks for {name}, which no weights need; it is not read")


def _check_zip(where: str, file: IO[bytes], size: int) -> None:
    """Refuses what is no plain zip, and members that would unpack to more than the bytes they lie in."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:  # a damaged file raises nearly anything
        raise _unreadable(where, error) from error
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
        raise BadInput(f"{where} is compressed; save it again with torch.save")
    if sum(member.file_size for member in members) > size:
        raise BadInput(f"{where} says it holds more bytes than it has; copy it again")


def _readable(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error


def _unreadable(where: str, error: BaseException) -> BadInput:
    said = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return BadInput(f"{where} is no file of torch.save (PyTorch 1.6 or newer) that can be read ({said}); copy it again")


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return int(count)
