"""Three forward passes in the train layouts: the policy's old log-probs, the reference's, and the values."""

from __future__ import annotations

from torch import Tensor

from megatron_rlhf.batch import Annotated, Rollout, Rows
from megatron_rlhf.models.exact_kl import ExactKl
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import resident


def annotate(
    rollout: Rollout, policy: Engine, reference: Engine, value: Engine, exact_kl: ExactKl | None = None
) -> Annotated:
    """The rollout with old and reference log-probs and values [B, R], and with `exact_kl` the exact KL and the policy's
    entropy. Collective: world.

    The old log-probs are re-scored here and not taken from the generator: the first ratio is then 1. The exact KL needs
    both models in one layout and cut alike; raises ValueError elsewhere.
    """
    rows = rollout.rows
    entropy_BR: Tensor | None = None
    kl_BR: Tensor | None = None
    if exact_kl is None:
        with resident(reference):
            reference_BR = reference.forward(rows)
        old_BR = policy.forward(rows)
    else:
        old_BR, entropy_BR, kl_BR, reference_BR = _compared(rows, policy, reference, exact_kl)
    return Annotated(
        rollout=rollout,
        old_logprobs_BR=old_BR,
        reference_logprobs_BR=reference_BR,
        values_BR=value.forward(rows),
        mask_BR=rows.response_mask_BR(rows.width),
        exact_kl_BR=kl_BR,
        entropy_BR=entropy_BR,
    )


def _compared(rows: Rows, policy: Engine, reference: Engine, exact_kl: ExactKl) -> tuple[Tensor, ...]:
    """Old log-probs, entropy, exact KL and reference log-probs [B, R]. Collective: world."""
    layouts = [role.network.grid.layout for role in (policy, reference)]
    if layouts[0] != layouts[1]:
        raise ValueError(f"the exact KL needs policy and reference in one layout, not in {layouts[0]} and {layouts[1]}")
    if policy.compute != reference.compute:
        raise ValueError("the exact KL needs policy and reference cut alike, into the same micro-batches and buckets")
    with resident(reference):
        reference.forward(rows, exact_kl.kept(lent=reference.network is policy.network))
    found_B4R = policy.forward(rows, exact_kl.compared())
    exact_kl.finish()
    return found_B4R.unbind(1)
