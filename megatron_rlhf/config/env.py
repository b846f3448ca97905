"""The only reader of the environment: where this process stands in the world, as torchrun or srun says it.

No variable decides what a run computes; `compute.deterministic` sets some, for the libraries below.
"""

from __future__ import annotations

import os
import re
import socket
import sys

from megatron_rlhf.config.rules import BadInput

_FIRST_PORT, _PORTS = 20000, 20000


def launched() -> bool:
    """Whether torchrun, srun or our own launcher started this process as one rank of a world."""
    return _has_rank() or _is_slurm_step()


def rank() -> int:
    """This process's place in the world, 0 when nothing launched it."""
    if _has_rank():
        return _number("RANK")
    return _number("SLURM_PROCID") if _is_slurm_step() else 0


def world_size() -> int:
    """Processes in the world, 1 when nothing launched this one."""
    if _has_rank():
        return _number("WORLD_SIZE")
    return _number("SLURM_STEP_NUM_TASKS") if _is_slurm_step() else 1


def local_rank() -> int:
    """This process's place on its machine, which names its GPU; its rank where the launcher does not say."""
    if "LOCAL_RANK" in os.environ:
        return _number("LOCAL_RANK")
    return _number("SLURM_LOCALID") if _is_slurm_step() and "SLURM_LOCALID" in os.environ else rank()


def local_world_size() -> int:
    """Processes of the world on this machine, 0 where the launcher does not say."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return _number("LOCAL_WORLD_SIZE")
    # "8", or "8(x2)" where all nodes are alike; "8(x2),4" is no one number
    alike = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(alike[1]) if alike and _is_slurm_step() else 0


def master_address() -> str:
    """The machine of rank 0: MASTER_ADDR, else the first host of the SLURM step, else this machine."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    if _is_slurm_step():
        hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        return first_host(hosts) or "127.0.0.1"
    return "127.0.0.1"


def master_port() -> int:
    """Rank 0's port: MASTER_PORT, else one that follows from SLURM's job and step, else a free one (one process)."""
    if "MASTER_PORT" in os.environ:
        return _number("MASTER_PORT")
    if _is_slurm_step():
        step = _number("SLURM_STEP_ID") if "SLURM_STEP_ID" in os.environ else 0
        # steps of one job may run side by side on a node, so each has its own port; 101 keeps neighbouring jobs apart
        return _FIRST_PORT + (101 * _number("SLURM_JOB_ID") + step) % _PORTS
    return free_port()


def kept_store() -> tuple[bool, int]:
    """Whether torchrun's agent keeps the store of the ranks, else rank 0 does; and which start of them this is."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return kept, _number("TORCHELASTIC_RESTART_COUNT") if os.environ.get("TORCHELASTIC_RESTART_COUNT") else 0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_host(hosts: str) -> str:
    """The first name in SLURM's list notation: 'node[03-05,9],login' gives 'node03', '' gives ''."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else ""


def terminal() -> bool:
    """Whether a person watches standard output on a terminal that can redraw lines."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def job() -> tuple[str, int]:
    """The scheduler's job, "" outside one, and how many times it was started again."""
    restarts = _number("SLURM_RESTART_COUNT") if os.environ.get("SLURM_RESTART_COUNT") else 0
    return os.environ.get("SLURM_JOB_ID", ""), restarts


def be_deterministic() -> None:
    """Libraries that choose algorithms by these variables take one that gives the same bits every time.

    Set before CUDA and NCCL start; what a person has set already stays. Modifies: the environment.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


def _has_rank() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _is_slurm_step() -> bool:
    # SLURM_PROCID and SLURM_NTASKS alone do not tell: a batch script sees them too, and it is one process.
    # A step of one task (an interactive shell under srun) leaves the choice of ranks to our launcher.
    return "SLURM_PROCID" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise BadInput(f"the environment's {name} is '{text}', a number is needed, for example {name}=0")
    return int(text)
