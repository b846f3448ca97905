"""Names of precisions and torch's dtypes, and changing between them without losing a number to infinity."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights are written in."""
READ = {"fp64": torch.float64, **DTYPES}
_PIECE = 1 << 24
"""Numbers that are changed at a time."""


def name_of(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def stored_precision(dtypes: Collection[torch.dtype], said: object = None) -> str:
    """The precision of a model whose tensors are stored in `dtypes`: the one they share, else what the config says,
    else fp32."""
    if len(dtypes) == 1 and (only := next(iter(dtypes))) in DTYPES.values():
        return name_of(only)
    words = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    return words.get(str(said).removeprefix("torch."), "fp32")


def changed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, contiguous, its own numbers where that is what it is in.

    Raises BadInput for numbers that are no floats, and for finite ones that `dtype` has no room for.
    """
    if tensor.dtype not in READ.values():
        raise BadInput(f"{name} is stored in {str(tensor.dtype).removeprefix('torch.')}; weights are floats")
    if tensor.dtype == dtype:
        return tensor.contiguous()
    out = torch.empty(tensor.shape, dtype=dtype)
    source = tensor.reshape(-1)
    for start in range(0, source.numel(), _PIECE):
        before = source[start : start + _PIECE]
        after = out.view(-1)[start : start + _PIECE].copy_(before)
        if not bool((torch.isfinite(after) | ~torch.isfinite(before)).all()):
            largest = float(before.abs().max())
            raise BadInput(f"{name} has numbers up to {largest:g}, beyond {name_of(dtype)}; write --dtype bf16")
    return out
