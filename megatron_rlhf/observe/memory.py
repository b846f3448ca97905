"""The most memory this process has held."""

from __future__ import annotations

import resource
import sys

import torch


def peak_bytes() -> int:
    """Peak bytes allocated on the current CUDA device, or of resident memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux reports kilobytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024
