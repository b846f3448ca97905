"""Proves, on a real SLURM of two nodes, that a sweep becomes a job array for each number of ranks through Hydra's
submitit launcher, that its points run on one and on two nodes, and that a report comes of it.

Not proved here: GPUs, and time limits of real queues.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlhf import cli
from megatron_rlhf.config import multirun
from tests.helpers import data_room
from tests.helpers.slurm import Slurm

ROOT = Path(__file__).resolve().parents[2]
POINTS = {"laptop_strong/1": 1, "laptop_strong/2dp": 2, "laptop_weak/2": 2, "laptop_strong/4dp": 4}
"""The last one on two nodes of two tasks."""


@pytest.mark.slow
@pytest.mark.skipif(
    "slurm" not in multirun.launchers(), reason="hydra-submitit-launcher is not installed (extra slurm)"
)
def test_four_points_are_submitted_measured_and_reported(slurm: Slurm, tmp_path: Path) -> None:
    data_room.write(tmp_path / "data")
    out = tmp_path / "sweep"
    command = [
        *(sys.executable, "-m", "megatron_rlhf", "ppo", "--multirun", *data_room.SETTINGS, "checkpoint.untrained=true"),
        *(f"scaling={','.join(POINTS)}", f"data.directory={tmp_path / 'data'}", f"out={out}", "cluster.node=2"),
        *("hydra/launcher=slurm", "hydra.launcher.timeout_min=5"),
    ]
    environment = {**slurm.environment, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:] + logs(out)
    facts = json.loads((out / "sweep.json").read_text())
    sizes = {(f"hydra.launcher.nodes={n}", f"hydra.launcher.tasks_per_node={t}") for n, t in ((1, 1), (1, 2), (2, 2))}
    assert {tuple(group["hydra"][:2]) for group in facts["groups"]} == sizes
    jobs = slurm.run("scontrol", "show", "job", "-o").splitlines()
    arrays = [dict(word.split("=", 1) for word in job.split() if "=" in word) for job in jobs]
    mine = [job for job in arrays if job["JobName"] == "ppo"]
    assert sorted(job["NumNodes"].partition("-")[0] for job in mine) == ["1", "1", "1", "2"]
    assert len({job.get("ArrayJobId", job["JobId"]) for job in mine}) == 3, "the two points of two ranks are one array"
    assert {job["JobState"] for job in mine} == {"COMPLETED"}
    for point, world in zip(facts["points"], POINTS.values(), strict=True):
        found = json.loads((out / point["name"] / "measurement.json").read_text())
        assert (found["world"], found["steps"]) == (world, 2) and found["seconds"] > 0
    assert cli.main(["report", "scaling", str(out)]) == 0
    report = json.loads((out / "scaling.json").read_text())
    (strong,) = [curve for curve in report["curves"] if curve["kind"] == "strong"]
    assert [point["ranks"] for point in strong["points"]] == [1, 2, 4] and not report["missing"]


def logs(out: Path) -> str:
    """The ends of what the jobs said."""
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(out.rglob("*_log.*")))
