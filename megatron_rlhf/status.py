"""How a run is doing, from the files of its folder alone: nothing is asked of the run. No torch."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megatron_rlhf.checkpoint.lock import FILE as LOCK
from megatron_rlhf.checkpoint.lock import SILENT
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import json_text
from megatron_rlhf.observe.now import FILE as NOW

_TAIL_BYTES = 512 * 1024
_ROWS = 20
"""Rows whose pace is taken for what is to come."""
_STATES = {
    "empty": "nothing of a run is here",
    "running": "running",
    "silent": "silent",
    "stopped": "stopped",
    "finished": "finished",
}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest state on disk."""

    stage: str
    name: str
    age: float


@dataclass(frozen=True, slots=True)
class Status:
    """One look at a run; what its files do not say is None or empty, and ages are in seconds."""

    folder: str
    state: str
    """empty, running, silent (its heartbeat stopped or its process is gone), stopped (it let the folder go before the
    stage's end) or finished."""
    since: float | None = None
    """Seconds in that state: of a running one since it started, of the others since the last sign of it."""
    holder: str = ""
    stage: str = ""
    step: int | None = None
    steps: int | None = None
    phase: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Of the newest row: tokens_per_second, kl, score, reward, drift and losses, where they are."""
    seconds_a_step: float | None = None
    seconds_left: float | None = None
    row_age: float | None = None
    saved: Saved | None = None
    slow_phase: str = ""
    slow_share: float | None = None
    slow_rank: int | None = None
    slow_ratio: float | None = None
    slow_rank_phase: str = ""
    faults: Sequence[str] = ()
    """What is wrong with the files, a sentence each."""

    def as_json(self) -> str:
        """Every field under its name."""
        return json_text(asdict(self))

    def as_text(self) -> str:
        """The same for people; of an empty folder one sentence."""
        if self.state == "empty":
            return "".join(f"{sentence}\n" for sentence in [f"{self.folder}: {_STATES['empty']}", *self.faults])
        lines = [f"{self.folder}: {self._where()}", *(f"  {name:<8}{text}" for name, text in self._lines() if text)]
        return "".join(f"{line}\n" for line in lines)

    def _where(self) -> str:
        step = "" if self.step is None else f", step {self.step}" + (f" of {self.steps}" if self.steps else "")
        phase = f", in {self.phase}" if self.phase and self.state in ("running", "silent") else ""
        return f"{self.stage or 'no stage yet'}{step}{phase}"

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "is", self._alive()
        speed = [f"{self.numbers['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in self.numbers else []
        yield "speed", ", ".join(speed + ([f"{_span(self.seconds_a_step)} a step"] if self.seconds_a_step else []))
        yield "numbers", ", ".join(f"{n} {v:.4g}" for n, v in self.numbers.items() if n != "tokens_per_second")
        saved = self.saved
        yield "saved", f"{saved.stage}/state/{saved.name}, {_span(saved.age)} ago" if saved else "nothing yet"
        yield "left", f"{_span(self.seconds_left)} of this stage" if self.seconds_left is not None else ""
        slow = [] if self.slow_share is None else [f"{self.slow_phase} takes {self.slow_share:.0%} of a step"]
        if self.slow_ratio is not None:
            most = f", most of it in {self.slow_rank_phase}" if self.slow_rank_phase else ""
            slow.append(f"rank {self.slow_rank} takes {self.slow_ratio:.2f} x the median rank's own seconds{most}")
        yield "slow", "; ".join(slow)
        yield "but", "; ".join(self.faults)

    def _alive(self) -> str:
        who = f", {self.holder}" if self.holder else ""
        last = f"; the last row is {_span(self.row_age)} old" if self.row_age is not None else ""
        since = "" if self.since is None else f" for {_span(self.since)}"
        return f"{_STATES[self.state]}{since}{who}{last}"


def look(folder: Path) -> Status:
    """The status of the run in `folder`; raises BadInput where that is no folder."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder of a run; write for example megatron-rlhf status runs/quickstart")
    faults: list[str] = []
    now, lock = _object(folder / NOW, faults), _object(folder / LOCK, faults)
    rows = _rows(folder / "log.jsonl", faults)
    saved, clock = _saved(folder), time.time()
    if not (now or rows or saved or (folder / LOCK).exists()):
        return Status(str(folder), "empty", faults=tuple(faults))
    stage = _text(now, "stage") or (str(rows[-1].get("phase", "")) if rows else "")
    mine = [row for row in rows if row.get("phase") == stage]
    newest: Row = mine[-1] if mine else {}
    step = _whole(now, "step")
    step = step if step is not None else (_whole(newest, "step") or 0) + 1 if newest else None
    steps, pace = _whole(now, "steps"), _pace(mine)
    over = "ended" in now or (steps is not None and step == steps)
    state, since, holder = _alive(folder, lock, now, clock, over)
    left = pace * max(0, steps - step) if pace is not None and steps is not None and step is not None else None
    share = _largest(newest.get("seconds_by_phase"))
    ratio, row_time = _number(newest, "slowest.ratio"), _number(newest, "time")
    return Status(
        folder=str(folder),
        state=state,
        since=since,
        holder=holder,
        stage=stage,
        step=step,
        steps=steps,
        phase=_text(now, "phase"),
        numbers={name: value for name in _shown(newest) if (value := _number(newest, name)) is not None},
        seconds_a_step=pace,
        seconds_left=left if state in ("running", "silent") else None,
        row_age=max(0.0, clock - row_time) if row_time is not None else None,
        saved=saved,
        slow_phase=share[0] if share else "",
        slow_share=share[1] if share else None,
        slow_rank=_whole(newest, "slowest.rank") if ratio is not None else None,
        slow_ratio=ratio,
        slow_rank_phase=_text(newest, "slowest.phase"),
        faults=tuple(faults),
    )


