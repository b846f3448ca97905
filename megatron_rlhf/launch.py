"""Several ranks of one recipe on this machine: start them, pass signals on, end all of them when one fails."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_rlhf.config.env import free_port, launched

STOPPED = 75
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS, _GRACE_SECONDS = 0.05, 2.0

Process = subprocess.Popen[bytes]


def run(processes: int, argv: Sequence[str], module: str = "megatron_rlhf") -> int:
    """The exit code of `python -m module argv...` as `processes` ranks of one world on this machine.

    0 when all ranks end with 0; 75 when they were stopped by a signal and have saved; else the code of the first rank
    that failed (128 + n when signal n killed it), after the others were ended. SIGTERM, SIGINT and SIGUSR1 reach every
    rank. The ranks never outlive this process. Raises RuntimeError inside a rank, so that ranks never multiply.
    """
    if launched():
        raise RuntimeError("this process is a rank of a world already, it starts no other ranks")
    ranks: list[Process] = []
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in FORWARDED}
    try:
        port = free_port()
        for rank in range(processes):
            ranks.append(_start(rank, processes, port, [sys.executable, "-m", module, *argv]))
        return _wait(ranks, received)
    finally:
        _end(ranks)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(rank: int, processes: int, port: int, command: Sequence[str]) -> Process:
    env = {
        **os.environ,
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
    }
    if processes > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
    parent = os.getpid()
    # a session of its own: Ctrl-C on the terminal reaches the ranks once, through us
    return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=lambda: _die_with(parent))


def _die_with(parent: int) -> None:
    """In a rank before its program starts: asks Linux to kill it when the launcher dies, however that happens."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def _wait(ranks: Sequence[Process], received: list[int]) -> int:
    interrupts = 0
    while True:
        while received:
            number = received.pop(0)
            interrupts += number == signal.SIGINT
            _send(ranks, number)
        if interrupts > 1:  # a second Ctrl-C does not wait for the save
            return 128 + signal.SIGINT
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code not in (None, 0, STOPPED)]
        if failed:
            return _exit_code(failed[0])
        if None not in codes:
            return STOPPED if STOPPED in codes else 0
        time.sleep(_POLL_SECONDS)


def _exit_code(code: int | None) -> int:
    assert code is not None
    return code if code > 0 else 128 - code


def _end(ranks: Sequence[Process]) -> None:
    """SIGTERM to the ranks that are left, SIGKILL to those that wait for a rank that is gone."""
    _send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _send(ranks: Sequence[Process], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
