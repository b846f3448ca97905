"""Ends a run in which no rank moves on any more, and says which rank is behind and where each of them stands. No torch.

A thread of each rank writes the rank's pulse into a small file of the run's folder now and then. It reads the others'
only when its own rank has been silent for long: where none of them moved either, it writes down every thread's Python
stack, tells the others to do the same, and ends the process. A rank that was stopped (SIGSTOP), or whose machine is
gone, writes no more; the others see that. The thread runs while the rank waits in a collective, which gloo and NCCL do
without holding Python's lock.

SIGUSR2 makes a rank write its stacks at any time and go on.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rlhf.observe.log import write_text
from megatron_rlhf.observe.pulse import PULSE, Pulse

HUNG = 76
"""The exit code of a rank that the watchdog ended, or that waited in vain for others to come."""
FOLDER = "watchdog"
_SHORTEST, _LONGEST = 0.05, 15.0
"""Seconds between two looks."""


class Absent(Exception):
    """Ranks did not come to the start of their world; the message is one sentence."""


@dataclass(slots=True)
class _Seen:
    """What a rank's file last said, and when it last said something new: of the rank, of its process."""

    facts: dict[str, Any]
    moved: float
    written: float


class Watchdog:
    """Watches over one run on this rank from its making until `stop`."""

    def __init__(self, folder: Path, rank: int, world: int, run: str, seconds: float) -> None:
        """`run` is a word that the ranks of this launch share and no other launch has; `seconds` of silence of all
        ranks are taken for a hang."""
        self.folder, self.rank, self.world, self.run, self.seconds = folder, rank, world, run, seconds
        self.every = min(_LONGEST, max(_SHORTEST, seconds / 20))
        self._own = {"run": run, "rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "born": _born("self")}
        self._tick = 0
        self._beats, self._moved, self._looked = -1, time.monotonic(), time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._over = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stack_file(rank).open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._write()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Watch no more; the others do not wait for this rank. A second call does nothing."""
        if not self._over.is_set():
            self._over.set()
            self._write(over=True)

    def _watch(self) -> None:
        while not self._over.wait(self.every):
            self._look()

    def _look(self) -> None:
        """Write what this rank does, and end it where all ranks are silent or another says so."""
        now = time.monotonic()
        paused, self._looked = now - self._looked > max(self.seconds / 4, 4 * self.every), now
        if PULSE.beats != self._beats or paused:  # a process that was stopped for a while could not beat
            self._beats, self._moved, self._seen = PULSE.beats, now, {}
        self._write()
        if self._alarm().exists():
            self._end()
        silent = now - self._moved
        if silent < self.seconds / 2:
            self._seen = {}
            return
        for rank in self._others():
            self._read(rank, now)
        quiet = [now - seen.moved >= self.seconds / 2 for seen in self._seen.values()]
        if silent >= self.seconds and all(quiet):
            self._raise_alarm(now)

    def _read(self, rank: int, now: float) -> None:
        facts = self._facts(rank)
        seen = self._seen.setdefault(rank, _Seen(facts, now, now))
        if not facts:  # not there, or half written
            return
        moved = any(facts[name] != seen.facts.get(name) for name in ("beats", "phases", "over"))
        written = facts["tick"] != seen.facts.get("tick")
        seen.facts = facts
        seen.moved = now if moved and not facts["over"] else seen.moved
        seen.written = now if written else seen.written

    def _raise_alarm(self, now: float) -> None:
        """The first to see it says so, when those that answer have written their stacks; this rank ends."""
        ranks: dict[int, dict[str, Any]] = {self.rank: {**self._own, **asdict(PULSE), "over": False, "answers": True}}
        for rank, seen in self._seen.items():
            facts = seen.facts or {**asdict(Pulse()), "over": False}
            ranks[rank] = {**facts, "answers": now - seen.written < self.seconds / 4}
        before = {rank: _size(self._stack_file(rank)) for rank, facts in ranks.items() if not facts["over"]}
        try:
            self._alarm().touch(exist_ok=False)
        except FileExistsError:
            self._end()
        except OSError:  # a full disk: then each rank that sees the hang says so
            pass
        self._dump()
        self._wake(rank for rank, facts in ranks.items() if not facts["answers"] and not facts["over"])
        self._await(before)
        text = report(ranks, self.seconds, self.folder)
        try:
            write_text(self.folder / "report.txt", text)
        finally:
            # straight to the file: the rank may hold the console's lock
            os.write(sys.stderr.fileno(), text.encode())
            os._exit(HUNG)

    def _end(self) -> None:
        """Another rank raised the alarm: leave the stacks behind and give it time to speak."""
        self._dump()
        time.sleep(4 * self.every + 3)
        os._exit(HUNG)

    def _dump(self) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()

    def _await(self, before: Mapping[int, int]) -> None:
        """Returns when the files of stacks have grown from these lengths by rank, or have been waited for."""
        end = time.monotonic() + 2 * self.every + 2
        while time.monotonic() < end:
            if all(_size(self._stack_file(rank)) > size for rank, size in before.items()):
                return
            time.sleep(min(self.every, 0.1))

    def _wake(self, ranks: Iterable[int]) -> None:
        """Stopped ranks on this machine write their stacks: Python's fault handler needs no lock for it."""
        for rank in ranks:
            facts = self._seen[rank].facts
            # another machine's, or a number that another process has by now
            if facts.get("host") == self._own["host"] and facts["born"] == _born(facts["pid"]):
                with suppress(OSError):
                    os.kill(facts["pid"], signal.SIGUSR2)
                    os.kill(facts["pid"], signal.SIGCONT)

    def _write(self, *, over: bool = False) -> None:
        self._tick += 1
        facts = {**self._own, **asdict(PULSE), "tick": self._tick, "over": over}
        try:
            self._file(self.rank).write_text(json.dumps(facts), encoding="utf-8")
        except OSError:  # a full disk is not this thread's to report
            return

    def _facts(self, rank: int) -> dict[str, Any]:
        try:
            facts = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) and facts.get("run") == self.run else {}

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.stacks.txt"

    def _alarm(self) -> Path:
        return self.folder / f"alarm.{self.run}"


