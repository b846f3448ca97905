"""One launch of a run: started, followed by what it announces, and killed without warning with all its ranks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SOUND = "-"
"""The fault of a launch that has none."""
_POLL = 0.002
_LIMIT = 600.0
"""Seconds after which a launch that neither ends nor reaches its point hangs."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where to kill: `delay` seconds after the `count`-th time that a launch announces `event`."""

    event: str
    count: int = 1
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.event}" + (f" ({self.count})" if self.count > 1 else "") + f" + {1000 * self.delay:.0f} ms"


@dataclass(frozen=True, slots=True)
class Event:
    """What a rank announced, and when."""

    time: float
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a launch ended: killed, or with what exit code and last words; what it had announced."""

    killed: bool
    code: int
    said: str
    events: tuple[Event, ...]

    @property
    def taken_up(self) -> str:
        """The states the launch went on from, and the stages it began anew."""
        found = [e.text.removeprefix("resumed ") for e in self.events if e.text.startswith(("resumed ", "anew "))]
        return ", ".join(found) or "nothing yet"


def launch(words: Sequence[str], fault: str, folder: Path, point: Point | None) -> Ended:
    """Runs the verb until it ends by itself, or until `point`, where SIGKILL ends all its processes; none is left."""
    announcements, said = folder / "announced.log", folder / "said.log"
    announcements.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.resume.announced", str(announcements), fault, *words]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with said.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=stream, stderr=stream
        )
    try:
        killed = _follow(process, announcements, point)
    finally:
        kill(process)
    return Ended(killed, process.returncode, said.read_text(errors="replace")[-3000:], tuple(events(announcements)))


def events(announcements: Path) -> Iterator[Event]:
    """The whole lines of a file of announcements."""
    lines = announcements.read_text().split("\n")[:-1] if announcements.exists() else []
    for line in lines:
        at, _, text = line.partition(" ")
        yield Event(float(at), text)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launcher and everything it started, in an order of chance; returns when all are gone."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        found = [launcher, *launcher.children(recursive=True)]
    random.shuffle(found)
    for each in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(found, timeout=30)
    if alive:
        raise RuntimeError(f"processes {[each.pid for each in alive]} outlive SIGKILL")


def _follow(process: subprocess.Popen[bytes], announcements: Path, point: Point | None) -> bool:
    """Whether the point was reached; False where the process ended before. Raises TimeoutError where neither comes."""
    deadline, seen = time.monotonic() + _LIMIT, 0
    while process.poll() is None:
        size = announcements.stat().st_size if announcements.exists() else 0
        if point is not None and size > seen:
            seen = size
            reached = [event for event in events(announcements) if event.text == point.event][point.count - 1 :]
            if reached:
                time.sleep(max(0.0, reached[0].time + point.delay - time.monotonic()))
                return process.poll() is None
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {_LIMIT:.0f} s the run has neither ended nor reached '{point}'")
        time.sleep(_POLL)
    return False
