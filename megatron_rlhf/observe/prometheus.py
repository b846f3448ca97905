"""The newest row of every stage as a file for the textfile collector of Prometheus's node_exporter. No torch.

Text exposition format 0.0.4 without timestamps, which the collector refuses; it reads files named *.prom.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.observe.log import write_bytes

PREFIX = "megatron_rlhf"
_HELP = {
    "step": "Number of the newest row of log.jsonl",
    "row_time_seconds": "Unix time of that row",
    "phase_seconds": "Seconds of that step by phase",
    "slowest_rank": "Rank with the most seconds of its own",
    "slowest_ratio": "Its seconds over the median rank's",
}


class Textfile:
    """One file of gauges, written anew with every row, whole or not at all."""

    def __init__(self, path: Path, run: str) -> None:
        """`run` is the label that tells runs on one machine apart."""
        self._path, self._run = path, run
        self._rows: dict[str, dict[tuple[str, str], float]] = {}

    def scalars(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """`values` take the place of the last row of the stage; a number that is not finite is left out.

        A file that cannot be written does not stop the run.
        """
        row = {**values, "step": step, "time": round(time.time(), 3)}
        self._rows[phase] = {name: value for name, value in _gauges(row) if math.isfinite(value)}
        try:
            write_bytes(self._path, self.text().encode(), sync=False)
        except OSError:
            return

    def close(self) -> None:
        """Leaves the file with the last row, whose time tells that nothing came after it."""

    def text(self) -> str:
        """Every gauge with its help and its type, one sample a stage and part."""
        samples: dict[str, list[str]] = {}
        for stage, found in self._rows.items():
            for (name, part), value in found.items():
                labels = {"run": self._run, "stage": stage, **({"phase": part} if part else {})}
                words = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
                samples.setdefault(name, []).append(f"{PREFIX}_{name}{{{words}}} {value!r}")
        return "".join(
            f"# HELP {PREFIX}_{name} {_HELP.get(name, f'{name} of log.jsonl')}\n# TYPE {PREFIX}_{name} gauge\n"
            + "".join(f"{line}\n" for line in lines)
            for name, lines in sorted(samples.items())
        )


def _gauges(row: Mapping[str, Any]) -> list[tuple[tuple[str, str], float]]:
    found: list[tuple[tuple[str, str], float]] = []
    for name, value in row.items():
        if name == "seconds_by_phase" and isinstance(value, Mapping):
            found += [(("phase_seconds", part), float(seconds)) for part, seconds in value.items()]
        elif isinstance(value, int | float):
            gauge = "row_time_seconds" if name == "time" else re.sub(r"[^a-zA-Z0-9_]", "_", name)
            found.append(((gauge, ""), float(value)))
    return found


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
