"""Proves that the operators' benchmarks run every side on the CPU, that what a GPU is asked follows the plan, and that
a result measured without a GPU says so.

Not proved here: the numbers, which a quiet machine measures; anything on a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import gae, logprob, sample
from benchmarks.kernels import contestant, sides
from benchmarks.kernels.task import Task
from megatron_rlhf.ops import library

ROOT = Path(__file__).resolve().parents[1]
SIDES = {
    "logprob": list(dict.fromkeys(side for pair in logprob.CPU for side in pair)),
    "sample": ["ours", "torch"],
    "gae": ["ours", "torch"],
}


@pytest.mark.parametrize("operator", SIDES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_side_of_an_operator_runs(operator: str, dtype: str) -> None:
    """In this process, at toy size: what a GPU would be given, on the CPU."""
    if not library.loaded():
        pytest.skip(library.WHY_NOT)
    for side in [*SIDES[operator], "copy"]:
        task = Task(operator=operator, side=side, rows=4, columns=100, dtype=dtype)
        found = contestant.measured("cpu", *sides.turn(task))
        assert found["seconds"] > 0 and found["cpu"] >= 0 and found["extra"] >= 0


def test_the_sizes_of_a_gpu_hold_the_shapes_of_the_plan() -> None:
    """Tokens, vocabularies and shards, in bf16 and fp32, none beyond what eager code can hold in 100 GiB."""
    sizes = {(task.rows, task.columns, task.dtype) for task in logprob.tasks("cuda", toy=False)}
    assert {(8192, 50304, "bfloat16"), (8192, 6288, "bfloat16"), (8192, 128256, "float32")} <= sizes
    assert {"torch.compile", "Megatron-Core", "Liger"} < {side for pair in logprob.CUDA for side in pair}


@pytest.mark.parametrize(
    "program", [gae, pytest.param(sample, marks=pytest.mark.slow), pytest.param(logprob, marks=pytest.mark.slow)]
)
def test_a_result_says_where_no_gpu_was(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Table and file of a whole program at toy size end with it; so do the committed ones."""
    name = program.__name__.rpartition(".")[2]
    monkeypatch.setattr(sys, "argv", [name, "--toy", "--turns", "1", "--json", str(tmp_path / "out.json")])
    program.main()
    for path in (tmp_path / "out.json", ROOT / "benchmarks" / "results" / f"{name}.json"):
        written = json.loads(path.read_text())
        if not written["machine"]["gpu"]:
            assert written["rows"][-1]["rival"] == "not run on a GPU" and written["rows"][-1]["ours"] is None
            assert all(row["ours"] is not None for row in written["rows"][:-1])
