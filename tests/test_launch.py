"""Proves the launcher on small programs: places, exit codes, signals, and that no rank outlives a failure or a kill.

Not proved here: several machines, and what a recipe does with a signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlhf import launch

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import os, pathlib, signal, sys, time
rank, case, folder = int(os.environ["RANK"]), sys.argv[1], pathlib.Path(sys.argv[2])

def saved(number, frame):
    (folder / f"signal{rank}").write_text(str(number))
    sys.exit(75)

if case == "place":
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"]
    (folder / f"place{rank}").write_text(" ".join(os.environ.get(name, "-") for name in names))
elif case == "die":
    if rank == 1:
        time.sleep(0.3)
        sys.stderr.write("rank 1 has the cause\\n")
        sys.exit(9)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # waits in a collective, deaf
    time.sleep(60)
elif case == "killed":
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
elif case == "uneven":
    sys.exit(75 if rank else 0)
elif case == "wait":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, saved)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program of the ranks, importable in them; nothing launched this process."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ranks_of_a_test.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path


def run(case: str, folder: Path, processes: int = 3) -> int:
    """The launcher's code for a case of the program."""
    return launch.run(processes, [case, str(folder)], module="ranks_of_a_test")


def start(case: str, folder: Path) -> subprocess.Popen[bytes]:
    """The launcher in a process of its own, its three ranks ready."""
    call = f"launch.run(3, {[case, str(folder)]}, 'ranks_of_a_test')"
    code = f"import sys; from megatron_rlhf import launch; sys.exit({call})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: len(pids(folder)) == 3)
    return parent


def pids(folder: Path) -> list[int]:
    """The ranks that said they are ready."""
    return [int(file.read_text()) for file in folder.glob("pid*") if file.read_text()]


def wait_for(holds, seconds: float = 15.0) -> None:  # type: ignore[no-untyped-def]
    """Returns when `holds()` is true, fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_each_rank_learns_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run("place", folder) == 0
    places = [(folder / f"place{rank}").read_text().split() for rank in range(3)]
    ports = {place[4] for place in places}
    assert len(ports) == 1
    assert [place[:4] for place in places] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert {tuple(place[5:]) for place in places} == {("lo", "1")}


def test_threads_are_left_alone_where_they_are_set_or_one_rank_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run("place", folder, 2) == 0
    assert (folder / "place1").read_text().split()[-1] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run("place", folder, 1) == 0
    assert (folder / "place0").read_text().split()[-1] == "-"


def test_a_rank_that_dies_takes_the_job_down_with_its_code(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    assert run("die", folder) == 9
    assert time.monotonic() - begin < 5.0
    assert capfd.readouterr().err == "rank 1 has the cause\n"
    assert len(pids(folder)) == 2
    assert not any(is_alive(pid) for pid in pids(folder))


def test_a_killed_rank_is_told_by_128_and_the_signal(folder: Path) -> None:
    assert run("killed", folder) == 128 + signal.SIGKILL


def test_stopped_wins_over_done(folder: Path) -> None:
    assert run("uneven", folder) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_and_75_comes_back(folder: Path, number: signal.Signals) -> None:
    parent = start("wait", folder)
    parent.send_signal(number)
    assert parent.wait(timeout=15) == 75
    assert [(folder / f"signal{rank}").read_text() for rank in range(3)] == [str(int(number))] * 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its parent")
def test_a_killed_launcher_leaves_no_rank(folder: Path) -> None:
    parent = start("wait", folder)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids(folder)))
    assert not list(folder.glob("signal*"))


def test_handlers_are_given_back(folder: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    assert run("place", folder, 1) == 0
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_rank_starts_no_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="a rank of a world already"):
        run("place", folder, 1)
    assert not list(folder.glob("place*"))
