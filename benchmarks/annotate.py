"""Annotate's policy pass where the vocabulary is wide: peak memory beside what a formula says, and seconds.

    python benchmarks/annotate.py [--json FILE] [--turns N] [--toy]

A pass is `Engine.forward`, without gradient, of a GPT of 4 layers, 256 wide, 50,304 words, over 32 rows of 128 prompt
and 128 response tokens in one micro-batch, fp32, on one rank of two threads and on two ranks (tp2) of one. Sides, each
in processes of its own, which take turns; numbers are medians of them:

* now: the head sees the positions that predict response tokens, at most 1,024 of them at a time.
* kernels only: the head makes the logits of every position, as Megatron-Core's GPTModel does, and the kernels take the
  log-probs off them; a reconstruction of what the product did with kernels and GPTModel.
* before: the same without kernels, by the Python reference, which takes a few rows at a time; a reconstruction of what
  the product did before it had any.
* eager: the same by `logits.float().log_softmax(-1).gather(...)`, the usual way, which the product never had. It needs
  the vocabulary whole and has one rank only.

Extra memory is resident memory above what the process held before the pass, of the rank that has most; the measure is
checked against a known allocation first. Beside it stands the formula, with r rows of T positions, of which N predict a
response token, H hidden, V/tp words and 4 bytes a number:

    now                      4 (min(N, 1024) V/tp + r T H + 2 N H)     tp1: 213 MiB     tp2: 114 MiB
    the others               4 (2 r T V/tp + 2 r T H)                  tp1: 3,160 MiB   tp2: 1,588 MiB

The first: logits of one piece, hidden states of all positions, and those of N picked twice. The others: GPTModel makes
logits [T, r, V/tp] and then their copy [r, T, V/tp], while embeddings and hidden states still lie there; at that moment
nobody has asked for a log-prob, so kernels do not lower this peak, and eager's second tensor comes when the first of
the two is gone. The predicted drop is the difference: 2,948 MiB and 1,474 MiB.

`ratio` > 1 means ours is better; in rows whose rival is the formula it is predicted / measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.annotating.task import NOW, SIDES, Task
from benchmarks.harness import result
from benchmarks.harness.result import Row
from benchmarks.harness.turns import Contestant

MIB = 2**20
AT_ONCE = 1024
FORMULA = "the formula"
TASKS = (Task(), Task(tp=2))
TOY = Task(layers=2, hidden=32, heads=2, vocabulary=4096, rows=16, length=64, prompt=48)
_NEAR = 1e-4

Numbers = dict[str, float]


def measure(task: Task, turns: int) -> dict[str, Numbers]:
    """Medians of the task's sides, which take turns, whoever was last first in the next round."""
    names = [side for side in SIDES if side != "eager" or task.tp == 1]
    taken: dict[str, list[Numbers]] = {name: [] for name in names}
    with ExitStack() as stack:
        sides = [
            Contestant(
                "benchmarks.annotating.side",
                [replace(task, side=name).word()],
                ranks=task.tp,
                threads=2 if task.tp == 1 else 1,
            )
            for name in names
        ]
        order = [(name, stack.enter_context(side)) for name, side in zip(names, sides, strict=True)]
        for _ in range(turns):
            for name, side in order:
                taken[name].append(side.turn())
            order.reverse()
    return {name: {key: statistics.median(turn[key] for turn in of) for key in of[0]} for name, of in taken.items()}


def rows(task: Task, found: dict[str, Numbers]) -> list[Row]:
    """The rows of one task; RuntimeError where two sides disagree on the mean log-prob."""
    means = [numbers["mean"] for numbers in found.values()]
    if max(means) - min(means) > _NEAR:
        raise RuntimeError(f"the sides' mean log-probs are {means}")
    formula = {side: replace(task, side=side).predicted(AT_ONCE) / MIB for side in found}
    extra = {side: numbers["extra"] / MIB for side, numbers in found.items()}
    rivals = [side for side in found if side != NOW]

    def row(metric: str, unit: str, ours: float, rival: str, theirs: float) -> Row:
        return Row(case=task.name, metric=metric, unit=unit, ours=ours, rival=rival, theirs=theirs)

    return [
        *(row(f"extra peak memory, {side}", "MiB", extra[side], FORMULA, formula[side]) for side in found),
        *(
            row(f"drop from {side}", "MiB", extra[side] - extra[NOW], FORMULA, formula[side] - formula[NOW])
            for side in rivals
        ),
        *(row("extra peak memory", "MiB", extra[NOW], side, extra[side]) for side in rivals),
        *(row("seconds", "s", found[NOW]["seconds"], side, found[side]["seconds"]) for side in rivals),
    ]


def run(tasks: Sequence[Task], turns: int) -> list[Row]:
    """The rows of all tasks."""
    return [row for task in tasks for row in rows(task, measure(task, turns))]


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="resident memory of CPU processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--turns", type=int, default=5, help="measured passes of each side")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that everything runs")
    asked = parser.parse_args()
    found = run([TOY, replace(TOY, tp=2)] if asked.toy else TASKS, asked.turns)
    result.show(found)
    if asked.json:
        result.write(asked.json, found)


if __name__ == "__main__":
    main()
