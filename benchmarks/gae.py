"""Advantages of a batch of responses: one scan a row beside a loop over positions in torch.

python benchmarks/gae.py [--device cpu|cuda] [--json FILE] [--turns N] [--toy]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.result import Row
from benchmarks.kernels import duel
from benchmarks.kernels.task import Task


def main() -> None:
    """Measures, prints the table and writes the file."""
    asked = duel.options(__doc__ or "")
    found: list[Row] = []
    gpu = ""
    for rows, columns in ((4, 8),) if asked.toy else ((64, 64), (512, 1024)):
        task = Task(operator="gae", rows=rows, columns=columns, device=asked.device)
        made, gpu = duel.rows(task, [("ours", "torch")], turns=asked.turns, passes=0, memory=False)
        found += made
    duel.finish(found, gpu, asked.json)


if __name__ == "__main__":
    main()
