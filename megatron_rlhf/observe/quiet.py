"""Silences what the packages below say at every start and nobody can act on."""

from __future__ import annotations

import warnings

_KNOWN = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "full scope is deprecated",
    "When using async grad allreduce",
    ".*NVML library not found",
    "No module named 'nvtx'",
)


def silence() -> None:
    """Ignore the known warnings of torch and Megatron-Core in this process; call before importing them."""
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message.replace("(", r"\(").replace(")", r"\)"))
