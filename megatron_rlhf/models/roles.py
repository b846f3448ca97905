"""What a role reads off its network: response log-probs of a policy, values of a value model, the score of a reward.

b rows, c lines of S positions that hold them (`Rows.places`), R response tokens, H hidden. Everything leaves in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.models import vocabulary
from megatron_rlhf.models.transformer import Network

Forward = Callable[[Network, Tensor, Rows, int], Tensor]


@dataclass(frozen=True, slots=True)
class Read:
    """How a stage output becomes a row's numbers: [b, R] with `per_token`, [b, `numbers`, R] where a token has several
    numbers, else [b]."""

    of: Forward
    per_token: bool = True
    numbers: int = 1

    def trailing(self, width: int) -> tuple[int, ...]:
        """The shape of a row's numbers."""
        if not self.per_token:
            return ()
        return (width,) if self.numbers == 1 else (self.numbers, width)


def logprobs(temperature: float = 1.0, *, head_rows: int = 0) -> Read:
    """Reads log π(y_t | x, y_<t) of the temperature-scaled softmax over the true vocabulary, [b, R], 0 on padding.

    The vocabulary head sees the positions that predict response tokens and no others, `head_rows` at a time where that
    is not 0 (models/vocabulary.py). Collective: tp.
    """

    def read(network: Network, hidden_cSH: Tensor, rows: Rows, width: int) -> Tensor:
        hidden_NH, at = responses(network, hidden_cSH, rows, width)
        found_N = vocabulary.logprobs(network, hidden_NH, at.targets_N, temperature=temperature, rows=head_rows)
        return at.spread(found_N)

    return Read(read)


def values() -> Read:
    """Reads V(x, y_<t) at the position that predicts y_t, [b, R], 0 on padding."""

    def read(network: Network, values_cS1: Tensor, rows: Rows, width: int) -> Tensor:
        return _aligned(values_cS1.squeeze(-1), rows, width)

    return Read(read)


def scores() -> Read:
    """Reads the score at the last response token, [b]; an empty row reads 0."""

    def read(network: Network, values_cS1: Tensor, rows: Rows, width: int) -> Tensor:
        picked_b = _picked(values_cS1.squeeze(-1), rows, (rows.lengths_B - 1)[:, None]).squeeze(1)
        return picked_b * (rows.lengths_B > 0).to(picked_b)

    return Read(read, per_token=False)


@dataclass(frozen=True, slots=True)
class Responses:
    """The N response tokens of b rows: which of [b, R] they are, and what they are."""

    exists_bR: Tensor
    targets_N: Tensor

    def spread(self, found_N: Tensor) -> Tensor:
        """Their numbers as [b, R], 0 on padding."""
        return found_N.new_zeros(self.exists_bR.shape).masked_scatter(self.exists_bR, found_N)


def responses(network: Network, hidden_cSH: Tensor, rows: Rows, width: int) -> tuple[Tensor, Responses]:
    """The hidden states [N, H] of the positions that predict response tokens, equal on the ranks of tp, and the tokens.

    Collective: tp, under sequence parallelism.
    """
    hidden_cSH = vocabulary.whole(network, hidden_cSH)
    exists_bR = rows.response_mask_BR(width) > 0
    line_b, start_b = rows.places()
    token_bR = rows.prompt_lengths_B[:, None] + torch.arange(width)
    # a row without a prompt has no position that predicts its first token; its own is taken
    place_bR = start_b[:, None] + (token_bR - 1).clamp(min=0)
    index_N = (place_bR * len(hidden_cSH) + line_b[:, None])[exists_bR]
    targets_bR = rows.tokens_BT.gather(1, token_bR.clamp(max=rows.tokens_BT.shape[1] - 1))
    here = hidden_cSH.device
    # Megatron lays positions before lines, so this flattens without a copy
    hidden_NH = hidden_cSH.transpose(0, 1).flatten(0, 1).index_select(0, index_N.to(here))
    return hidden_NH, Responses(exists_bR.to(here), targets_bR[exists_bR].to(here))


def _aligned(found_cS: Tensor, rows: Rows, width: int) -> Tensor:
    """Column r is the position that predicts response token r."""
    mask_bR = rows.response_mask_BR(width).to(found_cS)
    return _picked(found_cS, rows, rows.prompt_lengths_B[:, None] - 1 + torch.arange(width)) * mask_bR


def _picked(found_cS: Tensor, rows: Rows, position_bR: Tensor) -> Tensor:
    """What stands at positions of each row, [b, R]; anything where a row has no such position."""
    line_b, start_b = rows.places()
    place_bR = (start_b[:, None] + position_bR).clamp(0, found_cS.shape[1] - 1)
    return found_cS[line_b[:, None].to(found_cS.device), place_bR.to(found_cS.device)]
