"""What a role reads off its network: response log-probs of a policy, values of a value model, the score of a reward.

b rows, S positions, R response tokens, V vocabulary. Everything leaves in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import vocab

Forward = Callable[[Network, Tensor, Rows, int], Tensor]


@dataclass(frozen=True, slots=True)
class Read:
    """How a stage output becomes a row's numbers; `per_token` tells [b, R] from [b]."""

    of: Forward
    per_token: bool = True

    def trailing(self, width: int) -> tuple[int, ...]:
        """The shape of a row's numbers."""
        return (width,) if self.per_token else ()


def logprobs(temperature: float = 1.0) -> Read:
    """Reads log π(y_t | x, y_<t) of the temperature-scaled softmax over the true vocabulary, [b, R], 0 on padding.

    Collective: tp.
    """

    def read(network: Network, logits_bSV: Tensor, rows: Rows, width: int) -> Tensor:
        targets_bS = _targets(rows, logits_bSV.shape[1]).to(logits_bSV.device)
        found_bS, _ = vocab.logprobs(
            logits_bSV,
            targets_bS,
            vocab_start=network.vocab_start,
            vocab_size=network.model.vocabulary,
            group=network.grid.groups.tp if network.grid.groups is not None else None,
            temperature=temperature,
        )
        return _aligned(found_bS, rows, width)

    return Read(read)


def values() -> Read:
    """Reads V(x, y_<t) at the position that predicts y_t, [b, R], 0 on padding."""

    def read(network: Network, values_bS1: Tensor, rows: Rows, width: int) -> Tensor:
        return _aligned(values_bS1.squeeze(-1), rows, width)

    return Read(read)


def scores() -> Read:
    """Reads the score at the last response token, [b]; an empty row reads 0."""

    def read(network: Network, values_bS1: Tensor, rows: Rows, width: int) -> Tensor:
        last_b = (rows.lengths_B - 1).clamp(min=0).to(values_bS1.device)
        picked_b = values_bS1.squeeze(-1).gather(1, last_b[:, None]).squeeze(1)
        return picked_b * (rows.lengths_B > 0).to(picked_b)

    return Read(read, per_token=False)


def _targets(rows: Rows, length: int) -> Tensor:
    """The next token where it belongs to the response, -1 elsewhere, [b, S]."""
    targets_bS = torch.full((len(rows), length), -1, dtype=torch.int64)
    following = rows.tokens_BT[:, 1:length]
    targets_bS[:, : following.shape[1]] = following
    position = torch.arange(length)
    predicts = (position >= rows.prompt_lengths_B[:, None] - 1) & (position < rows.lengths_B[:, None] - 1)
    return targets_bS.masked_fill(~predicts, -1)


def _aligned(found_bS: Tensor, rows: Rows, width: int) -> Tensor:
    """Column r is the position that predicts response token r."""
    index_bR = (rows.prompt_lengths_B[:, None] - 1 + torch.arange(width)).clamp(0, found_bS.shape[1] - 1)
    mask_bR = rows.response_mask_BR(width).to(found_bS)
    return found_bS.gather(1, index_bR.to(found_bS.device)) * mask_bR
