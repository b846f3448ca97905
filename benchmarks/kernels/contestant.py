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

SWEPT = 2**30
"""Bytes, many times a GPU's cache."""


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


def _sweep(device: str) -> None:
    """Queues what drives a run's inputs out of a GPU's cache, and keeps the GPU busy while Python queues the run.

    So what the events measure is the GPU's time.
    """
    if device == "cuda":
        torch.empty(SWEPT, dtype=torch.uint8, device=device).zero_()


def _seconds(device: str, run: Callable[[], object]) -> float:
    """Of one run: on the clock, or between two events of a GPU's queue."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measured(device: str, fresh: Callable[[], object], run: Callable[[], object]) -> dict[str, Any]:
    """Seconds of one run and of its processor, and bytes above what was held before."""
    fresh()
    _sweep(device)
    held, used = _held(device), _cpu_seconds()
    seconds = _seconds(device, run)
    cpu, extra = _cpu_seconds() - used, _peak(device) - held
    return {"seconds": seconds, "cpu": cpu, "extra": max(0, extra)}


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
