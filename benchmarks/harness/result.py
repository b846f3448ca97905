"""What every benchmark prints and writes: our numbers beside a rival's, with machine, versions and commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "transformers", "accelerate", "trl", "liger-kernel")
_LESS_IS_BETTER = {"s", "MiB"}
_MORE_IS_BETTER = {"tokens/s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number: `ours`, the rival's `theirs` and the `floor` no program can beat; None is one nobody measured."""

    case: str
    metric: str
    unit: str
    ours: float | None
    rival: str
    theirs: float | None = None
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better ours is, above 1 where it is better; None unless both were measured."""
        if not self.ours or not self.theirs:
            return None
        if self.unit in _LESS_IS_BETTER:
            return self.theirs / self.ours
        if self.unit in _MORE_IS_BETTER:
            return self.ours / self.theirs
        raise ValueError(f"whether more {self.unit} is better is not known")

    def record(self) -> dict[str, Any]:
        """The row as the file holds it: `ratio` before `floor`."""
        values = asdict(self)
        floor = values.pop("floor")
        return {**values, "ratio": self.ratio, "floor": floor}


def show(rows: Sequence[Row]) -> None:
    """Prints the rows as a table on standard output."""
    table = Table(*("case", "metric", "unit", "ours", "theirs", "ratio", "floor", "rival"), box=box.SIMPLE_HEAD)
    for column in table.columns[3:7]:
        column.justify = "right"
    for row in rows:
        numbers = [_text(number) for number in (row.ours, row.theirs, row.ratio, row.floor)]
        table.add_row(row.case, row.metric, row.unit, *numbers, row.rival)
    Console(width=max(120, Console().width)).print(table)


def write(path: Path, rows: Sequence[Row], gpu: str = "") -> None:
    """`path` holds the rows with the machine (and its `gpu`), the versions and the commit they were measured with."""
    result = {
        "machine": machine(gpu),
        "versions": versions(),
        "commit": commit(),
        "rows": [row.record() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def machine(gpu: str = "") -> dict[str, Any]:
    """The processor, the cores and memory this process may use, and the GPU's name where one was used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": gpu,
    }


def versions() -> dict[str, str]:
    """The versions of python and of the packages a result depends on, those that are installed."""
    return {"python": platform.python_version(), **{name: found for name in PACKAGES if (found := version(name))}}


def version(package: str) -> str:
    """The version of an installed package, nothing where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of the working tree, with "+changes" where tracked files differ from it; nothing outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _text(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}" if abs(number) >= 10 else f"{number:.3f}"
