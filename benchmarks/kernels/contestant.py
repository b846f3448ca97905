"""One side in a process of its own: `python -m benchmarks.kernels.contestant TASK`."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from benchmarks.harness.turns import Channel
from benchmarks.kernels.sides import turn
from benchmarks.kernels.task import Task
from megatron_rlhf.observe.memory import peak_bytes


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _held(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(device: str, fresh: Callable[[], object], run: Callable[[], object]) -> dict[str, Any]:
    """Seconds on the clock and of the processor, and bytes above what was held before, of one run."""
    fresh()
    _wait(device)
    held, used, began = _held(device), _cpu_seconds(), time.perf_counter()
    run()
    _wait(device)
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - used
    return {"seconds": seconds, "cpu": cpu, "extra": max(0, _peak(device) - held)}


def main() -> None:
    """The first run is a turn's too, for its memory; it is answered with the readiness."""
    channel = Channel()
    task = Task.parse(sys.argv[1])
    fresh, run = turn(task)
    first = measured(task.device, fresh, run)
    channel.say(gpu=torch.cuda.get_device_name() if task.device == "cuda" else "", extra=first["extra"])
    while channel.my_turn():
        channel.say(**measured(task.device, fresh, run))


if __name__ == "__main__":
    main()
