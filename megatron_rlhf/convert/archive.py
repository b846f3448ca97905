"""Tar archives from strangers, unpacked without trust, and archives that are written in one pass.

Every header is looked at before anything is written: regular files and folders only, names that stay inside, no name
twice, and no more bytes than the archive can hold.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from megatron_rlhf.config.rules import BadInput

MOST_MEMBERS = 200_000
_RATIO = 1032
"""What deflate compresses to one byte at most, so that a size beyond it is a lie."""
_LARGEST_HEADER = 1 << 20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


def unpack(path: Path, target: Path) -> None:
    """The files of the archive `path` (tar or tar.gz) below the folder `target`, which is empty.

    Raises BadInput, before anything is written, for links, devices, sparse files, names that leave the target, sizes
    beyond the archive's and files that the disk has no room for.
    """
    try:
        with _opened(path) as (archive, most):
            members = _checked(path, archive, most)
            size = sum(member.size for _, member in members)
            if size > shutil.disk_usage(target).free:
                raise BadInput(f"{path} unpacks to {size} bytes, {target} has no room for them; set another TMPDIR")
            for name, member in members:
                _extract(archive, member, target.joinpath(*PurePosixPath(name).parts))
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, BadInput):
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise BadInput(f"{path} is no tar archive that can be read ({said}); copy it again") from error


class Writer:
    """A tar archive whose members may be written without knowing their size before."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Writes to `stream`, which can seek."""
        self._stream = stream

    def add(self, name: str, data: bytes) -> None:
        """A member of these bytes."""
        with self.member(name) as stream:
            stream.write(data)

    @contextmanager
    def member(self, name: str) -> Iterator[IO[bytes]]:
        """A stream whose bytes become the member `name`."""
        start = self._stream.tell()
        self._stream.write(bytes(tarfile.BLOCKSIZE))
        yield self._stream
        end = self._stream.tell()
        self._stream.write(bytes(-end % tarfile.BLOCKSIZE))
        behind = self._stream.tell()
        info = tarfile.TarInfo(name)
        info.size = end - start - tarfile.BLOCKSIZE
        info.mode = 0o644
        header = info.tobuf(tarfile.GNU_FORMAT)
        if len(header) != tarfile.BLOCKSIZE:
            raise ValueError(f"{name} is too long a name for a header of one block")
        self._stream.seek(start)
        self._stream.write(header)
        self._stream.seek(behind)

    def close(self) -> None:
        """The end of the archive: two empty blocks."""
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, int]]:
    """The archive and how many bytes its members may have together."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        inner: Any = gzip.GzipFile(fileobj=stream) if packed else stream
        with tarfile.open(fileobj=_Careful(inner), mode="r:") as archive:
            yield archive, size * _RATIO if packed else size


def _checked(path: Path, archive: tarfile.TarFile, most: int) -> list[tuple[str, tarfile.TarInfo]]:
    found: dict[str, tarfile.TarInfo] = {}
    total = 0
    for count, member in enumerate(archive, 1):
        name = member.name
        shown = repr(name[:120])
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or len(name) > 1024:
            raise BadInput(f"{path} holds {shown}, a name that leaves the folder it is unpacked in; it is not read")
        if member.isdir():
            continue
        if member.type not in _REGULAR or member.issparse():
            raise BadInput(f"{path} holds {shown}, which is a link, a device or a sparse file; it is not read")
        plain = "/".join(parts)
        total += member.size
        if member.size < 0 or total > most or count > MOST_MEMBERS:
            raise BadInput(f"{path} says {shown} has {member.size} bytes, more than it holds; copy it again")
        if not plain or plain in found:
            raise BadInput(f"{path} holds {shown} twice, or without a name; it is not read")
        found[plain] = member
    return list(found.items())


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None
    # exclusive: nothing that is there, a link least of all, is written through
    with source, target.open("xb") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)
        if stream.tell() != member.size:
            raise BadInput(f"the archive ends inside {member.name[:120]}; copy it again")


class _Careful(io.RawIOBase):
    """A file that never reads more than a header's worth at a time, whatever a header asks for."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self._inner.tell())

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return bytes(self._inner.read(size))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
