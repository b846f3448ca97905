"""Transformer Engine's layers (optional): fused norm and projection, and its own GEMMs, on GPUs.

Without it Megatron-Core's own linear layers and torch's norms run: the same mathematics, a little slower.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions import transformer_engine as upstream
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec


def usable() -> bool:
    """Whether the package is there and a GPU that it could run on."""
    return bool(upstream.HAVE_TE) and torch.cuda.is_available()


def layer() -> ModuleSpec:
    """One transformer layer of its modules."""
    return get_gpt_layer_with_transformer_engine_spec()


def norm() -> Any:
    """The norm behind the last layer."""
    return upstream.TENorm
