"""TensorBoard scalars. Optional: without the tensorboard package log.jsonl still holds every number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(f"{phase}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the events file."""
        if self._writer is not None:
            self._writer.close()
