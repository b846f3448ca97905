"""What a run does at this moment, in `now.json`, for people and programs who look from outside. No torch.

It is a convenience: a disk that is full or gone never stops a run here, and nothing is synced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.observe.log import json_text, write_bytes

FILE = "now.json"
_SECONDS_BETWEEN_STEPS = 1.0


class Now:
    """The stage, the step of how many and the phase that a run is in; one without a folder says nothing."""

    def __init__(self, directory: Path | None, facts: Mapping[str, Any] | None = None) -> None:
        """`facts` stand in every version of the file, such as the ranks of the world."""
        self._path = directory / FILE if directory else None
        self._facts = {**(facts or {}), "started": round(time.time(), 3)}
        self._at: dict[str, Any] = {}
        self._written = self._stepped = 0.0
        self._step_seconds = math.inf

    def stage(self, name: str, steps: int, done: int = 0) -> None:
        """A stage of `steps` steps begins, or goes on after `done`."""
        self._at = {"stage": name, "step": done, "steps": steps, "phase": ""}
        self._stepped, self._step_seconds = time.monotonic(), math.inf
        self._write()

    def step(self, done: int) -> None:
        """`done` steps of the stage are done; written at most once a second, the last one always."""
        now = time.monotonic()
        self._stepped, self._step_seconds = now, now - self._stepped
        self._at |= {"step": done}
        if done == self._at.get("steps") or time.monotonic() - self._written >= _SECONDS_BETWEEN_STEPS:
            self._write()

    def phase(self, name: str) -> None:
        """A phase inside a step begins; one as short as the step before it may go unwritten."""
        quick = self._step_seconds < _SECONDS_BETWEEN_STEPS
        self._at |= {"phase": name}
        if not quick or time.monotonic() - self._written >= _SECONDS_BETWEEN_STEPS:
            self._write()

    def end(self) -> None:
        """The stage is over."""
        self._at |= {"phase": "", "ended": round(time.time(), 3)}
        self._write()

    def _write(self) -> None:
        if self._path is None or "stage" not in self._at:
            return
        self._written = time.monotonic()
        text = json_text({**self._facts, **self._at, "time": round(time.time(), 3)})
        try:
            write_bytes(self._path, text.encode(), sync=False)
        except OSError:
            return
