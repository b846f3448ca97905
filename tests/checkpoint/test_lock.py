"""Proves that one job at a time works in a folder, and that a dead one's place is taken.

Not proved here: two machines; a file system without locks is one whose `flock` is an error, another machine is a name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest

from megatron_rlhf.checkpoint import lock
from megatron_rlhf.config.rules import BadInput

HOLD = """
import sys, time
from pathlib import Path
from megatron_rlhf.checkpoint import lock
held = lock.take(Path(sys.argv[1]), print)
print("held", flush=True)
sys.stdin.readline()
"""
ROOT = Path(__file__).resolve().parents[2]
NO_LOCKS = mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOTSUP, "Operation not supported"))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `tmp_path` until it is told to go or killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(folder: Path, said: list[str] | None = None, silent: float = 30.0) -> lock.Lock:
    return lock.take(folder, ([] if said is None else said).append, silent=silent)


def stamp(folder: Path, **facts: object) -> None:
    """The folder was held by someone else."""
    (folder / lock.FILE).write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": "", "restart": 0, **facts}))


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_job_is_refused_and_told_who_is_there(
    locks: bool, other: subprocess.Popen[str], tmp_path: Path
) -> None:
    """With the kernel's locks, and by the holder's process where there are none."""
    refusal = pytest.raises(BadInput, match=f"in use by process {other.pid} on {socket.gethostname()}")
    with nullcontext() if locks else NO_LOCKS, refusal:
        take(tmp_path)
    assert other.poll() is None
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == other.pid


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_jobs_place_is_taken_at_once(locks: bool, other: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == other.pid
    with nullcontext() if locks else NO_LOCKS:
        held = take(tmp_path, silent=0.01)
    assert held.held() and json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    held.release()


def test_a_job_that_ends_leaves_nothing_behind(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.communicate("go\n")
    assert other.returncode == 0 and json.loads((tmp_path / lock.FILE).read_text()) == {}
    held = take(tmp_path)
    with pytest.raises(BadInput, match=f"process {os.getpid()}"):
        take(tmp_path)
    held.release()
    held.release()
    take(tmp_path).release()


def test_another_machines_holder_is_given_time_to_show_itself(tmp_path: Path) -> None:
    """Silent: taken over after the time, and said; a beat meanwhile: refused."""
    said = list[str]()
    stamp(tmp_path)
    began = time.monotonic()
    held = take(tmp_path, said, silent=0.5)
    assert time.monotonic() - began > 0.4 and len(said) == 1 and "held by process 1 on elsewhere" in said[0]
    held.release()
    stamp(tmp_path, job="77")
    beats = threading.Timer(0.5, os.utime, [tmp_path / lock.FILE])
    beats.start()
    with pytest.raises(BadInput, match=r"in use by process 1 on elsewhere \(job 77\)"):
        take(tmp_path)
    beats.join()


def test_a_job_that_the_scheduler_starts_again_does_not_wait_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job with one restart more takes its own place on another machine at once."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stamp(tmp_path, job="77", restart=0)
    began = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - began < 5


def test_without_locks_the_last_one_to_write_stays(tmp_path: Path) -> None:
    """Two that found the same silence: the one whose name is no longer in the file goes."""
    with mock.patch.object(lock.Lock, "held", return_value=False), NO_LOCKS, pytest.raises(BadInput, match="in use"):
        take(tmp_path, silent=0.01)


def test_what_is_no_lock_file_is_written_over(tmp_path: Path) -> None:
    (tmp_path / lock.FILE).write_bytes(b"\xff[")
    take(tmp_path).release()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        take(tmp_path / "file" / "run")
