"""What PPO measures of its episodes, and the checks that must hold exactly at the start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rlhf.algorithms import kl
from megatron_rlhf.batch import Annotated, Experience, Rollout
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.recipes.judge import CHITCHAT, gold_preference, texts
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.reshard import drift
from megatron_rlhf.train.engine import Engine

RATIO_LIMIT = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2.5e-3}
"""fp16 rounds 8 times finer than bf16."""


def episodes(experience: Experience) -> Stats:
    """KL, score, reward, length, share with end token (a response each) and drift, mean exp|Δ log-prob| (a token)
    with the quantiles of |Δ log-prob|. Where the KL is exact so is the one here, and entropy (a token) is with it."""
    annotated, rollout, mask_BR = experience.annotated, experience.annotated.rollout, experience.mask_BR
    old_BR, reference_BR = annotated.old_logprobs_BR, annotated.reference_logprobs_BR
    apart_BR = _apart_BR(annotated)
    tail = {f"drift.{name}": value for name, value in drift.quantiles(apart_BR, mask_BR).items()}
    count, tokens = len(experience), _sum(mask_BR)
    exact_BR, entropy_BR = annotated.exact_kl_BR, annotated.entropy_BR
    kl_BR = kl.estimate(old_BR, reference_BR, "k1") if exact_BR is None else exact_BR
    entropy = {} if entropy_BR is None else {"entropy": (_sum(entropy_BR * mask_BR), tokens)}
    return Stats.of(
        kl=(_sum(kl_BR * mask_BR), count),
        kl__k3=(_sum(kl.estimate(old_BR, reference_BR, "k3") * mask_BR), count),
        score=(_sum(rollout.scores_B), count),
        reward=(_sum(experience.rewards_BR), count),
        response_length=(tokens, count),
        end_share=(_sum(rollout.ended_B), count),
        drift=(_sum(apart_BR.exp() * mask_BR), tokens),
        advantage__square=(_sum(experience.advantages_BR**2), tokens),
        tokens=(_sum(experience.rows.lengths_B), 1),
        **{name: (value, 1) for name, value in tail.items()},
        **entropy,
    )


def drifted(annotated: Annotated, policy: Engine, generate: Network) -> str:
    """A sentence where the generate phase's log-probs are further from the train phase's than rounding explains, with
    the layer at which the two networks part; "" where they are not. Before the next update. Collective: world."""
    apart_BR, mask_BR = _apart_BR(annotated), annotated.mask_BR
    found, limit = _sum(apart_BR.exp() * mask_BR) / _sum(mask_BR), drift.LIMIT[policy.network.model.precision]
    if found <= limit:
        return ""
    worst = (apart_BR * mask_BR).nan_to_num(torch.inf).amax(1).topk(min(2, len(mask_BR))).indices
    where = drift.bisect(policy, generate, annotated.rollout.rows.select(worst))
    return f"log-probs drift by {found:.5g} between generating and training, {limit} is rounding; {where}"


def judge(run: Session, tokenizer: Tokenizer) -> Callable[[Rollout], Stats]:
    """The mean gold score of a rollout on rank 0, to be plotted and never learned from; nothing where there is none."""
    preference = gold_preference(run) if run.config.data.source == CHITCHAT else None

    def judged(rollout: Rollout) -> Stats:
        if preference is None:
            return Stats()
        rows = rollout.rows
        asked = [
            tokenizer.decode(tokens[:length])
            for tokens, length in zip(rows.tokens_BT.tolist(), rows.prompt_lengths_B.tolist(), strict=True)
        ]
        golds = preference.scores(asked, texts(rollout, tokenizer), rollout.ended_B.bool().tolist())
        return Stats.of(gold=(sum(gold.total for gold in golds), len(golds)))

    return judged


def named(stats: Stats, role: str) -> Stats:
    """The same statistics with the role's name behind each."""
    return Stats(
        {f"{name}.{role}": value for name, value in stats.sums.items()},
        {f"{name}.{role}": value for name, value in stats.weights.items()},
    )


def first_kl(checks: dict[str, float], annotated: Annotated, *, same: bool) -> None:
    """Record the KL of the very first rollout, the exact one where there is one; raises RuntimeError when it, or that
    of the drawn tokens, should be exactly 0 and is not."""
    if "step0_kl" in checks:
        return
    found = [kl.estimate(annotated.old_logprobs_BR, annotated.reference_logprobs_BR, "k3")]
    if annotated.exact_kl_BR is not None:
        found.append(annotated.exact_kl_BR)
    for apart_BR in found:
        checks["step0_kl"] = _sum(apart_BR * annotated.mask_BR) / len(apart_BR)
        if same and checks["step0_kl"] != 0.0:
            raise RuntimeError(
                f"the policy is {checks['step0_kl']:.3g} nats from the reference before the first update, "
                "under one layout: their weights or their forward passes differ"
            )


def first_ratio(checks: dict[str, float], stats: Stats, precision: str) -> None:
    """Record mean |ratio − 1| of the very first minibatch; raises RuntimeError above the precision's limit, or NaN."""
    if "first_ratio_error" in checks:
        return
    checks["first_ratio_error"] = stats["ratio_error"]
    if not checks["first_ratio_error"] <= RATIO_LIMIT[precision]:
        raise RuntimeError(
            f"the first minibatch has mean |ratio - 1| = {checks['first_ratio_error']:.3g}, {precision} allows "
            f"{RATIO_LIMIT[precision]}: old and new log-probs are not computed alike (dropout, temperature or padding)"
        )


def _apart_BR(annotated: Annotated) -> Tensor:
    """|Δ log-prob| of the train and the generate phase."""
    old_BR = annotated.old_logprobs_BR
    return (old_BR - annotated.rollout.drawn_logprobs_BR[:, : old_BR.shape[1]]).abs()


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
