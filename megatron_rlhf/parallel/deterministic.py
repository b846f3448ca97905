"""What `compute.deterministic` switches, before the world is joined."""

from __future__ import annotations

import torch

from megatron_rlhf.config import env


def install() -> None:
    """Torch refuses operations without a deterministic algorithm; cuDNN, cuBLAS, NCCL and Transformer Engine are held
    to one choice. Bit-equality then holds for one machine type, library versions and layout."""
    env.be_deterministic()
    torch.use_deterministic_algorithms(True)
    # fresh memory need not be filled: nothing here reads what it has not written, and filling costs a pass over it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
