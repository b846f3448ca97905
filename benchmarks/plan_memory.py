"""What a plan says of memory beside live tensors: roles that learn, on 4 CPU ranks, by cause.

    python benchmarks/plan_memory.py [--json FILE] [--toy]

A case is one role (a policy, tied or not, GPT or llama with grouped queries, fp32 or bf16, or a value model), its
layout, recompute choice and micro-batch, 4 layers of 128 over 1,024 words. Weights, gradients, optimizer and average
are storages that are there; activations are the most bytes that operations of one `accumulate` had alive together, and
reading those of one `forward`, as a hook on every operation counts them. Of the four ranks the one that holds most in
all is shown. It is a table of bytes: a busy machine changes nothing but for what gloo's threads hold a little longer.

The rival is the plan of the same role (megatron_rlhf/plan): `ratio` is planned / measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import result
from benchmarks.harness.result import Row
from tests.helpers import grid, measured_memory
from tests.helpers.measured_memory import CASES, QUICK, Case

MIB = 2**20
RIVAL = "the plan"
_ROLE = ("weights", "gradients", "optimizer", "average", "activations")


def rows(case: Case, ranks: Sequence[tuple[dict[str, float], dict[str, float]]]) -> list[Row]:
    """The busiest rank's rows: every cause, then all of them but what reading takes."""
    measured, planned = max(ranks, key=lambda pair: sum(pair[0][cause] for cause in _ROLE))
    causes = [cause for cause in (*_ROLE, "gather buffer", "reading") if measured[cause] or planned[cause]]

    def row(metric: str, ours: float, theirs: float) -> Row:
        return Row(case=str(case), metric=metric, unit="MiB", ours=ours / MIB, rival=RIVAL, theirs=theirs / MIB)

    found = [row(cause, measured[cause], planned[cause]) for cause in causes]
    return [*found, row("all", *(sum(each[cause] for cause in _ROLE) for each in (measured, planned)))]


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--toy", action="store_true", help="three cases, to see that everything runs")
    asked = parser.parse_args()
    found = []
    for case in QUICK if asked.toy else CASES:
        found += rows(case, grid.run(4, measured_memory.of_role, case=case))
    grid.close()
    result.show(found)
    if asked.json:
        result.write(asked.json, found)


if __name__ == "__main__":
    main()
