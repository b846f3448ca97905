"""Lets a loader do one of two things with a file: read it, or refuse it in one sentence, soon and in little memory.

Every case is a function of its kind's name and its number, so that one that fails can be made again.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rlhf.config.rules import BadInput

ROOM = 768 << 20
"""Bytes of address space that a loader may take beside what the process has."""
LONGEST = 2100
"""Letters of a sentence, which may hold names and paths."""

Load = Callable[[], object]
Case = Callable[[Path, random.Random], Load]
"""Writes files by chance into an empty folder; what it returns loads them."""


class Hang(BaseException):
    """A loader did not come back; no `except Exception` takes it for damage."""


def each(name: str, case: Case, numbers: range, room: Path) -> dict[str, int]:
    """How many of the cases were read and how many refused; AssertionError naming the first that was neither.

    Modifies: `room`, an empty folder; the process stands inside it meanwhile, and has its temporary files there.
    """
    found = {"read": 0, "refused": 0}
    folder = room / "a" / "b" / "case"
    with _inside(folder.parent):
        before = _listed(room)
        for number in numbers:
            folder.mkdir()
            load = case(folder, random.Random(f"{name} {number}"))
            here = _listed(folder)
            said = outcome(load)
            assert isinstance(said, str), f"{name} case {number}: {type(said).__name__}: {said}"
            elsewhere = _listed(room) - before - {str(folder.relative_to(room) / path) for path in _listed(folder)}
            assert elsewhere == {str(folder.relative_to(room))}, f"{name} case {number} wrote {sorted(elsewhere)}"
            assert not Path("/escaped").exists(), f"{name} case {number} wrote /escaped"
            assert here <= _listed(folder), f"{name} case {number} took away {here - _listed(folder)}"
            shutil.rmtree(folder)
            found["refused" if said else "read"] += 1
    return found


def outcome(load: Load, seconds: float = 10.0) -> str | BaseException:
    """The sentence with which it was refused, "" where it was read, and what it should not have done otherwise."""
    try:
        with _limited(seconds):
            load()
    except BadInput as error:
        return _sentences(error)
    except (Exception, Hang) as error:
        return error
    return ""


def _sentences(error: BadInput) -> str | BaseException:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return AssertionError(f"took more than {ROOM >> 20} MiB before it said: {error}")
        cause = cause.__cause__ or cause.__context__
    lines = str(error).split("\n  ")
    if not all(line and line.isprintable() and len(line) <= LONGEST for line in lines):
        return AssertionError(f"no sentence for a person: {str(error)[:400]!r}")
    return str(error)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """At most so many seconds, and ROOM more than there is."""
    fired: list[int] = []

    def late(number: int, frame: object) -> None:
        fired.append(number)
        raise Hang

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if fired:  # also where a library made another error of it
            raise Hang(f"did not come back in {seconds:g} s")


@contextmanager
def _inside(room: Path) -> Iterator[None]:
    stood, usual = Path.cwd(), tempfile.tempdir
    (room / "temporary").mkdir(parents=True)
    os.chdir(room)
    tempfile.tempdir = str(room / "temporary")
    try:
        yield
    finally:
        tempfile.tempdir = usual
        os.chdir(stood)


def _listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
