"""Proves that the textfile is what node_exporter's collector takes: every line of the exposition format, gauges with
one help and type each, finite numbers, no timestamps; whole at every moment, and no reason to stop a run.

Not proved here: a scrape by a real node_exporter.
"""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path

from megatron_rlhf.observe.prometheus import Textfile

SAMPLE = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*\{[a-z]+="(\\.|[^"\\])*"(,[a-z]+="(\\.|[^"\\])*")*\} [-+0-9.e]+')
ROW = {
    **{"kl": 0.5, "loss.policy": -1e-9, "bad": math.nan, "slowest.phase": "policy", "slowest.rank": 3},
    "seconds_by_phase": {"generate": 2.5, "policy": 1.0},
}


def samples(text: str) -> dict[str, float]:
    """Value by name and labels; every other line is a help or a type of the samples below it."""
    found: dict[str, float] = {}
    kinds: list[str] = []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert kind == "gauge" and name not in kinds
            kinds.append(name)
        elif not line.startswith("# HELP "):
            assert SAMPLE.fullmatch(line), line
            assert line.partition("{")[0] == kinds[-1]
            name, _, value = line.rpartition(" ")
            assert name not in found
            found[name] = float(value)
    return found


def test_every_finite_number_of_the_newest_rows_is_a_gauge(tmp_path: Path) -> None:
    file = Textfile(tmp_path / "run.prom", 'a "run"\\')
    file.scalars("sft", 9, {"kl": 7})
    file.scalars("ppo", 3, {"kl": 0.25})
    file.scalars("ppo", 4, ROW)
    found = samples((tmp_path / "run.prom").read_text())
    mine = r'run="a \"run\"\\",stage="ppo"'
    assert found.pop(f"megatron_rlhf_row_time_seconds{{{mine}}}") > 1.7e9
    assert {name: value for name, value in found.items() if "ppo" in name} == {
        f"megatron_rlhf_step{{{mine}}}": 4,
        f"megatron_rlhf_kl{{{mine}}}": 0.5,
        f"megatron_rlhf_loss_policy{{{mine}}}": -1e-9,
        f"megatron_rlhf_slowest_rank{{{mine}}}": 3,
        f'megatron_rlhf_phase_seconds{{{mine},phase="generate"}}': 2.5,
        f'megatron_rlhf_phase_seconds{{{mine},phase="policy"}}': 1.0,
    }
    assert found[r'megatron_rlhf_kl{run="a \"run\"\\",stage="sft"}'] == 7
    assert [item.name for item in tmp_path.iterdir()] == ["run.prom"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, file, over = tmp_path / "run.prom", Textfile(tmp_path / "run.prom", "r"), threading.Event()
    file.scalars("ppo", 0, ROW)
    lengths: set[int] = set()

    def reads() -> None:
        while not over.is_set():
            lengths.add(len(samples(path.read_text())))

    reader = threading.Thread(target=reads)
    reader.start()
    for step in range(200):
        file.scalars("ppo", step, {**ROW, **{f"x{n}": n for n in range(50)}})
    over.set()
    reader.join()
    assert lengths <= {7, 57} and len(samples(path.read_text())) == 57


def test_what_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Textfile(tmp_path / "file" / "run.prom", "r").scalars("ppo", 1, ROW)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
