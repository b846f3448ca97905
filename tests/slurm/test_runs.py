"""Proves, on a real SLURM of two nodes, that runs survive: a signal before the walltime, a killed rank, a killed node
and a rank that hangs cost what was not saved, and the run ends bit-equal to one that nothing disturbed.

Every run is submitted by `megatron-rlhf submit`, as a person would. The undisturbed run starts its ranks on this
machine without SLURM. Not proved here: GPUs, NCCL, containers, more than one machine.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.helpers.slurm import Slurm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.resume import chain, record  # noqa: E402

TINY = (
    *("model.layers=1", "model.hidden=32", "reward_model.layers=1", "reward_model.hidden=32", "pretrain.length=32"),
    *("model.vocabulary=300", "reward_model.vocabulary=300", "data.min_response_tokens=1", "pretrain.batch=4"),
)
LIMIT = 280.0
"""Seconds within which a run ends, on a machine that other work shares."""


def submit(slurm: Slurm, verb: str, out: Path, *words: str) -> list[int]:
    """The jobs that `megatron-rlhf submit` makes of a verb."""
    asked = ["submit", verb, "experiment=quickstart", f"out={out}", "slurm=cpu", "--yes", *words]
    environment = {**slurm.environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_rlhf", *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"squeue --jobs {''.join(done.stdout.partition('squeue --jobs ')[2].split()[:1])}" in done.stdout
    return [int(line.split()[1].rstrip(":")) for line in done.stdout.splitlines() if line.startswith("job ")]


def rows(out: Path, phase: str) -> list[int]:
    """The steps in the log."""
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    return [row["step"] for row in map(json.loads, lines) if row["phase"] == phase]


def until(slurm: Slurm, number: int, holds: Callable[[], bool]) -> None:
    """Returns when `holds`, while the job runs."""
    slurm.wait(number, LIMIT, lambda job: holds())


def ended(slurm: Slurm, number: int, restarts: int) -> str:
    """What the job printed, once it is done after so many restarts."""
    job = slurm.wait(number, LIMIT)
    assert (job.state, job.restarts) == ("COMPLETED", restarts), slurm.said(job)
    return job.output.read_text()


@pytest.fixture(autouse=True)
def nothing_is_left(slurm: Slurm) -> Iterator[None]:
    """Behind every test no rank runs and no job is in the queue."""
    yield
    slurm.until(lambda: not slurm.ranks(), f"ranks are left: {slurm.ranks()}", 30)
    slurm.until(lambda: not slurm.run("squeue", "-h").strip(), "jobs are left")


def test_a_signalled_job_saves_is_queued_again_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    """One rank on each of two nodes; every step is in the log once."""
    source, out, chance = tmp_path / "source", tmp_path / "out", random.Random(1)
    source.mkdir()
    things = ["".join(letters) for letters in product("bdglmprst", "aeiou", "bdgklmnprst", "aeiou")][::9]
    told = [
        {"prompt": f"is it {asked} or {other}?\n", "response": f"it is {asked}.", "user": f"u{user}"}
        for user in range(480)
        for asked, other in [chance.sample(things, 2)]
    ]
    (source / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    words = (*TINY, f"data.source={source}", "pretrain.steps=400", "slurm.tasks=1", "layout=cpu1")
    words = (*words, "layout.pretrain=dp2", "layout.policy=dp2")
    prepare = [sys.executable, "-m", "megatron_rlhf", "prepare", "experiment=quickstart", f"out={out}", *words]
    done = subprocess.run(prepare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (number,) = submit(slurm, "pretrain", out, *words)
    until(slurm, number, lambda: bool(rows(out, "pretrain")))
    slurm.run("scancel", "--batch", "--signal=USR1", str(number))
    said = ended(slurm, number, 1)
    assert "pretrain: stopped by a signal after step" in said and "pretrain: going on after step" in said
    assert "the ranks ended with 75; queued again, to go on after pretrain/state/step_" in said
    assert rows(out, "pretrain") == list(range(401))
    assert (out / "pretrain" / "weights" / "manifest.json").exists()


class Chain:
    """A small quickstart that nothing disturbed, and PPO runs that start where it did."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        """Run it."""
        self.slurm = slurm
        self.out = chain.reference(folder, 1).out

    def submit(self, out: Path, verb: str = "ppo", *words: str) -> int:
        """The job of a verb in a folder that has what it reads."""
        chain.prepared(chain.VERBS[verb], self.out, out)
        return self.again(out, verb, *words)

    def again(self, out: Path, verb: str = "ppo", *words: str) -> int:
        """The job of a verb that goes on."""
        return submit(self.slurm, verb, out, *self.words(), *words)[0]

    def words(self) -> list[str]:
        """The settings of the undisturbed run, saved at every phase."""
        return [*chain.SETTINGS, "seed=1", "checkpoint.every=1", "checkpoint.phases=true"]

    def difference(self, out: Path, *stages: str) -> str:
        """The first difference of a finished run's rows and weights; "" for none."""
        return record.end_difference(out, self.out, stages or ("ppo",))


