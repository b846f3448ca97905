"""Proves that the losses engines take are divided by counts of the whole batch, by tokens or by rows.

Not proved here: the losses themselves (tests/algorithms) and their gradients under a layout (tests/train).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_rlhf.batch import Annotated, Experience, Rollout, Rows
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Loss

WIDTH = 5


def rows() -> Rows:
    prompts, lengths = torch.tensor([2, 3, 1, 2]), torch.tensor([5, 8, 2, 6])
    return Rows(torch.ones(4, 8, dtype=torch.int64), prompts, lengths)


def experience() -> Experience:
    def made(seed: int) -> Tensor:
        return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))

    mask_BR = rows().response_mask_BR(WIDTH)
    rollout = Rollout(rows(), made(1), torch.ones(4), torch.zeros(4))
    return Experience(Annotated(rollout, made(2), made(3), made(4), mask_BR), made(5), made(6), made(7))


READ = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(9))
CASES = {
    "language": (losses.language_per, rows()),
    "policy": (lambda per: losses.policy(0.2, per), experience()),
    "value": (lambda per: losses.value(0.2, per), experience()),
}


def halves(loss: Loss, whole: Rows | Experience) -> Tensor:
    """The loss of two micro-batches of the batch, added."""
    parts = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    values = [loss(READ[index], whole.select(index), whole)[0] for index in parts]
    return values[0] + values[1]


@pytest.mark.parametrize("kind", CASES)
def test_tokens_and_rows_differ_by_their_counts_and_micro_batches_add(kind: str) -> None:
    made, whole = CASES[kind]
    tokens, episodes = int(rows().response_lengths_B.sum()), len(rows())
    assert tokens == 13 and episodes == 4
    by_token, by_row = (made(per)(READ, whole, whole)[0] for per in ("tokens", "rows"))
    assert by_token != 0
    torch.testing.assert_close(by_token * tokens, by_row * episodes)
    for per, value in (("tokens", by_token), ("rows", by_row)):
        torch.testing.assert_close(halves(made(per), whole), value)