def _alive(folder: Path, lock: Row, now: Row, clock: float, over: bool) -> tuple[str, float | None, str]:
    """The state, the seconds in it, and who holds the folder."""
    sign = max((_modified(path) for path in (folder / LOCK, folder / NOW, folder / "log.jsonl")), default=0.0)
    silent = max(0.0, clock - sign) if sign else None
    if not lock:
        return ("finished" if over else "stopped"), silent, ""
    job = f" (job {lock['job']})" if lock.get("job") else ""
    holder = f"process {lock.get('pid', '?')} on {lock.get('host', '?')}{job}"
    gone = lock.get("host") == socket.gethostname() and not _runs(lock.get("pid"))
    if gone or clock - _modified(folder / LOCK) > SILENT:
        return "silent", silent, holder + (", which is gone" if gone else "")
    since = _number(lock, "since")
    return "running", max(0.0, clock - since) if since is not None else None, holder


def _saved(folder: Path) -> Saved | None:
    """The state whose manifest was written last; a state counts by its folder's name."""
    found = [
        (_modified(path), path.parents[2].name, path.parent.name)
        for path in folder.glob("*/state/step_*/manifest.json")
        if not path.parent.name.endswith((".partial", ".removed"))
    ]
    if not found:
        return None
    when, stage, name = max(found)
    return Saved(stage, name, max(0.0, time.time() - when))


def _rows(path: Path, faults: list[str]) -> list[Row]:
    """The rows in the file's tail; lines that are none are counted among the faults, the last one may be cut short."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    lines = lines[1 if size > _TAIL_BYTES else 0 : -1]
    found = [_parsed(line) for line in lines if line]
    if broken := sum(row is None for row in found):
        faults.append(f"{broken} of the last {len(found)} lines of {path.name} cannot be read")
    return [row for row in found if row is not None]


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _object(path: Path, faults: list[str]) -> Row:
    """The object in a file; an absent or empty one is empty, a damaged one too and is among the faults."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
        return {}
    found = _parsed(data) if data.strip() else {}
    if found is None:
        faults.append(f"{path.name} is damaged")
    return found or {}


def _pace(rows: Sequence[Row]) -> float | None:
    """Median seconds from row to row of the newest ones, by the clock that wrote them."""
    times = [time for row in rows[-_ROWS:] if (time := _number(row, "time")) is not None]
    apart = [later - earlier for earlier, later in zip(times, times[1:], strict=False) if later >= earlier]
    return median(apart) if apart else None


def _largest(seconds: object) -> tuple[str, float] | None:
    """The phase with the most seconds and its share of all."""
    if not isinstance(seconds, dict):
        return None
    found = {name: value for name in seconds if (value := _number(seconds, name)) is not None}
    total = sum(found.values())
    name = max(found, key=lambda name: found[name], default="")
    return (name, found[name] / total) if total > 0 else None


def _shown(row: Row) -> list[str]:
    first = ("tokens_per_second", "kl", "score", "reward", "drift")
    return [name for name in first if name in row] + [name for name in row if name.startswith("loss.")]


def _number(row: Row, name: str) -> float | None:
    """A finite number, None where there is none."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        return None
    return float(value)


def _whole(row: Row, name: str) -> int | None:
    value = row.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _runs(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _span(seconds: float | None) -> str:
    """3.1 s, 4 min 10 s, 2 h 5 min, 3 d 4 h."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.3g} s"
    for large, small, size, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if seconds < size * (24 if large == "h" else 60) or large == "d":
            return f"{int(seconds // size)} {large} {int(seconds % size // part)} {small}"
    raise AssertionError