@pytest.fixture(scope="session")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The one run that all others are compared with."""
    return Chain(slurm, tmp_path_factory.mktemp("chain"))


def first_row(chained: Chain, out: Path, number: int) -> None:
    """Returns when the first iteration of PPO is over."""
    until(chained.slurm, number, lambda: bool(rows(out, "ppo")))


@pytest.mark.slow
def test_ppo_runs_to_its_end(undisturbed: Chain, tmp_path: Path) -> None:
    """Two nodes with two ranks each compute what four ranks on one machine do, bit for bit."""
    said = ended(undisturbed.slurm, undisturbed.submit(tmp_path / "run"), 0)
    assert "ppo is done" in said
    assert undisturbed.difference(tmp_path / "run") == ""


@pytest.mark.slow
def test_before_the_walltime_it_saves_and_goes_on(undisturbed: Chain, tmp_path: Path) -> None:
    """SLURM's own signal, 50 s before the minute ends; it comes while the ranks are still starting."""
    slurm, out = undisturbed.slurm, tmp_path / "run"
    number = undisturbed.submit(out, "ppo", "slurm.time=1", "slurm.signal=50")
    slurm.wait(number, LIMIT, lambda job: job.restarts == 1 and job.state == "PENDING")
    slurm.run("scontrol", "update", f"jobid={number}", "TimeLimit=30")
    said = ended(slurm, number, 1)
    assert "asked to stop: every rank saves" in said and "the ranks ended with 75; queued again" in said
    assert undisturbed.difference(out) == ""


@pytest.mark.slow
def test_a_killed_rank_costs_what_was_not_saved(undisturbed: Chain, tmp_path: Path) -> None:
    slurm, out = undisturbed.slurm, tmp_path / "run"
    number = undisturbed.submit(out)
    first_row(undisturbed, out, number)
    slurm.ranks()[2].kill()
    said = ended(slurm, number, 1)
    assert "queued again, to go on after ppo/state/step_" in said and "ppo: going on after iteration" in said
    assert undisturbed.difference(out) == ""


@pytest.mark.slow
def test_a_killed_node_costs_what_was_not_saved(undisturbed: Chain, tmp_path: Path) -> None:
    """The second node's daemon, its steps and their ranks at once; when it is back the run goes on."""
    slurm, out = undisturbed.slurm, tmp_path / "run"
    number = undisturbed.submit(out)
    first_row(undisturbed, out, number)
    slurm.kill_node("n1")
    slurm.wait(number, LIMIT, lambda job: job.restarts == 1)
    slurm.start_node("n1")
    said = ended(slurm, number, 1)
    assert "ppo: going on after iteration" in said
    assert undisturbed.difference(out) == ""


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_costs_what_was_not_saved(undisturbed: Chain, tmp_path: Path) -> None:
    """The others wait for it in a collective; every rank's stack is written, the stopped one's too."""
    slurm, out = undisturbed.slurm, tmp_path / "run"
    number = undisturbed.submit(out, "ppo", "watchdog.seconds=8")
    first_row(undisturbed, out, number)
    stopped = slurm.ranks()[3]
    stopped.send_signal(signal.SIGSTOP)
    slurm.wait(number, LIMIT, lambda job: job.restarts == 1)
    report = (out / "watchdog" / "report.txt").read_text()
    assert "no rank has moved on for 8 s; rank 3 is behind" in report and f"(process {stopped.pid})" in report
    assert "its process does not answer" in report.partition("rank 3:")[2].splitlines()[0]
    said = ended(slurm, number, 1)
    assert "no rank has moved on" in said and "the ranks ended with 76; queued again" in said
    assert undisturbed.difference(out) == ""


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state_and_says_so(undisturbed: Chain, tmp_path: Path) -> None:
    """The states lie on a disk that a file of somebody else fills, so a signal is answered without a save; when there
    is room again the run goes on from the state that stood."""
    slurm, out = undisturbed.slurm, tmp_path / "run"
    chain.prepared(chain.VERBS["ppo"], undisturbed.out, out)
    disk = out / "ppo" / "state"
    disk.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        number = undisturbed.again(out, "ppo", "ppo.iterations=200")
        first_row(undisturbed, out, number)
        with pytest.raises(OSError), (disk / "filler").open("wb") as file:
            while file.write(b"\0" * 65536):
                pass
        slurm.run("scancel", "--batch", "--signal=USR1", str(number))
        job = slurm.wait(number, LIMIT, lambda job: job.restarts == 1)
        said = job.output.read_text()
        assert "ppo: stopped by a signal after step" in said and "No space left on device" in said, said[-3000:]
        assert ", and not saved: " in said and "the ranks ended with 1; queued again, to go on after ppo/state" in said
        assert not list(disk.glob("*.partial"))
        stands = {path.name for path in disk.glob("step_*") if (path / "manifest.json").exists()}
        assert len(stands) == 2, "the two that are kept"
        (disk / "filler").unlink()
        until(slurm, number, lambda: "ppo: going on after iteration" in slurm.said(slurm.job(number)))
        slurm.run("scancel", str(number))
        slurm.wait(number, LIMIT)
    finally:
        slurm.clear()
        slurm.until(lambda: not slurm.ranks(), "ranks are left", 60)
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_the_chain_runs_in_its_order_to_its_end(undisturbed: Chain, tmp_path: Path) -> None:
    """SFT, reward model and PPO, each when the one before is done; what they write is the undisturbed run's."""
    slurm, out = undisturbed.slurm, tmp_path / "run"
    for name in ("data", "pretrain/weights"):
        shutil.copytree(undisturbed.out / name, out / name)
    numbers = submit(slurm, "pipeline", out, *undisturbed.words())
    assert len(numbers) == 3
    waiting = [slurm.job(number).reason for number in numbers[1:]]
    assert waiting == ["Dependency", "Dependency"]
    for number in numbers:
        ended(slurm, number, 0)
    assert undisturbed.difference(out, "sft", "rl_start", "reward", "ppo") == ""
