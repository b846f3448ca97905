"""The reward model's loss over all pairs of a ranking, InstructGPT eq. (1).

P prompts, K responses each. `ranks_PK`: 1 is best, equal ranks are a tie and make no pair, 0 is padding. A pair
survives when both its responses exist and their ranks differ; `_PKK[p, i, j]` speaks of response i ranked above j.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_rlhf.algorithms import masked
from megatron_rlhf.observe.stats import Stats


def pairwise(
    scores_PK: Tensor, ranks_PK: Tensor, *, num_prompts: int | Tensor, denominator: str = "surviving"
) -> tuple[Tensor, Stats]:
    """-log sigmoid(r_better - r_worse), mean over the pairs of a prompt, summed over prompts, over `num_prompts`.

    `num_prompts` counts the whole batch (`num_ranked`), so micro-batches add. `denominator` divides a prompt's sum by
    its pairs that are no tie ("surviving") or by all its k(k-1)/2 pairs ("all"); the paper leaves it open. In the
    Stats a pair is correct when the better response scores strictly higher. Raises ValueError for another denominator.
    """
    better_PKK = _pairs(ranks_PK)
    margin_PKK = (scores_PK[:, :, None] - scores_PK[:, None, :]).masked_fill(~better_PKK, 0)
    losses_P = masked.share((-logsigmoid(margin_PKK) * better_PKK).sum((1, 2)), _denominator(ranks_PK, denominator))
    total, correct = losses_P.sum(), (margin_PKK > 0).sum()
    stats = Stats.of(
        loss__reward=(total.detach(), num_ranked(ranks_PK)),
        accuracy=(correct, better_PKK.sum()),
    )
    return masked.share(total, num_prompts), stats


def num_ranked(ranks_PK: Tensor) -> Tensor:
    """The number of prompts with at least one surviving pair."""
    return _pairs(ranks_PK).any(2).any(1).sum()


def _pairs(ranks_PK: Tensor) -> Tensor:
    exists_PK = ranks_PK > 0
    both_PKK = exists_PK[:, :, None] & exists_PK[:, None, :]
    return both_PKK & (ranks_PK[:, :, None] < ranks_PK[:, None, :])


def _denominator(ranks_PK: Tensor, denominator: str) -> Tensor:
    if denominator == "surviving":
        return _pairs(ranks_PK).sum((1, 2))
    if denominator == "all":
        k_P = (ranks_PK > 0).sum(1)
        return k_P * (k_P - 1) // 2
    raise ValueError(f"the denominator of a ranking's loss is 'surviving' or 'all', not '{denominator}'")
