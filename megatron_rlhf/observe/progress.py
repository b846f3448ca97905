"""How far a phase is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from typing_extensions import Self

from megatron_rlhf.observe.log import CONSOLE

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """The progress of `total` steps named `label`; nothing is shown unless enabled (the first rank).

    Away from a terminal a line appears at most every 10 seconds, and one at the last step.
    """

    def __init__(self, enabled: bool, total: int, label: str, *, done: int = 0, console: Console | None = None) -> None:
        """Starts at `done` steps, for a run that goes on."""
        self._console = console or CONSOLE
        self._enabled, self._total, self._label, self._done = enabled, total, label, done
        self._bar: Bar | None = None
        self._printed = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        """Shows the bar, on a terminal."""
        if self._enabled and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves the bar as it is."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def advance(self, text: str) -> None:
        """One step further; `text` stands behind the bar or the line."""
        self._done += 1
        if self._bar:
            self._bar.update(self._task, advance=1, text=text)
        elif self._enabled and self._due():
            self._console.print(f"{self._label} {self._done}/{self._total} {text}".rstrip())

    def _due(self) -> bool:
        now = time.monotonic()
        if self._done != self._total and now - self._printed < _SECONDS_BETWEEN_LINES:
            return False
        self._printed = now
        return True
