"""How long this rank has waited for others: the seconds it stood in the wait of a collective or a message.

A collective without a device (gloo) holds the caller in `Work.wait`, which is where all of torch.distributed's blocking
calls end. With NCCL the host does not stand there, so that on GPUs what is found is what the host itself waits for.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

_waited = 0.0
_installed = False


def install() -> None:
    """From now on the waits of this process are timed, a microsecond each; a second call does nothing.

    Modifies: `Work.wait` of torch.distributed.
    """
    global _installed
    if _installed:
        return
    _installed = True
    wait = dist.Work.wait

    def timed(work: dist.Work, *args: Any, **settings: Any) -> Any:
        global _waited
        start = time.perf_counter()
        try:
            return wait(work, *args, **settings)
        finally:
            _waited += time.perf_counter() - start

    dist.Work.wait = timed  # type: ignore[method-assign, assignment]


def seconds() -> float:
    """Seconds waited since `install`, or 0."""
    return _waited
