"""Files that are known by their length and SHA-256; no torch.

What is written is hashed on its way, so that a digest is of what was meant and not of what the disk made of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from megatron_rlhf.observe.pulse import beat

_BLOCK = 8 << 20

Digests = dict[str, dict[str, Any]]
"""By file name: `bytes` and `sha256`, the latter in hex."""


class Hashing:
    """What is written goes to a file and into a hash; the first error is kept, and what follows it is dropped.

    torch.save calls `write` from C++, where an exception would end the process (torch 2.13 inline_container.cc).
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Nothing is written yet."""
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        """The length of `data`, which is on its way to the file."""
        beat()
        length = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
                self._hash.update(data)
                self._bytes += length
            except Exception as error:
                self.error = error
        return length

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        if self.error is None:
            try:
                self._file.flush()
            except Exception as error:
                self.error = error

    def facts(self) -> dict[str, Any]:
        """Length and digest of what was written; raises the first error instead."""
        if self.error is not None:
            raise self.error
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def write(path: Path, fill: Callable[[Hashing], None]) -> dict[str, Any]:
    """Length and digest of the file that `fill` writes; it is on disk, whole, under its name. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        hashing = Hashing(file)
        fill(hashing)
        hashing.flush()
        facts = hashing.facts()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return facts


def of(path: Path) -> dict[str, Any]:
    """Length and digest of a file as it lies on disk."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            beat()
            found.update(block)
    return {"bytes": path.stat().st_size, "sha256": found.hexdigest()}


def faults(folder: Path, files: Mapping[str, Mapping[str, Any]], *, digests: bool) -> list[str]:
    """A sentence for every file that is missing, of another length or, with `digests`, of other content."""
    found = []
    for name, facts in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != facts["bytes"]:
                found.append(f"{name} has {size} bytes, not {facts['bytes']}")
            elif digests and of(path)["sha256"] != facts["sha256"]:
                found.append(f"{name} has another content than was written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror or error}")
    return found


def sync_folder(folder: Path) -> None:
    """What was created, renamed and removed in `folder` is on disk; nothing where a folder cannot be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)
