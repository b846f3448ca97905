"""The language loss is the mean negative log-prob of the masked tokens of the whole batch, whatever its micro-batches.

Not proved here: that the engine's log-probs and masks stand at the right positions.
"""

import pytest
import torch

from megatron_rlhf.algorithms import language_loss

LOGPROBS = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, float("nan"), -9.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


def test_by_hand() -> None:
    """Tokens cost 1, 2, 4 and 3: 10 over 4, and each counted token's gradient is -1/4."""
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, stats = language_loss.token_mean(logprobs, MASK, num_tokens=4)
    loss.backward()
    assert loss.item() == 2.5 == stats["loss.language"]
    assert (float(stats.sums["loss.language"]), float(stats.weights["loss.language"])) == (10.0, 4.0)
    assert not stats.sums["loss.language"].requires_grad
    assert logprobs.grad is not None and torch.equal(logprobs.grad, -MASK / 4)


def test_micro_batches_add_to_the_batch() -> None:
    count = MASK.sum()
    parts = [language_loss.token_mean(LOGPROBS[i : i + 1], MASK[i : i + 1], num_tokens=count) for i in (0, 1)]
    assert parts[0][0] + parts[1][0] == pytest.approx(2.5)
    assert (parts[0][1] + parts[1][1])["loss.language"] == 2.5


def test_empty_rows_cost_nothing() -> None:
    loss, stats = language_loss.token_mean(LOGPROBS, torch.zeros_like(MASK), num_tokens=0)
    assert loss == 0 and stats["loss.language"] == 0
