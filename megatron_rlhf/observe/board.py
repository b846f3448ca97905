"""TensorBoard scalars. Optional: without the tensorboard package log.jsonl still holds every number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


def numbers(phase: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row under the tags `phase/name`, seconds by phase among them."""
    seconds = dict(values.get("seconds_by_phase") or {})
    flat = {**values, **{f"seconds.{name}": value for name, value in seconds.items()}}
    return {
        f"{phase}/{name}": value
        for name, value in flat.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


class Drawn(Protocol):
    """Where a row's numbers are drawn."""

    def scalars(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Add the finite numbers of `values`."""

    def close(self) -> None:
        """Write what is still held."""


class Board:
    """One TensorBoard writer of a run; it writes nothing where tensorboard is not installed."""

    def __init__(self, directory: Path) -> None:
        """Opens an events file in `directory`."""
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(directory), flush_secs=10)

    def scalars(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds the finite numbers of `values` under the tags `phase/name`."""
        if self._writer is None:
            return
        for tag, value in numbers(phase, values).items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes and closes the events file."""
        if self._writer is not None:
            self._writer.close()
