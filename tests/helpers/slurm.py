"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd of its own in one folder.

Everything that it and its jobs started is ended by `stop`. It asks for Debian's packages slurmctld, slurmd,
slurm-client and munge; `missing` names the programs that are not there.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n0", "n1")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
"""States of a job that has ended for good."""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_LIMIT = 60.0

_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldParameters=cloud_reg_addrs
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,kill_invalid_depend
FirstJobId={first}
ReturnToService=2
GresTypes=gpu
SlurmdTimeout=15
KillWait=5
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4096 Gres=gpu:2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4096 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4 PreemptMode=OFF
PartitionName=polite Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE PriorityTier=10
"""


@dataclass(frozen=True, slots=True)
class Job:
    """What the scheduler says of a job."""

    state: str
    reason: str
    restarts: int
    code: int
    output: Path

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in OVER


class Slurm:
    """A running cluster; `environment` is what its commands and jobs need."""

    def __init__(self, folder: Path) -> None:
        """Start the daemons in `folder`; RuntimeError with their logs where they do not come up."""
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            **{"PATH": _PATH, "SLURM_CONF": str(self.conf), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        }
        self._configure()
        self._munge()
        self.run("slurmctld", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], "the nodes are not idle")

    def run(self, *words: str, environment: dict[str, str] | None = None) -> str:
        """What a command prints; AssertionError with what it said where it fails."""
        done = self.attempt(*words, environment=environment)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A command of this cluster, ended."""
        everything = {**self.environment, **(environment or {})}
        return subprocess.run(words, env=everything, capture_output=True, text=True, timeout=_LIMIT)

    def submit(self, *words: str) -> int:
        """The number of the job that `sbatch words` makes."""
        return int(self.run("sbatch", "--parsable", *words).strip())

    def job(self, number: int) -> Job:
        """What the scheduler says of the job now."""
        text = self.run("scontrol", "show", "job", "-o", str(number))
        facts = dict(word.split("=", 1) for word in text.split() if "=" in word)
        exit_code, _, signalled = facts["ExitCode"].partition(":")
        code = int(exit_code) or (128 + int(signalled) if int(signalled) else 0)
        return Job(
            facts["JobState"], facts["Reason"], int(facts["Restarts"]), code, Path(facts.get("StdOut", "/dev/null"))
        )

    def wait(self, number: int, seconds: float, until: Callable[[Job], bool] = lambda job: job.over) -> Job:
        """The job when `until` holds of it; a requeued one does not wait for the scheduler's delay."""
        end = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if until(job):
                return job
            if job.state == "PENDING" and job.reason == "BeginTime" and not self._steps(number):
                # a start that meets the end of the one before would be taken for it
                time.sleep(1)
                self.attempt("scontrol", "update", f"jobid={number}", "StartTime=now")
            assert time.monotonic() < end, f"job {number} after {seconds} s: {job}\n{self.said(job)}"
            assert not job.over, f"job {number} is over: {job}\n{self.said(job)}"
            time.sleep(0.2)

    def said(self, job: Job) -> str:
        """The last of what the job printed."""
        with suppress(OSError):
            return job.output.read_text(errors="replace")[-6000:]
        return ""

    def until(self, holds: Callable[[], bool], otherwise: str, seconds: float = _LIMIT) -> None:
        """Returns when `holds`; AssertionError with `otherwise` and the daemons' logs when it takes too long."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                logs = [path.read_text(errors="replace")[-2000:] for path in sorted((self.folder / "log").glob("*"))]
                raise AssertionError("\n".join([otherwise, *logs]))
            time.sleep(0.1)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        # a slurmd that was killed leaves its pid file
        (self.folder / "run" / f"slurmd-{node}.pid").unlink(missing_ok=True)
        self.run("slurmd", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str) -> None:
        """SIGKILL to a node's slurmd and to everything that its steps run."""
        daemon = psutil.Process(self._pid(f"slurmd-{node}"))
        steps = [each for each in self.processes() if "slurmstepd" in _command(each) and self._logs_of(node, each)]
        victims = [daemon, *steps]
        for step in steps:
            with suppress(psutil.NoSuchProcess):
                victims += step.children(recursive=True)
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """What runs on account of this cluster: its daemons and their children, and whatever has its environment."""
        return [each for each in psutil.process_iter() if each.pid != os.getpid() and self._ours(each)]

    def ranks(self, word: str = "megatron_rlhf") -> dict[int, psutil.Process]:
        """Processes by their SLURM_PROCID whose command has `word`."""
        found = {}
        for each in self.processes():
            with suppress(psutil.Error):
                if word in _command(each) and "SLURM_PROCID" in (own := each.environ()) and "RANK" in own:
                    found[int(own["SLURM_PROCID"])] = each
        return found

    def clear(self) -> None:
        """Cancel every job and wait until none is left."""
        self.attempt("scancel", "--user", getpass.getuser())
        self.until(lambda: not self.run("squeue", "-h").strip(), "jobs are left")

    def stop(self) -> list[str]:
        """End the jobs and the daemons; the command lines of what had to be killed one by one."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.clear()
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            with suppress(OSError, ValueError):
                os.kill(self._pid(name), signal.SIGTERM)
        end = time.monotonic() + 10
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        left = []
        for each in self.processes():
            with suppress(psutil.Error):
                left.append(" ".join(each.cmdline()))
                each.kill()
        return left

    def _steps(self, number: int) -> list[psutil.Process]:
        """What keeps the job's scripts and steps on the nodes."""
        return [each for each in self.processes() if f"[{number}." in _command(each)]

    def _configure(self) -> None:
        for name in ("run", "state", "spool", "log"):
            (self.folder / name).mkdir(mode=0o755)
        host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
        facts = {"folder": self.folder, "host": host, "user": getpass.getuser(), "ports": ports}
        # numbers of its own, so that two clusters on one machine give their jobs different ports
        self.conf.write_text(_CONF.format(**facts, first=1 + int.from_bytes(os.urandom(2), "big")))
        # any two devices pass for GPUs
        devices = "".join(f"Name=gpu File=/dev/{name}\n" for name in ("zero", "full"))
        (self.folder / "gres.conf").write_text(devices)

    def _munge(self) -> None:
        run, key = self.folder / "run", self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        self.run(
            *("munged", "--force", f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"),
            *(f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/munge.seed"),
        )

    def _pid(self, name: str) -> int:
        return int((self.folder / "run" / f"{name}.pid").read_text())

    def _ours(self, process: psutil.Process) -> bool:
        # a slurmstepd renames itself and has no environment left, but stands in the folder of the logs
        try:
            here = str(self.folder)
            if here in _command(process) or process.cwd().startswith(here):
                return True
            return process.environ().get("SLURM_CONF") == str(self.conf)
        except psutil.Error:
            return False

    def _logs_of(self, node: str, process: psutil.Process) -> bool:
        log = str(self.folder / "log" / f"slurmd-{node}.log")
        with suppress(psutil.Error):
            return any(file.path == log for file in process.open_files())
        return False


def missing() -> list[str]:
    """Programs that a cluster needs and this machine has not."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextmanager
def cluster() -> Iterator[Slurm]:
    """A cluster that is gone at the end, with everything that it ran; at SIGTERM too, which is like Ctrl-C here."""
    # munge's socket wants a short path
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    slurm = Slurm.__new__(Slurm)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        slurm.__init__(folder)  # type: ignore[misc]
        yield slurm
    finally:
        left = slurm.stop()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"these outlived their jobs: {left}"


def _command(process: psutil.Process) -> str:
    """Its words, nothing of one that has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
