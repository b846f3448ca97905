"""Everything a run writes down: files that are whole or absent, `log.jsonl`, numbers on its boards, lines on stderr.

Imports no torch, so that planning and `--help` stay light; TensorBoard lives in `board`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from typing_extensions import Self

from megatron_rlhf.observe.board import Board, Drawn

CONSOLE = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
"""The process's one console; progress bars share it, so that lines print above them."""

_OWN = ("step", "phase", "time")


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """`path` holds `data`, or what it held before: written beside, synced to disk, then renamed. Makes its folder.

    What a crash of the machine may take needs no `sync`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`path` holds `text` in UTF-8, or what it held before."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`path` holds `value` as indented JSON, non-finite floats as null, or what it held before."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON, non-finite floats as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _tensorboard(directory: Path) -> list[Drawn]:
    return [Board(directory / "tensorboard")]


class Log:
    """The rows of a run: one JSON line each in `directory/log.jsonl`, their numbers on the run's boards.

    A Log that is not enabled (every rank but the first) writes and says nothing; one without directory only says.
    """

    def __init__(
        self, directory: Path | None, enabled: bool, boards: Callable[[Path], Sequence[Drawn]] = _tensorboard
    ) -> None:
        """Opens nothing yet; a line that an earlier process left unfinished is cut off before the first row.

        `boards` opens where the numbers are drawn, `directory/tensorboard` alone unless it is given.
        """
        self._directory = directory if enabled else None
        self._enabled = enabled
        self._file: IO[str] | None = None
        self._open = boards
        self._boards: Sequence[Drawn] | None = None

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def row(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends `step`, `phase`, `time` (Unix seconds) and `values`; ValueError if those name one of the three."""
        taken = [name for name in _OWN if name in values]
        if taken:
            raise ValueError(f"a row's {taken[0]} is the log's own; give the value of phase '{phase}' another name")
        if self._directory is None:
            return
        own = {"step": step, "phase": phase, "time": round(time.time(), 3)}
        line = json.dumps(_finite({**own, **values}), ensure_ascii=False, allow_nan=False)
        self._file = self._file or _opened(self._directory / "log.jsonl")
        self._file.write(line + "\n")
        self._file.flush()
        if self._boards is None:
            self._boards = self._open(self._directory)
        for board in self._boards:
            board.scalars(phase, step, values)

    def truncate_after(self, phase: str, step: int) -> None:
        """Drops the rows of `phase` with a larger step than `step`, and lines cut short; a run resumed there does so.

        Modifies: log.jsonl. TensorBoard draws a repeated step over the earlier one.
        """
        if self._directory is None:
            return
        if self._file:
            self._file.close()
            self._file = None
        path = self._directory / "log.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            write_text(path, "".join(f"{line}\n" for line in lines if _stays(line, phase, step)))

    def say(self, text: str) -> None:
        """Prints one plain line on stderr."""
        if self._enabled:
            CONSOLE.print(text)

    def close(self) -> None:
        """Closes the files; a later row opens them anew."""
        if self._file:
            self._file.close()
        for board in self._boards or ():
            board.close()
        self._file = self._boards = None


def _opened(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
    return path.open("a", encoding="utf-8")


def _stays(line: str, phase: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return False
    return row["phase"] != phase or int(row["step"]) <= step


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
