"""Language modelling on given tokens: demonstrations, and the pretraining mix of InstructGPT eq. (2).

B sequences, R response positions (every position but the first, for pretraining rows). Not here: the weight of the
pretraining mix, which the recipe hands to the engine.
"""

from __future__ import annotations

from torch import Tensor

from megatron_rlhf.algorithms import masked
from megatron_rlhf.observe.stats import Stats


def token_mean(logprobs_BR: Tensor, mask_BR: Tensor, *, num_tokens: int | Tensor) -> tuple[Tensor, Stats]:
    """-log pi(y_t | x, y_<t) summed over the mask, over `num_tokens` of the whole batch, so micro-batches add."""
    total = -masked.kept(logprobs_BR, mask_BR).sum()
    return masked.share(total, num_tokens), Stats.of(loss__language=(total.detach(), mask_BR.sum()))