def start(out: Path, rank: int, world: int, run: str, seconds: float) -> Watchdog | None:
    """The watchdog of a run in `out`; None where `seconds` is 0 or no file can be written there."""
    if not seconds:
        return None
    folder = out / FOLDER
    try:
        if rank == 0:
            for old in folder.glob("alarm.*"):
                if old.name != f"alarm.{run}":
                    old.unlink()
        return Watchdog(folder, rank, world, run, seconds)
    except OSError:
        return None


def report(ranks: dict[int, dict[str, Any]], seconds: float, folder: Path) -> str:
    """Which ranks are behind and what each of them does, for people.

    Behind are those whose process does not answer, else those that entered the fewest phases, else the fewest beats.
    """
    there = {rank: facts for rank, facts in sorted(ranks.items()) if not facts["over"]}
    behind = [rank for rank, facts in there.items() if not facts["answers"]]
    far = {rank: (facts["phases"], facts["beats"]) for rank, facts in there.items()}
    for place in range(2):
        if not behind and len({count[place] for count in far.values()}) > 1:
            least = min(count[place] for count in far.values())
            behind = [rank for rank, count in far.items() if count[place] == least]
    who = f"rank {', '.join(map(str, behind))} {'are' if len(behind) > 1 else 'is'}" if behind else "no rank is"
    head = f"watchdog: no rank has moved on for {seconds:g} s; {who} behind"
    lines = [f"  rank {rank}: {_place(facts)}" for rank, facts in there.items()]
    tail = f"  stacks in {folder}; every rank ends with {HUNG}, the last state saved stands"
    return "\n".join([head, *lines, tail]) + "\n"


def _place(facts: dict[str, Any]) -> str:
    stage = f"{facts['stage']} step {facts['step']}, {facts['phase'] or 'between phases'}" if facts["stage"] else ""
    where = f" on {facts['host']} (process {facts['pid']})" if "host" in facts else ""
    answer = "" if facts["answers"] else "; its process does not answer"
    return f"{stage or 'before its first step'}, {facts['beats']} beats{where}{answer}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _born(process: int | str) -> str:
    """When a process started, in the kernel's ticks; "" where it is not there or not to be seen."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
