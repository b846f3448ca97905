"""Drawing a word a row with its log-prob: one pass over the logits beside noise, argmax and log_softmax in torch.

    python benchmarks/sample.py [--device cpu|cuda] [--json FILE] [--turns N] [--toy]

Both sides draw the same words: the noise is the same function of row and word. The floor is one read of the logits.
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
    sizes = ((4, 100),) if asked.toy else ((8, 50304), (64, 50304), (256, 6288))
    for rows, columns in sizes:
        task = Task(operator="sample", rows=rows, columns=columns, device=asked.device)
        made, gpu = duel.rows(task, [("ours", "torch")], turns=asked.turns, passes=1)
        found += made
    duel.finish(found, gpu, asked.json)


if __name__ == "__main__":
    main()
