"""Proves what a process reads about its place from torchrun's variables, from srun's and from none.

Not proved here: that a SLURM sets these variables so (tests/slurm).
"""

from __future__ import annotations

import os

import pytest

from megatron_rlhf.config import env
from megatron_rlhf.config.rules import BadInput

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]-ib,login",
    "SLURM_JOB_NODELIST": "gpu[01-11]-ib",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
MACHINE = {"LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names no place."""
    for name in (*STEP, *TORCHRUN, *MACHINE):
        monkeypatch.delenv(name, raising=False)


def place() -> tuple[int, int, int, str]:
    """What the environment says."""
    return env.rank(), env.world_size(), env.local_rank(), env.master_address()


def given(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Sets the variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_nothing_launched_it() -> None:
    assert not env.launched()
    assert place() == (0, 1, 0, "127.0.0.1")
    assert 1024 <= env.master_port() <= 65535


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, TORCHRUN)
    assert env.launched()
    assert (*place(), env.master_port()) == (3, 4, 1, "host", 1234)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 0),
        (TORCHRUN, 0),
        (TORCHRUN | MACHINE, 2),
        (STEP, 4),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}, 0),
    ],
)
def test_ranks_of_this_machine(variables: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher says, 0 where it does not or where machines differ."""
    given(monkeypatch, variables)
    assert env.local_world_size() == ranks


@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({}, (False, 0)),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "2"}, (False, 2)),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}, (True, 1)),
    ],
)
def test_who_keeps_the_ranks_store(
    variables: dict[str, str], kept: tuple[bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert env.kept_store() == kept


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, STEP)
    assert env.launched()
    assert (*place(), env.master_port()) == (5, 8, 1, "gpu07-ib", 20000 + 42 * 101 + 3)


def test_torchrun_inside_a_slurm_step_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, STEP | TORCHRUN)
    assert (*place(), env.master_port()) == (3, 4, 1, "host", 1234)


def test_a_batch_script_and_an_interactive_shell_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "42"})
    assert not env.launched()
    assert place() == (0, 1, 0, "127.0.0.1")
    given(monkeypatch, {"SLURM_STEP_NUM_TASKS": "1"})
    assert not env.launched()


def test_steps_of_a_job_have_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, STEP)
    ports = set()
    for job in range(100, 110):
        for step in range(10):
            given(monkeypatch, {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            ports.add(env.master_port())
    assert len(ports) == 100
    assert all(20000 <= port < 40000 for port in ports)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,9],login", "node03"),
        ("a[1-2]b[7,8]-x,c", "a1b7-x"),
        ("n-1.example.org,n-2", "n-1.example.org"),
        ("", ""),
    ],
)
def test_first_host(hosts: str, first: str) -> None:
    assert env.first_host(hosts) == first


def test_a_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"RANK": "x", "WORLD_SIZE": "4"})
    with pytest.raises(BadInput, match="the environment's RANK is 'x', a number is needed, for example RANK=0"):
        env.rank()


def test_the_job_and_its_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert env.job() == ("", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert env.job() == ("12", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert env.job() == ("12", 3)


def test_what_a_person_has_set_for_determinism_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Tree"})
    env.be_deterministic()
    assert os.environ["NCCL_ALGO"] == "Tree" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
