"""`@on_grid(4)`: a test whose body runs on 4 gloo ranks of a pool that lives for the session.

One pool at a time: ranks start at the first test that needs that many and stop when a test needs another number, so
`in_grid_order` sorts tests by their number of ranks. The first rank that raises fails the test with its traceback; then
the pool is killed, since the others may hang in a collective, and the next test starts a fresh one. Arguments
(parametrize, tmp_path, other picklable fixtures) travel to the ranks, and what a body returns travels back from `run`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_GRACE = 1.0
"""Seconds in which the other ranks may still report after one has failed."""
_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}


class GridFailure(Exception):
    """What one rank of a test said when it failed, hung or died."""


class Pool:
    """Processes of one gloo world that run functions of test modules by name until they are closed."""

    def __init__(self, ranks: int) -> None:
        """Starts the processes; they import torch and megatron while the first task waits."""
        self.ranks = ranks
        self.folder = Path(tempfile.mkdtemp(prefix="grid"))
        self.connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(ranks):
            self._start(rank)

    def _start(self, rank: int) -> None:
        ours, theirs = Pipe()
        # `-c` and not `-m`: what a rank spawns (checkpoint savers) would import the main module once more
        command = f"from tests.helpers.grid_worker import main; main({rank}, {self.ranks}, {theirs.fileno()})"
        loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with self._log(rank).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", command],
                cwd=self.folder,
                env=os.environ | loopback | _ENV | {"PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self.connections.append(ours)
        self.processes.append(process)

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def run(self, module: Path, name: str, arguments: dict[str, Any], timeout: float) -> list[Any]:
        """What `name` of the test file `module` returns on each rank.

        Raises GridFailure naming the rank that failed, died or did not answer in `timeout` seconds.
        """
        task = pickle.dumps((str(module), name, arguments))
        for rank, connection in enumerate(self.connections):
            with contextlib.suppress(OSError):
                self._log(rank).open("r+b").truncate(0)
                connection.send_bytes(task)
        answers = self._answers(time.monotonic() + timeout)
        for rank, (outcome, text) in answers.items():
            if outcome == "failed":
                others = sorted(set(answers) - {rank})
                raise GridFailure(
                    f"rank {rank} of {self.ranks} failed (also answered: {others})\n{text}{self.said(rank)}"
                )
        silent = [rank for rank in range(self.ranks) if rank not in answers]
        if silent:
            raise GridFailure(self._hung(silent, timeout))
        skipped = [text for outcome, text in answers.values() if outcome == "skipped"]
        if skipped:
            pytest.skip(skipped[0])
        return [answers[rank][1] for rank in range(self.ranks)]

    def _answers(self, deadline: float) -> dict[int, tuple[str, Any]]:
        """(outcome, value) by rank in the order of arrival; soon after a failure the rest is no longer awaited."""
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.ranks and time.monotonic() < deadline:
            waiting = {c: rank for rank, c in enumerate(self.connections) if rank not in answers}
            for ready in wait(list(waiting), max(0.0, deadline - time.monotonic())):
                rank = waiting[ready]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(self.connections[rank].recv_bytes())
                except (EOFError, OSError):
                    answers[rank] = ("failed", f"it died with exit code {self.processes[rank].wait()}\n")
                if answers[rank][0] == "failed":
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return answers

    def _hung(self, silent: list[int], timeout: float) -> str:
        for rank in silent:
            with contextlib.suppress(OSError):
                self.processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(_GRACE)
        names = ", ".join(map(str, silent))
        stacks = "".join(f"\nrank {rank}:{self.said(rank)}" for rank in silent)
        return f"rank {names} of {self.ranks} did not answer in {timeout:.0f} s{stacks}"

    def said(self, rank: int) -> str:
        """The last lines a rank printed during the test."""
        lines = self._log(rank).read_text(errors="replace").replace("\0", "").splitlines()[-60:]
        return "\n--- it printed:\n" + "\n".join(lines) if lines else ""

    def close(self) -> None:
        """Kills every process and what it started, and removes the pool's files."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_pool: Pool | None = None


def close() -> None:
    """Stops the pool that is running, if any."""
    global _pool
    if _pool is not None:
        _pool.close()
    _pool = None


atexit.register(close)


def run(ranks: int, function: Callable[..., Any], timeout: float = 300.0, **arguments: Any) -> list[Any]:
    """What a module-level `function` returns on each of `ranks` ranks; raises GridFailure when one fails."""
    global _pool
    body = inspect.unwrap(function)
    if _pool is None or _pool.ranks != ranks:
        close()
        _pool = Pool(ranks)
    try:
        return _pool.run(Path(inspect.getfile(body)).resolve(), body.__name__, arguments, timeout)
    except BaseException as problem:
        if not isinstance(problem, pytest.skip.Exception):
            close()
        raise


def on_grid(ranks: int, timeout: float = 300.0) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Marks a test whose body runs on every one of `ranks` ranks, torch.distributed initialised with gloo."""

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(**arguments: Any) -> None:
            __tracebackhide__ = True
            problem = ""
            try:
                run(ranks, function, timeout, **arguments)
            except GridFailure as failure:
                problem = str(failure)
            if problem:
                pytest.fail(problem, pytrace=False)

        test.grid_ranks = ranks  # type: ignore[attr-defined]
        return pytest.mark.dist(test)

    return decorate


def in_grid_order(items: list[pytest.Item]) -> None:
    """Sorts tests, in place, by their number of ranks; single-process tests come first."""
    items.sort(key=lambda item: getattr(getattr(item, "function", None), "grid_ranks", 0))
