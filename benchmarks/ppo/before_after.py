"""One PPO iteration of the quickstart in two checkouts of this repository, seconds by phase.

    python -m benchmarks.ppo.before_after BEFORE [AFTER] [--json FILE] [--iterations N] [--toy]

The sizes and settings are the quickstart's PPO stage on its four ranks (layout=cpu4, pretraining mix and all), with
random weights, so that every response has the same length on both sides; each side's code is its own checkout's, as
are its kernels, which must be built there. Both live at once and alternate iteration by iteration, whoever was second
first in the next round; a number is the median of a side's turns after warm-up. `ours` is AFTER, which is this checkout
unless it is named, `theirs` BEFORE; `ratio` > 1 means that the iteration has become faster.

On Linux phases whose code is the same may differ by a few per cent: glibc keeps freed memory up to twice the largest
block it has seen freed, so a side with smaller tensors returns more of it and pays for page faults.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import ppo_iteration
from benchmarks.harness import result
from benchmarks.harness.result import ROOT, Row
from benchmarks.harness.turns import Contestant
from benchmarks.ppo.task import TOY, Task

SETTINGS = ("layout=cpu4", "ppo.pretraining_coef=0.4")
RANKS = 4
WARM_UP = 1


def name(checkout: Path) -> str:
    """The checkout's commit and whether its kernels are built; RuntimeError where python would import other code."""
    asked = subprocess.run([sys.executable, "-c", _ASKED], cwd=checkout, capture_output=True, text=True)
    if asked.returncode:
        raise RuntimeError(f"{checkout} does not run its own code:\n{asked.stderr[-2000:]}")
    return asked.stdout.strip()


_ASKED = """
import importlib.util, pathlib, subprocess, megatron_rlhf
assert pathlib.Path(megatron_rlhf.__file__).resolve().is_relative_to(pathlib.Path.cwd().resolve())
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
built = importlib.util.find_spec("megatron_rlhf.ops.library") and importlib.import_module("megatron_rlhf.ops.library")
print(commit.strip() + (", kernels" if built and built.loaded() else ", no kernels"))
"""


def run(task: Task, before: Path, after: Path, iterations: int) -> list[Row]:
    """The rows of both checkouts' iterations."""
    names = [name(after), name(before)]
    taken: list[ppo_iteration.Turns] = [[], []]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = []
        for place, turns in zip((after, before), taken, strict=True):
            words = [task.word(), f"{folder}/{len(sides)}", *SETTINGS]
            side = Contestant("benchmarks.ppo.ours", words, ranks=RANKS, checkout=place)
            sides.append((stack.enter_context(side), turns))
        for _ in range(WARM_UP + iterations):
            for side, turns in sides:
                turns.append(side.turn())
            sides.reverse()
    mine, theirs = (turns[WARM_UP:] for turns in taken)
    return ppo_iteration.rows(f"quickstart, {names[0]}", task, mine, theirs, names[1])


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="the checkout to compare with")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="the checkout that is compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--iterations", type=int, default=8, help="measured turns of each side")
    parser.add_argument("--toy", action="store_true", help="a tiny task, to see that everything runs")
    asked = parser.parse_args()
    before, after = asked.before.resolve(), asked.after.resolve()
    found = run(TOY if asked.toy else Task(), before, after, asked.iterations)
    result.show(found)
    if asked.json:
        result.write(asked.json, found)


if __name__ == "__main__":
    main()
