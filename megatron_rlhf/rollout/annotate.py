"""Three forward passes in the train layouts: the policy's old log-probs, the reference's, and the values."""

from __future__ import annotations

from megatron_rlhf.batch import Annotated, Rollout
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import resident


def annotate(rollout: Rollout, policy: Engine, reference: Engine, value: Engine) -> Annotated:
    """The rollout with old and reference log-probs and values [B, R]. Collective: world.

    The old log-probs are re-scored here and not taken from the generator: the first ratio is then 1.
    """
    rows = rollout.rows
    with resident(reference):
        reference_logprobs_BR = reference.forward(rows)
    return Annotated(
        rollout=rollout,
        old_logprobs_BR=policy.forward(rows),
        reference_logprobs_BR=reference_logprobs_BR,
        values_BR=value.forward(rows),
        mask_BR=rows.response_mask_BR(rows.width),
    )
