"""Proves, on a real SLURM, what slurm/job.sh does when its ranks end: which endings are queued again and which are not.

The ranks are a small program in the interpreter's place, told by `out` what to play, so a start takes a second.
Not proved here: the program itself under SLURM (test_runs.py), GPUs, containers, more than one machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.slurm import Slurm

ROOT = Path(__file__).resolve().parents[2]
PLAY = """\
#!{python} -S
import os, pathlib, signal, sys, time
out = pathlib.Path(next(word[4:] for word in sys.argv if word.startswith("out=")))
rank, start = int(os.environ["RANK"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
place = " ".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))
print("rank", place, "port", os.environ["MASTER_PORT"], flush=True)
def saved(step):
    folder = out / "ppo" / "state" / f"step_{{step}}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("x")
{play}
"""
PLAYS = {
    "crashing": "sys.exit(1)",
    "refusing": "time.sleep(1.5 * (rank > 0)); os._exit(2)",
    "advancing": "time.sleep(0.5); rank or saved(start + 1); sys.exit(0 if start == 4 else 75)",
    "deaf": """
if start == 0:
    time.sleep(1)
    signal.signal(signal.SIGUSR1, lambda *_: (rank or saved(1), os._exit(75)))
    print("listening", flush=True)
    time.sleep(60)
""",
    "obeying": """
signal.signal(signal.SIGTERM, lambda *_: (rank or saved(1), os._exit(75)))
print("listening", flush=True)
time.sleep(60)
""",
}


class Played:
    """A job that plays one of PLAYS in a folder of its own."""

    def __init__(self, slurm: Slurm, folder: Path, play: str, *words: str) -> None:
        """Submit it, with further words of sbatch."""
        self.slurm = slurm
        program = folder / "play"
        program.write_text(PLAY.format(python=sys.executable, play=PLAYS[play]))
        program.chmod(0o755)
        script = folder / "job.sbatch"
        script.write_text(
            "#!/usr/bin/env bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --requeue --open-mode=append\n"
            f"#SBATCH --output={folder}/log\nexport MRLHF_PYTHON={program}\n"
            f"exec {ROOT}/slurm/job.sh ppo out={folder}/out\n"
        )
        self.number = slurm.submit(*words, str(script))
        self.log = folder / "log"

    def said(self, times: int, text: str) -> bool:
        return self.log.exists() and self.log.read_text().count(text) >= times

    def until(self, times: int, text: str) -> None:
        self.slurm.until(lambda: self.said(times, text), f"the job never said '{text}' {times} times", 30)


def test_three_starts_without_progress_are_the_last(slurm: Slurm, tmp_path: Path) -> None:
    """It says so, with what the run stands at and what the last start ended with."""
    job = Played(slurm, tmp_path, "crashing")
    (tmp_path / "out" / "sft" / "weights").mkdir(parents=True)
    (tmp_path / "out" / "sft" / "weights" / "manifest.json").write_text("{}")
    ended = slurm.wait(job.number, 60)
    assert (ended.state, ended.restarts, ended.code) == ("FAILED", 2, 1), slurm.said(ended)
    sentence = "stopped: 3 starts in a row saved nothing new (newest: sft/weights), the last ended with 1"
    assert sentence in job.log.read_text()
    places = [line for line in job.log.read_text().splitlines() if line.startswith("rank")]
    assert {line.partition(" port")[0] for line in places[:4]} == {
        f"rank {rank} 4 {rank % 2} 2 127.0.0.1" for rank in range(4)
    }
    assert len({line.split()[-1] for line in places}) == 3, "each start has a port of its own"


@pytest.mark.slow
def test_progress_lets_it_start_as_often_as_it_takes(slurm: Slurm, tmp_path: Path) -> None:
    ended = slurm.wait(Played(slurm, tmp_path, "advancing").number, 90)
    assert (ended.state, ended.restarts, ended.code) == ("COMPLETED", 4, 0), slurm.said(ended)


def test_bad_input_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    """Though the first rank to refuse makes srun end the others."""
    ended = slurm.wait(Played(slurm, tmp_path, "refusing").number, 30)
    assert (ended.state, ended.restarts, ended.code) == ("FAILED", 0, 2), slurm.said(ended)


@pytest.mark.slow
def test_a_signal_reaches_ranks_that_were_still_coming_up(slurm: Slurm, tmp_path: Path) -> None:
    """One that comes before a rank has a handler does not kill it and is not lost."""
    job = Played(slurm, tmp_path, "deaf")
    job.until(4, "rank ")
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.number))
    ended = slurm.wait(job.number, 60)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), slurm.said(ended)
    assert "after ppo/state/step_1" in job.log.read_text()


@pytest.mark.slow
def test_a_preempted_job_saves_and_comes_back(slurm: Slurm, tmp_path: Path) -> None:
    """A job of more priority takes its nodes; within the grace time every rank saves."""
    job = Played(slurm, tmp_path, "obeying", "--partition=polite")
    job.until(4, "listening")
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 2")
    assert slurm.wait(urgent, 60).state == "COMPLETED"
    assert (tmp_path / "out" / "ppo" / "state" / "step_1").exists()
    slurm.wait(job.number, 60, lambda now: job.said(8, "listening"))
    assert slurm.job(job.number).restarts == 1 and "after ppo/state/step_1" in job.log.read_text()
    slurm.run("scancel", str(job.number))
    slurm.wait(job.number, 30)


def test_what_somebody_cancels_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    """The ranks save, as at any SIGTERM."""
    job = Played(slurm, tmp_path, "obeying")
    job.until(4, "listening")
    slurm.run("scancel", str(job.number))
    slurm.wait(job.number, 30)
    slurm.until(lambda: not slurm.run("squeue", "-h").strip(), "it is still there")
    time.sleep(1)
    ended = slurm.job(job.number)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), slurm.said(ended)
    assert (tmp_path / "out" / "ppo" / "state" / "step_1").exists()


def test_the_chain_is_three_jobs_and_a_failed_one_takes_the_rest_along(slurm: Slurm, tmp_path: Path) -> None:
    program = tmp_path / "play"
    program.write_text(PLAY.format(python=sys.executable, play="sys.exit(2 if 'reward' in sys.argv else 0)"))
    program.chmod(0o755)
    words = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={tmp_path}/%x.log"]
    chain = [str(ROOT / "slurm" / "pipeline.sh"), *words, "--", "experiment=quickstart", f"out={tmp_path}/out"]
    lines = slurm.run(*chain, environment={"MRLHF_PYTHON": str(program)}).split()
    assert lines[::2] == ["1_sft", "2_reward", "3_ppo"]
    states = [slurm.wait(int(number), 60).state for number in lines[1::2]]
    assert states == ["COMPLETED", "FAILED", "CANCELLED"]
    assert "rank 0 4 0 2 127.0.0.1" in (tmp_path / "mrlhf-sft.log").read_text()


def test_a_job_without_a_folder_says_what_it_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "slurm" / "job.sh"), "ppo"], env={"SLURM_JOB_ID": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "out=/scratch/run1" in done.stderr and not list(tmp_path.iterdir())
