"""Proves that the benchmark of moving weights says what was measured: rows are medians of the turns with the floor of
the same turns, a side with a wrong parameter is an error, the memory measure sees what is allocated and nothing that
was freed, and every side brings every bit in every case, at toy size.

Not proved here: the numbers, which a quiet machine measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reshard
from benchmarks.movers.task import FLOOR, SIDES, Task
from benchmarks.reshard import Measured

ROOT = Path(__file__).parents[1]
TASK = Task(ranks=4, source="tp2 pp2", target="tp2 dp2", turns=3)


def turn(**of: float) -> dict[str, float]:
    return of


def measured(wrong: float = 0.0) -> Measured:
    """Ours takes 2 s, Megatron-Core 4, gathering 8, the machine 1; the middle turn is the median."""
    seconds = dict(zip((*SIDES, FLOOR), (2.0, 4.0, 8.0, 1.0), strict=True))
    facts = {"seconds": 3.0, "peak": 2**20, "received": 2**20, "sent": 2**21, "networks": 2**22, "wrong": wrong}
    steady = [{name: turn(seconds=factor * at, proof=0.5) for name, at in seconds.items()} for factor in (9, 1, 0.5)]
    first = {name: turn(**facts, bound=2**19) for name in SIDES}
    return Measured(first, steady, {name: turn(peak=2**20 * at, wrong=wrong) for name, at in seconds.items()})


def test_rows_are_medians_beside_the_floor() -> None:
    found = reshard.rows(TASK, measured())
    assert {row.case for row in found} == {"4 ranks, tp2 pp2 -> tp2 dp2, fp32"}
    steady = {row.rival: row for row in found if row.metric == "steady"}
    assert [row.ratio for row in steady.values()] == [2.0, 4.0]
    assert {(row.ours, row.floor) for row in steady.values()} == {(2.0, 1.0)}
    received = next(row for row in found if row.metric == "received")
    assert (received.ours, received.floor) == (1.0, 0.5)
    memory_rows = [row for row in found if row.metric == "peak extra memory"]
    assert [row.ratio for row in memory_rows] == [2.0, 4.0]
    proof = [row for row in found if row.metric == "proof"]
    assert [(row.ours, row.theirs) for row in proof] == [(0.5, None)]


MEASURE = """
import torch
from benchmarks.movers import memory
memory.keep_freed(False)
memory.check()
peak = memory.Peak()
kept = torch.ones(48 << 20, dtype=torch.uint8)
torch.ones(16 << 20, dtype=torch.uint8)
print(peak.growth, peak.kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_measure_sees_what_is_there() -> None:
    """A block of 48 MiB that is kept, then 16 MiB that are freed while the first still lies there; in a process of its
    own, where nothing else comes and goes."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    growth, kept = map(int, done.stdout.split())
    assert growth == pytest.approx(64 << 20, rel=0.05)
    assert kept == pytest.approx(48 << 20, rel=0.05)


@pytest.mark.slow
def test_every_side_brings_every_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole program at toy size; ours receives the bound in every case, and nobody less."""
    monkeypatch.setattr(sys, "argv", ["reshard.py", "--toy", "--turns", "3", "--json", str(tmp_path / "out.json")])
    reshard.main()
    written = json.loads((tmp_path / "out.json").read_text())
    received = [row for row in written["rows"] if row["metric"] == "received"]
    assert len(received) == 2 * len(reshard.TASKS)
    assert all(row["ours"] == row["floor"] <= row["theirs"] for row in received)


def test_a_wrong_parameter_and_an_even_number_of_turns_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = measured(wrong=2.0)

    class Ranks:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.turns = iter([bad.first, *bad.steady, bad.last])

        def __enter__(self) -> Ranks:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def turn(self) -> Any:
            return next(self.turns)

    monkeypatch.setattr(reshard, "Contestant", Ranks)
    with pytest.raises(ValueError, match="an odd number above 2"):
        reshard.measure(replace(TASK, turns=4))
    with pytest.raises(RuntimeError, match="ours left 2 parameters wrong in its first run"):
        reshard.measure(TASK)
