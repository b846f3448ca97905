"""The nouns that travel between phases: Prompts, Rollout, Experience; Demonstrations are Rows; Rankings.

B sequences, T positions (prompt, response, pad), R response positions, P prompts of rankings, K responses of one.
Rows are `[prompt, response, pad]`; the response of row b is `tokens_BT[b, prompt_lengths_B[b]:lengths_B[b]]`, its end
token included. In `_BR` tensors column r is response token r. Padding is token 0; an empty row has length 0. A line
is a row of a network's input: one row from position 0 on, or several end to end (PackedRows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from typing_extensions import Self


class _Sliced:
    """Row selection shared by every noun whose tensors have the batch as their first dimension."""

    __slots__ = ()

    def select(self, index: Tensor) -> Self:
        """The elements `index` of the batch; an index of -1 gives an empty element (zeros)."""
        values = {item.name: _pick(getattr(self, item.name), index) for item in fields(self)}  # type: ignore[arg-type]
        return replace(self, **values)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class Prompts(_Sliced):
    """Prompts to answer: `tokens_BT` right-padded, `lengths_B`, and the place `ids_B` of each in its data set."""

    tokens_BT: Tensor
    lengths_B: Tensor
    ids_B: Tensor

    def __len__(self) -> int:
        """The number of prompts."""
        return self.tokens_BT.shape[0]


@dataclass(frozen=True, slots=True)
class Rows(_Sliced):
    """Token rows `[prompt, response, pad]`; demonstrations, pretraining rows (prompt of one token) and episodes."""

    tokens_BT: Tensor
    prompt_lengths_B: Tensor
    lengths_B: Tensor

    def __len__(self) -> int:
        """The number of rows."""
        return self.tokens_BT.shape[0]

    @property
    def rows(self) -> Rows:
        """Itself, as every noun an engine takes answers `rows`."""
        return self

    @property
    def response_lengths_B(self) -> Tensor:
        """Tokens of each response, the end token included; 0 for an empty row."""
        return (self.lengths_B - self.prompt_lengths_B).clamp(min=0)

    @property
    def width(self) -> int:
        """R: the longest response of the batch, at least 1."""
        return max(1, int(self.response_lengths_B.max())) if len(self) else 1

    def response_mask_BR(self, width: int) -> Tensor:
        """1.0 where response token r of row b exists, float32 [B, width]."""
        return (torch.arange(width) < self.response_lengths_B[:, None]).float()

    def places(self) -> tuple[Tensor, Tensor]:
        """The line of the network's input that each row lies in and the position it starts at: its own, from 0 on."""
        return torch.arange(len(self)), torch.zeros(len(self), dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class PackedRows(Rows):
    """Rows that lie end to end in fewer, longer lines: row b in line `line_B`, from position `start_B` on."""

    line_B: Tensor
    start_B: Tensor

    def places(self) -> tuple[Tensor, Tensor]:
        """The line each row lies in and the position it starts at."""
        return self.line_B, self.start_B


@dataclass(frozen=True, slots=True)
class Rankings(_Sliced):
    """Up to K responses of each of P prompts with their ranks: 1 is best, equal is a tie, 0 is padding."""

    tokens_PKT: Tensor
    prompt_lengths_PK: Tensor
    lengths_PK: Tensor
    ranks_PK: Tensor

    def __len__(self) -> int:
        """The number of prompts."""
        return self.tokens_PKT.shape[0]

    @property
    def rows(self) -> Rows:
        """The P x K rows, each completion once."""
        return Rows(self.tokens_PKT.flatten(0, 1), self.prompt_lengths_PK.flatten(), self.lengths_PK.flatten())


@dataclass(frozen=True, slots=True)
class Rollout(_Sliced):
    """Episodes with the log-probs they were drawn with; `ended_B` is 1 where the response closed with the end token."""

    rows: Rows
    drawn_logprobs_BR: Tensor
    ended_B: Tensor
    scores_B: Tensor

    def __len__(self) -> int:
        """The number of episodes."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Annotated(_Sliced):
    """A scored rollout with the log-probs of the policy and of the reference and the values, all as the train layout
    computes them; with the exact KL and the policy's entropy at every response token where they were asked for."""

    rollout: Rollout
    old_logprobs_BR: Tensor
    reference_logprobs_BR: Tensor
    values_BR: Tensor
    mask_BR: Tensor
    exact_kl_BR: Tensor | None = None
    entropy_BR: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Experience(_Sliced):
    """What an iteration learns from: the annotated episodes with rewards, whitened advantages and returns."""

    annotated: Annotated
    rewards_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor

    def __len__(self) -> int:
        """The number of episodes."""
        return len(self.annotated.rollout)

    @property
    def rows(self) -> Rows:
        """The token rows of the episodes."""
        return self.annotated.rollout.rows

    @property
    def mask_BR(self) -> Tensor:
        """1.0 on response tokens, up to and including the end token."""
        return self.annotated.mask_BR

    def minibatches(self, size: int, epochs: int, seed: int) -> Iterator[Experience]:
        """Shuffled minibatches of `size` episodes, `epochs` times over; the order is a function of `seed` alone."""
        for epoch in range(epochs):
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed + epoch))
            for start in range(0, len(self), size):
                yield self.select(order[start : start + size])


def _pick(value: object, index: Tensor) -> object:
    if value is None:
        return None
    if isinstance(value, _Sliced):
        return value.select(index)
    assert isinstance(value, Tensor)
    picked = value[index.clamp(min=0)]
    empty = (index < 0).reshape(-1, *([1] * (value.dim() - 1)))
    return picked.masked_fill(empty, 0)


def joined(left: Rows, right: Rows) -> Rows:
    """The rows of both, padded to the longer of the two."""
    width = max(left.tokens_BT.shape[1], right.tokens_BT.shape[1])
    padded = [torch.nn.functional.pad(rows.tokens_BT, (0, width - rows.tokens_BT.shape[1])) for rows in (left, right)]
    return Rows(
        torch.cat(padded),
        torch.cat([left.prompt_lengths_B, right.prompt_lengths_B]),
        torch.cat([left.lengths_B, right.lengths_B]),
    )
