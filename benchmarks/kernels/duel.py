"""Our side and each rival, one after the other in processes of their own, and the rows of a result."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import result
from benchmarks.harness.result import Row
from benchmarks.harness.turns import Contestant
from benchmarks.kernels.task import Task

MIB = 2**20
NO_GPU = Row(case="--device cuda", metric="seconds", unit="s", ours=None, rival="not run on a GPU")
"""What a result says that was measured without a GPU."""
Numbers = dict[str, float]
Pairs = Sequence[tuple[str, str]]


def _measure(task: Task, turns: int) -> tuple[Numbers, str]:
    """Medians of one side and the GPU's name."""
    with Contestant("benchmarks.kernels.contestant", [task.word()], threads=2, device=task.device) as side:
        taken = [side.turn() for _ in range(turns)]
        medians = {key: statistics.median(turn[key] for turn in taken) for key in ("seconds", "cpu")}
        return {**medians, "extra": side.facts["extra"]}, side.facts["gpu"]


def rows(task: Task, pairs: Pairs, *, turns: int, passes: float, memory: bool = True) -> tuple[list[Row], str]:
    """The rows of (ours, rival) pairs and the GPU's name; a side that cannot run here has no number.

    The floor of the seconds is `passes` reads or writes of the logits at the bandwidth of a copy (two passes).
    """
    found: dict[str, Numbers] = {}
    lost: dict[str, str] = {}
    gpu = ""
    for side in dict.fromkeys([*(["copy"] if passes else []), *(side for pair in pairs for side in pair)]):
        try:
            found[side], gpu = _measure(replace(task, side=side), turns)
        except RuntimeError as error:
            lost[side] = f"{side}: not run, {str(error).strip().splitlines()[-1]}"
    floor = found["copy"]["seconds"] * passes / 2 if "copy" in found else None
    metrics = [("seconds", "seconds", "s", 1.0)]
    metrics += [("CPU time", "cpu", "s", 1.0)] if task.device == "cpu" else []
    metrics += [("extra peak memory", "extra", "MiB", MIB)] if memory else []
    made = []
    for ours, rival in pairs:
        for metric, key, unit, scale in metrics:
            mine, theirs = (found[side][key] / scale if side in found else None for side in (ours, rival))
            made.append(
                Row(
                    case=f"{task.name}: {lost.get(ours, ours)}",
                    metric=metric,
                    unit=unit,
                    ours=mine,
                    rival=lost.get(rival, rival),
                    theirs=theirs,
                    floor=floor if key == "seconds" else None,
                )
            )
    return made, gpu


def options(description: str) -> argparse.Namespace:
    """What every benchmark of an operator is asked."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--turns", type=int, default=7, help="measured turns of each side in each case")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that everything runs")
    return parser.parse_args()


def finish(found: Sequence[Row], gpu: str, path: Path | None) -> None:
    """Prints the table and writes the file; both say so where nothing ran on a GPU."""
    found = found if gpu else [*found, NO_GPU]
    result.show(found)
    if path:
        result.write(path, found, gpu)
