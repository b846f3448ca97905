"""Resident memory of this process, and the most of it between two moments. Linux only: it reads /proc/self."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

_PROBE = 64 << 20
_SLACK = 0.02
# mallopt's names of: the freed bytes at the end of the heap, and the bytes of a block, from which on memory is returned
_TRIM, _MAP = -1, -3


class Peak:
    """From its beginning on the most resident bytes there have been, `growth`, and those still allocated, `kept`."""

    def __init__(self) -> None:
        """Begins: what was freed goes back to the system first, or a later allocation would not be seen."""
        settle()
        Path("/proc/self/clear_refs").write_text("5")
        self._resident = _bytes("VmRSS")
        self._own = _own()

    @property
    def growth(self) -> int:
        """The most bytes held at once since the beginning, above those held then."""
        return _bytes("VmHWM") - self._resident

    @property
    def kept(self) -> int:
        """The bytes held now above those held at the beginning, after what was freed went back to the system."""
        settle()
        return _own() - self._own


def keep_freed(keep: bool) -> None:
    """Whether the allocator keeps freed blocks of up to 32 MiB for later, as glibc comes to do by itself, which is
    faster; without, resident memory is what is in use."""
    library = ctypes.CDLL(None)
    library.mallopt(_TRIM, (64 << 20) if keep else (128 << 10))
    library.mallopt(_MAP, (32 << 20) if keep else (1 << 20))


def settle() -> None:
    """Returns freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def check() -> None:
    """Raises RuntimeError unless `Peak` sees a known allocation, which is gone by then, within 2 %."""
    for _ in range(2):  # the first allocation brings library code into memory, too
        peak = Peak()
        torch.ones(_PROBE, dtype=torch.uint8)
    if abs(peak.growth - _PROBE) > _SLACK * _PROBE:
        raise RuntimeError(f"{_PROBE} bytes were allocated, the peak of resident memory grew by {peak.growth}")


def _own() -> int:
    # without pages of files, which the system takes back when it likes
    return _bytes("RssAnon") + _bytes("RssShmem")


def _bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024
