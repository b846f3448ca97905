"""Weights from the train into the generate layout: seconds, bytes and memory, beside Megatron-Core and gathering.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python benchmarks/reshard.py [--json FILE] [--turns N] [--toy]

A GPT of 211 M parameters (16 layers, 1,024 wide, vocabulary 8,192, tied embeddings) lies in Megatron's parameter buffer
under the train layout and is brought into a second network under the generate layout, on gloo ranks of this machine,
one thread each. Two rivals, in the same processes and between the same live networks, take turns with ours:

* Megatron-Core: `megatron.core.resharding.swap_model_weights` with its gloo service, nothing changed in it
  (`benchmarks/movers/megatron.py` says what it needs on a CPU).
* gather, then slice: a broadcast over the pipeline and an all-gather over tensor parallelism of each layer as one flat
  buffer, then every rank cuts out its part (`benchmarks/movers/gathered.py`).

`first` is building (plan, groups, buffers) and the first run, once; `steady` the median of the turns after it, without
the two in which memory that a side takes and gives back settles. Before every turn the source's weights change sign,
and after the first and the last run every parameter is compared with the weights the target layout's own initialisation
gives: a side that gets one bit wrong is an error, not a row. `received` and `sent` are the bytes of the operations, of
the rank that has most. `peak extra memory` is resident memory above the two networks, of the rank that has most: what a
side keeps between runs and what it takes in one. The measure is checked against a known allocation first. `networks`
are both networks' weights: ours lets the target share what is the same on a rank. `proof` is what the product adds to
each move, a digest of all weights of both networks; `reshard.proof=never` leaves it out. `ratio` > 1 means ours is
better; `floor` is, for seconds, how long this machine's gloo takes for the same bytes between the same ranks in
messages of 64 MiB and nothing else, in turns with the sides; for bytes, what a rank needs and does not hold.

What is not equal:
* The rivals' target is a second network beside ours, of the same layout: ours takes over its target's memory (one flat
  buffer, shared with the source where a shard is the same), which a rival would then overwrite in place.
* All sides get the generate layout with its ranks dealt as our planner deals them. That helps the rivals, too, where tp
  changes: the usual order would have Megatron-Core move more.
* Ours has two staging buffers, 64 MiB together (`reshard.staging_mb=64`), where weights do not lie in one piece on both
  sides; the rivals' memory is not bounded by a setting.
* Megatron-Core finds no copy of a tied embedding in the last stage, and takes shards from the first replica that has
  them, wherever they are needed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import result
from benchmarks.harness.result import Row
from benchmarks.harness.turns import Contestant
from benchmarks.movers.task import FLOOR, SIDES, Task

MIB = 2**20
WARM_UP = 2
RIVALS = {"megatron": "Megatron-Core 0.16.1", "gathered": "gather, then slice"}
TASKS = (
    Task(ranks=4, source="tp2 pp2", target="tp2 dp2"),
    Task(ranks=8, source="tp2 pp2 dp2", target="tp2 dp4"),
    Task(ranks=4, source="tp4", target="tp2 dp2"),
    Task(ranks=4, source="tp2 pp2", target="tp2 dp2", precision="bf16"),
)

Turn = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the sides of one task gave in their turns, and the machine in the steady ones."""

    first: Turn
    steady: list[Turn]
    last: Turn


def measure(task: Task) -> Measured:
    """All turns of one task; RuntimeError when a side leaves a parameter that is not bitwise right."""
    if task.turns <= WARM_UP or task.turns % 2 == 0:
        raise ValueError(f"{task.turns} turns: an odd number above {WARM_UP} is needed, signs must end as they began")
    with Contestant("benchmarks.movers.side", [task.word()], ranks=task.ranks) as ranks:
        turns: list[Turn] = [ranks.turn() for _ in range(task.turns + 2)]
        found = Measured(turns[0], turns[1 + WARM_UP : -1], turns[-1])
    for name in SIDES:
        for when, turn in (("first", found.first), ("last", found.last)):
            if turn[name]["wrong"]:
                raise RuntimeError(f"{name} left {turn[name]['wrong']:.0f} parameters wrong in its {when} run")
    return found


def rows(task: Task, found: Measured) -> list[Row]:
    """The rows of one task."""
    case = f"{task.ranks} ranks, {task.source} -> {task.target}, {task.precision}"
    steady = {name: _median(found, name, "seconds") for name in (*SIDES, FLOOR)}
    numbers: list[tuple[str, str, dict[str, float], float | None]] = [
        ("first", "s", _of(found.first, "seconds", 1), None),
        ("steady", "s", steady, steady[FLOOR]),
        ("received", "MiB", _of(found.first, "received"), found.first["ours"]["bound"] / MIB),
        ("sent", "MiB", _of(found.first, "sent"), None),
        ("peak extra memory, first", "MiB", _of(found.first, "peak"), None),
        ("peak extra memory", "MiB", _of(found.last, "peak"), None),
        ("networks", "MiB", _of(found.first, "networks"), None),
    ]
    made = [
        Row(case=case, metric=metric, unit=unit, ours=of["ours"], rival=rival, theirs=of[side], floor=floor)
        for side, rival in RIVALS.items()
        for metric, unit, of, floor in numbers
    ]
    return [*made, Row(case=case, metric="proof", unit="s", ours=_median(found, "ours", "proof"), rival="none has one")]


def _median(found: Measured, side: str, key: str) -> float:
    return statistics.median(turn[side][key] for turn in found.steady)


def _of(turn: Turn, key: str, unit: float = MIB) -> dict[str, float]:
    return {name: turn[name][key] / unit for name in SIDES}


def run(tasks: Sequence[Task]) -> list[Row]:
    """The rows of all tasks."""
    return [row for task in tasks for row in rows(task, measure(task))]


def toy(task: Task) -> Task:
    """The task small enough to see in seconds that everything runs; its times mean nothing."""
    return replace(task, layers=4, hidden=64, heads=4, vocabulary=256, context=64, staging=1 << 17, turns=3)


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="gloo on CPU processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--turns", type=int, default=TASKS[0].turns, help="turns after the first, an odd number")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to see that everything runs")
    asked = parser.parse_args()
    tasks = [replace(task, turns=asked.turns) for task in TASKS]
    found = run([toy(task) for task in tasks] if asked.toy else tasks)
    result.show(found)
    if asked.json:
        result.write(asked.json, found)


if __name__ == "__main__":
    main()
