"""What a role reads off its network: response log-probs of a policy, values of a value model, the score of a reward.

b rows, c lines of S positions that hold them (`Rows.places`), R response tokens, V vocabulary. Everything leaves in
fp32.
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

    def read(network: Network, logits_cSV: Tensor, rows: Rows, width: int) -> Tensor:
        targets_cS = _targets(rows, logits_cSV.shape[:2]).to(logits_cSV.device)
        found_cS, _ = vocab.logprobs(
            logits_cSV,
            targets_cS,
            vocab_start=network.vocab_start,
            vocab_size=network.model.vocabulary,
            group=network.grid.groups.tp if network.grid.groups is not None else None,
            temperature=temperature,
        )
        return _aligned(found_cS, rows, width)

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


def _targets(rows: Rows, shape: torch.Size) -> Tensor:
    """The next token where it belongs to the row's response, -1 elsewhere, [c, S]."""
    targets_cS = torch.full(shape, -1, dtype=torch.int64)
    following_bT = rows.tokens_BT[:, 1:]
    position_T = torch.arange(following_bT.shape[1])
    predicts_bT = (position_T >= rows.prompt_lengths_B[:, None] - 1) & (position_T < rows.lengths_B[:, None] - 1)
    line_b, start_b = rows.places()
    line_bT, place_bT = line_b[:, None].expand_as(predicts_bT), start_b[:, None] + position_T
    targets_cS[line_bT[predicts_bT], place_bT[predicts_bT]] = following_bT[predicts_bT]
    return targets_cS


def _aligned(found_cS: Tensor, rows: Rows, width: int) -> Tensor:
    """Column r is the position that predicts response token r."""
    mask_bR = rows.response_mask_BR(width).to(found_cS)
    return _picked(found_cS, rows, rows.prompt_lengths_B[:, None] - 1 + torch.arange(width)) * mask_bR


def _picked(found_cS: Tensor, rows: Rows, position_bR: Tensor) -> Tensor:
    """What stands at positions of each row, [b, R]; anything where a row has no such position."""
    line_b, start_b = rows.places()
    place_bR = (start_b[:, None] + position_bR).clamp(0, found_cS.shape[1] - 1)
    return found_cS[line_b[:, None].to(found_cS.device), place_bR.to(found_cS.device)]
