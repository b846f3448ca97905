"""How the last stage ends: a language model's in hidden states, that of reward and value models in a scalar head
(InstructGPT appendix C: the unembedding replaced by a projection to one number), right under tensor, pipeline and
sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class LanguageModel(GPTModel):
    """A GPTModel whose last stage gives hidden states [b, S or S/tp, h]: whoever reads applies the vocabulary head to
    the positions it wants (models/vocabulary.py), and logits of the others are never made."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        # What GPTModel.forward returns (mcore 0.16.1 gpt_model.py:539); the other arguments are for its own loss.
        return hidden_states.transpose(0, 1) if self.post_process else hidden_states


class ScalarHead(torch.nn.Module):
    """v = w·h + b in fp32 for every position; its weights live on each tp rank of the last stage, in `params_dtype`."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        """Allocate the weight [1, h] and the bias [1]; under sequence parallelism mark them for the tp gradient sum."""
        super().__init__()
        self.tp_group = tp_group
        self.gathers = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Values [s, b, 1] in fp32 from hidden [s or s/tp, b, h]."""
        values = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.gathers:
            # The gradient of each copy is the same, so it is sliced and not summed: True here doubles every gradient.
            group = self.tp_group
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=group)
        return values, None


class ScalarModel(GPTModel):
    """A GPTModel whose last stage ends in a ScalarHead."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the transformer with a token-sized placeholder for the vocabulary head, then replace it."""
        super().__init__(*args, share_embeddings_and_output_weights=False, **kwargs)
        if self.post_process:
            self.output_layer = ScalarHead(self.config, self.pg_collection.tp)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's sharded state, with a head that must match in shape: a vocabulary head never loads into it."""
        # LanguageModule marks output_layer.weight with allow_shape_mismatch (mcore 0.16.1 language_module.py:302),
        # so a [V, h] head would load into [1, h] without a word.
        state = super(GPTModel, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in ("weight", "bias"):
            entry = state.pop(f"{prefix}output_layer.{name}", None)
            if entry is not None:
                entry.key = f"{prefix}head.{name}"
                entry.allow_shape_mismatch = False
                state[f"{prefix}output_layer.{name}"] = entry
        return state
