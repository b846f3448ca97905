"""From a score a response to a reward a token: r_t = -beta log(pi / pi_ref) (t), plus the score at the last token.

InstructGPT section 3.5 and eq. (2). B episodes, R response positions. Not here: the reward model's bias, which its
head carries.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_rlhf.algorithms import kl, masked


def shape(
    scores_B: Tensor,
    logprobs_BR: Tensor,
    reference_logprobs_BR: Tensor,
    mask_BR: Tensor,
    *,
    kl_coef: float,
    estimator: Literal["k1", "k2", "k3", "exact"] = "k1",
    exact_kl_BR: Tensor | None = None,
) -> Tensor:
    """Rewards [B, R]: -`kl_coef` x KL on every response token, and the score on the last one; empty rows are all 0.

    With k1 the rewards of a response sum to score - `kl_coef` x log(pi(y|x) / pi_ref(y|x)), as in eq. (2). With exact
    the KL is `exact_kl_BR`, the expectation of k1 over the tokens that might have been drawn; it is the same whichever
    was, so it credits the tokens before and not the token itself (`own` does). Raises ValueError where it is missing.
    """
    if estimator != "exact":
        kl_BR = kl.estimate(logprobs_BR, reference_logprobs_BR, estimator)
    elif exact_kl_BR is not None:
        kl_BR = exact_kl_BR
    else:
        raise ValueError("the exact KL is computed where episodes are annotated; these were annotated without it")
    penalty_BR = kl_coef * masked.kept(kl_BR, mask_BR)
    left_BR = mask_BR.flip(1).cumsum(1).flip(1)
    last_BR = mask_BR * (left_BR == 1)
    return masked.kept(scores_B[:, None].expand_as(mask_BR), last_BR) - penalty_BR


def own(
    logprobs_BR: Tensor, reference_logprobs_BR: Tensor, exact_kl_BR: Tensor, mask_BR: Tensor, *, kl_coef: float
) -> Tensor:
    """What the token drawn adds to its own advantage where the reward has the exact KL, [B, R]: -`kl_coef` x (k1 - KL).

    Its mean over draws is 0, and its policy gradient that of the position's own KL, which the exact reward, the same
    for all tokens, cannot have; no other token's advantage nor a return contains it.
    """
    k1_BR = kl.estimate(logprobs_BR, reference_logprobs_BR, "k1")
    return -kl_coef * masked.kept(k1_BR - exact_kl_BR, mask_BR)


def missing_end(scores_B: Tensor, ended_B: Tensor, *, rule: str, value: float) -> Tensor:
    """Scores where a response without end token (`ended_B` 0) has its own replaced, lowered or kept.

    replace: the score is `value` (Ziegler et al. 2019: -1). subtract: the score less |`value`|. keep: the score.
    Raises ValueError for another rule.
    """
    if rule == "replace":
        changed_B = torch.full_like(scores_B, value)
    elif rule == "subtract":
        changed_B = scores_B - abs(value)
    elif rule == "keep":
        changed_B = scores_B
    else:
        raise ValueError(f"the rule for a missing end token is replace, subtract or keep, not '{rule}'")
    return torch.where(ended_B > 0, scores_B, changed_B)


def clipped(scores_B: Tensor, limit: float) -> Tensor:
    """Scores held within +-`limit`; 0 is off. Raises ValueError for a negative limit."""
    if limit < 0:
        raise ValueError(f"scores are clipped to +- a positive limit, or not at all with 0; {limit} is negative")
    return scores_B.clamp(-limit, limit) if limit else scores_B
