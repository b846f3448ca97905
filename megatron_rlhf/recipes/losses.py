"""Losses as an engine takes them: `loss(read, part, whole)`, divided by counts of the whole batch.

`read` is what the role reads off a micro-batch; `part` is the micro-batch and `whole` the global batch it was cut from.
"""

from __future__ import annotations

from torch import Tensor

from megatron_rlhf.algorithms import language_loss, policy_loss, ranking_loss, value_loss
from megatron_rlhf.batch import Experience, Rankings, Rows
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.train.engine import Loss


def language(logprobs_BR: Tensor, part: Rows, whole: Rows) -> tuple[Tensor, Stats]:
    """Mean next-token loss over the response tokens of the whole batch."""
    return language_per("tokens")(logprobs_BR, part, whole)


def ranking(denominator: str) -> Loss:
    """Equation (1): pairs of a prompt, mean over the batch's prompts that have one."""

    def loss(scores: Tensor, part: Rankings, whole: Rankings) -> tuple[Tensor, Stats]:
        scores_PK, ranks_PK = scores.view(part.ranks_PK.shape), part.ranks_PK.to(scores.device)
        ranked = ranking_loss.num_ranked(whole.ranks_PK)
        return ranking_loss.pairwise(scores_PK, ranks_PK, num_prompts=ranked, denominator=denominator)

    return loss


def language_per(normalisation: str) -> Loss:
    """The next-token loss divided by the batch's response tokens, or by its rows."""

    def loss(logprobs_BR: Tensor, part: Rows, whole: Rows) -> tuple[Tensor, Stats]:
        mask_BR = part.response_mask_BR(logprobs_BR.shape[1]).to(logprobs_BR)
        counted = whole.response_lengths_B.sum() if normalisation == "tokens" else len(whole)
        return language_loss.token_mean(logprobs_BR, mask_BR, num_tokens=counted)

    return loss


def policy(clip: float, normalisation: str = "tokens") -> Loss:
    """The clipped surrogate over the response tokens of the minibatch."""

    def loss(logprobs_BR: Tensor, part: Experience, whole: Experience) -> tuple[Tensor, Stats]:
        old_BR = part.annotated.old_logprobs_BR
        old_BR, advantages_BR, mask_BR = _on(logprobs_BR, old_BR, part.advantages_BR, part.mask_BR)
        return policy_loss.clipped(
            logprobs_BR, old_BR, advantages_BR, mask_BR, clip=clip, num_tokens=_count(whole, normalisation)
        )

    return loss


def value(clip: float, normalisation: str = "tokens") -> Loss:
    """The clipped regression onto returns over the response tokens of the minibatch."""

    def loss(values_BR: Tensor, part: Experience, whole: Experience) -> tuple[Tensor, Stats]:
        old_BR, returns_BR, mask_BR = _on(values_BR, part.annotated.values_BR, part.returns_BR, part.mask_BR)
        return value_loss.clipped(
            values_BR, old_BR, returns_BR, mask_BR, clip=clip, num_tokens=_count(whole, normalisation)
        )

    return loss


def _count(whole: Experience, normalisation: str) -> Tensor | int:
    return whole.mask_BR.sum() if normalisation == "tokens" else len(whole)


def _on(read_BR: Tensor, *others: Tensor) -> list[Tensor]:
    """The others on the read tensor's device, cut to its width: a minibatch's longest response may be shorter."""
    return [other[:, : read_BR.shape[1]].to(read_BR.device) for other in others]
