"""Layer and RMS norms in plain torch that are right under sequence parallelism.

Without Transformer Engine or apex, Megatron's own wrapper refuses sequence parallelism (mcore 0.16.1 torch_norm.py:32)
because nothing would mark the weights whose gradients must be summed over tp; here the mark is set.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm:
    """Builds the norm that `config.normalization` names, over a last dimension of `hidden_size`.

    A class, as Megatron's specs build classes and take functions as they are.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:  # type: ignore[misc]
        """The torch module, its weights marked for the gradient sum over tp under sequence parallelism."""
        kind = torch.nn.LayerNorm if config.normalization == "LayerNorm" else torch.nn.RMSNorm
        module = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module


def local_layer(config: TransformerConfig) -> ModuleSpec:
    """One transformer layer of Megatron's own modules with this norm in it."""
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    return layer
