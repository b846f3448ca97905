"""Log-probs of targets, with and without entropy, forward and backward: seconds, processor time and peak memory.

    python benchmarks/logprob.py [--device cpu|cuda] [--json FILE] [--turns N] [--toy]

A turn computes the log-probs (and entropies) of N rows of V logits and the gradient of the logits. Rivals: eager
log_softmax and gather, the same with the entropy -sum p log p, torch's cross_entropy; on a GPU also torch.compile of
the eager code, Megatron-Core's fused cross-entropy and Liger's, where they are installed. Every side is a process of
its own with two threads; numbers are medians of its turns; seconds on a GPU lie between two events of its queue, behind
a sweep of its cache. Extra memory is the peak of the first turn above what the process held with the logits; in place,
the gradient takes the logits' memory and is not in it, out of place and with every rival it is. The floor of the
seconds: the logits read for the forward pass, read and written for the backward, at the bandwidth of a copy measured in
the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.result import Row
from benchmarks.kernels import duel
from benchmarks.kernels.task import Task

CPU = (
    ("ours in place, entropy", "eager, entropy"),
    ("ours in place, entropy", "eager"),
    ("ours, entropy", "eager, entropy"),
    ("ours, entropy", "eager"),
    ("ours in place", "cross_entropy"),
)
CUDA = (
    *CPU,
    ("ours in place, entropy", "torch.compile, entropy"),
    ("ours in place", "torch.compile"),
    ("ours in place", "Megatron-Core"),
    ("ours in place", "Liger"),
)
PASSES = 3


def tasks(device: str, toy: bool) -> list[Task]:
    """The sizes of a device."""
    if toy:
        return [Task(operator="logprob", rows=8, columns=100, device=device)]
    if device == "cpu":
        sizes: Sequence[tuple[int, int, str]] = ((2048, 50304, "float32"),)
    else:
        sizes = [
            (rows, columns, dtype)
            for rows in (2048, 8192, 32768)
            for columns in (6288, 50304, 128256, 152064)
            for dtype in ("bfloat16", "float32")
            # eager code with the entropy holds five fp32 copies
            if rows * columns * 20 < 100 * 2**30
        ]
    return [Task(operator="logprob", rows=n, columns=v, dtype=dtype, device=device) for n, v, dtype in sizes]


def main() -> None:
    """Measures, prints the table and writes the file."""
    asked = duel.options(__doc__ or "")
    found: list[Row] = []
    gpu = ""
    for task in tasks(asked.device, asked.toy):
        rows, gpu = duel.rows(task, CUDA if asked.device == "cuda" else CPU, turns=asked.turns, passes=PASSES)
        found += rows
    duel.finish(found, gpu, asked.json)


if __name__ == "__main__":
    main()
