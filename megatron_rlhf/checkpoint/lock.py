"""One job at a time in a run's folder: a file that says who works there, locked while the process lives. No torch.

The kernel frees the lock of a process that dies. Between machines, where a file system may keep locks to each machine,
a heartbeat on the file stands in: a holder that has been silent for `SILENT` seconds is taken for dead.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlhf.config import env
from megatron_rlhf.config.rules import BadInput

FILE = "lock.json"
BEAT, SILENT = 15.0, 60.0


class Lock:
    """A folder that this process holds until it ends or calls `release`."""

    def __init__(self, path: Path, handle: int) -> None:
        """Say who holds it, and keep saying so."""
        self.path = path
        self._handle = handle
        self._over = threading.Event()
        job, restart = env.job()
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "restart": restart}
        self._facts = {**facts, "since": round(time.time(), 3)}
        _rewrite(handle, self._facts)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        atexit.register(self.release)

    def held(self) -> bool:
        """Whether the file still says so."""
        return _holder(self.path) == self._facts

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if not self._over.is_set():
            self._over.set()
            _rewrite(self._handle, {})
            os.close(self._handle)

    def lost(self) -> None:
        """Another holds it now: say nothing more."""
        self._over.set()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:
                return


def take(folder: Path, say: Callable[[str], None], *, silent: float = SILENT) -> Lock:
    """The lock of `folder`; a dead holder's is taken over, which between machines takes `silent` seconds.

    Raises BadInput that names the holder where one is alive.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}; give another folder, as out=runs/mine") from error
    try:
        exclusive = _flock(handle, path)
        holder = _holder(path)
        foreign = bool(holder) and holder.get("host") != socket.gethostname()
        if foreign and not _earlier(holder):
            _outwait(path, holder, say, silent)
        elif holder and not foreign and not exclusive and _runs(holder):
            raise BadInput(_refusal(path, holder))
        lock = Lock(path, handle)
        if foreign or not exclusive:
            # another may have found the same silence; the last one to write stays
            time.sleep(min(1.0, silent))
            if not lock.held():
                lock.lost()
                raise BadInput(_refusal(path, _holder(path)))
        return lock
    except BaseException:
        os.close(handle)
        raise


def _flock(handle: int, path: Path) -> bool:
    """Whether the kernel gave the lock; False where the file system has none. Raises BadInput where another has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(_refusal(path, _holder(path))) from error
    except OSError:
        return False
    return True


def _outwait(path: Path, holder: dict[str, Any], say: Callable[[str], None], silent: float) -> None:
    """Returns when a holder on another machine has been silent; raises BadInput when it beats."""
    seen = path.stat().st_mtime
    left = silent - (_now(path) - seen)
    if left > 0:
        say(f"{path.parent} was held by {_who(holder)}; waiting {left:.0f} s for a sign of it")
    while left > 0:
        time.sleep(min(left, 1.0))
        if path.stat().st_mtime != seen:
            raise BadInput(_refusal(path, _holder(path) or holder))
        left = silent - (_now(path) - seen)


def _now(path: Path) -> float:
    """The file system's clock, which wrote the heartbeat."""
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _earlier(holder: dict[str, Any]) -> bool:
    """Whether it is this very job before the scheduler started it again."""
    job, restart = env.job()
    return bool(job) and holder.get("job") == job and int(holder.get("restart", 0)) < restart


def _runs(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    return (
        f"{path.parent} is in use by {_who(holder)}; wait for it or stop it, or write into another folder, "
        "for example out=runs/second"
    )


def _who(holder: dict[str, Any]) -> str:
    job = f" (job {holder['job']})" if holder.get("job") else ""
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}{job}"


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes() or b"{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rewrite(handle: int, facts: dict[str, Any]) -> None:
    # in place: the kernel's lock is on this very file
    os.lseek(handle, 0, os.SEEK_SET)
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(facts).encode())
    os.fsync(handle)
