"""Finds the compiled kernels (csrc/) once, or says why the Python references are used instead.

Every op of this room has a reference in Python and, where the library is loaded, a fast path of the same signature.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("_kernels.so")
REPORT = Path(__file__).with_name("kernels.json")
"""What the build left beside the code: which kernels it made, and why not the rest."""

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _load() -> str:
    """Loads the library; returns nothing, or why it is not used."""
    if not PATH.exists():
        if not REPORT.exists():
            return "the kernels were not built"
        return str(json.loads(REPORT.read_text(encoding="utf-8"))["why"]) or "the kernels are not beside the code"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return str(error).partition("\n")[0]
    return ""


WHY_NOT = _load()
"""Why the kernels are not used; empty where they are."""

_devices = frozenset(
    device
    for device in ("cpu", "cuda")
    if not WHY_NOT and torch._C._dispatch_has_kernel_for_dispatch_key("megatron_rlhf::logprob_stats", device.upper())
)


def loaded() -> bool:
    """Whether there are kernels for this machine's CPU."""
    return not WHY_NOT


def serves(x: Tensor) -> bool:
    """Whether kernels compute `x` [N, V]: its device and dtype have one and the words of a row lie side by side."""
    dtype_known = x.dtype in _DTYPES or (x.dtype == torch.float64 and x.device.type == "cpu")
    return x.device.type in _devices and dtype_known and (x.shape[-1] <= 1 or x.stride(-1) == 1)


@contextmanager
def references() -> Iterator[None]:
    """Inside, the Python references are used: to compare the two."""
    global _devices
    held, _devices = _devices, frozenset()
    try:
        yield
    finally:
        _devices = held
