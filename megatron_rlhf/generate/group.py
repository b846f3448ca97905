"""The state of sequences that are decoded together on one stage: their cache, what was drawn, and which rows go on.

b rows of the group, P prompt positions, R response tokens, h hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.batch import Prompts
from megatron_rlhf.models import decode
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives

# Rows that have ended keep their place until this share is left: packing the cache copies it.
_CROWDED = 0.75


@dataclass(frozen=True, slots=True)
class Answers:
    """Responses of some sequences, padded with 0: tokens and drawn log-probs [b, R], lengths and ended [b]."""

    tokens_bR: Tensor
    logprobs_bR: Tensor
    lengths_b: Tensor
    ended_b: Tensor

    @classmethod
    def empty(cls, rows: int, max_tokens: int, device: torch.device | None = None) -> Answers:
        """Answers of `rows` sequences without a token yet."""
        tokens_bR = torch.zeros(rows, max_tokens, dtype=torch.int64, device=device)
        lengths_b = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(tokens_bR, torch.zeros(rows, max_tokens, device=device), lengths_b, lengths_b.clone())

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """All rows of `parts`, at least one, on the CPU."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in cls.__slots__))

    def record(self, rows: Tensor, place: int, tokens_b: Tensor, logprobs_b: Tensor, end: int) -> None:
        """Token `place` of the sequences `rows`."""
        self.tokens_bR[rows, place] = tokens_b
        self.logprobs_bR[rows, place] = logprobs_b
        self.lengths_b[rows] = place + 1
        self.ended_b[rows] = (tokens_b == end).long()


class Group:
    """Some sequences of a replica, from their prompts to their ends, as one stage knows them.

    `place` counts the tokens drawn. Log-probs are those handed to `take`, zeros on stages that do not draw.
    """

    def __init__(self, network: Network, prompts: Prompts, sequence_b: Tensor, max_tokens: int, end: int) -> None:
        """The rows `sequence_b` of `prompts`, at least one; allocates their cache."""
        device = collectives.device()
        chosen = prompts.select(sequence_b)
        width = int(chosen.lengths_B.max())
        self.sequence_b = sequence_b
        self.answers = Answers.empty(len(sequence_b), max_tokens, device)
        self.place = 0
        self._network, self._max_tokens, self._end = network, max_tokens, end
        self._tokens_bP, self._lengths_b = chosen.tokens_BT[:, :width].to(device), chosen.lengths_B.to(device)
        self._all_b, self._drawn_b = sequence_b.to(device), torch.zeros_like(self._lengths_b)
        self._live = torch.arange(len(sequence_b), device=device)
        self._open_b = torch.ones(len(sequence_b), dtype=torch.bool)
        self._cache = decode.Cache(network, len(sequence_b), width + max_tokens)
        self._cache.filled(self._lengths_b, decoding=False)

    @property
    def done(self) -> bool:
        """Whether every row has ended or reached the limit."""
        return self.place == self._max_tokens or not bool(self._open_b.any())

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and rows of the next step: [P, b], then [1, b]."""
        return (1 if self.place else self._tokens_bP.shape[1]), len(self._live)

    @property
    def live_b(self) -> Tensor:
        """Global numbers of the next step's rows, on the device."""
        return self._all_b[self._live]

    def forward(self, hidden: Tensor | None) -> Tensor:
        """The stage's output of the next step: hidden states for the next stage, or logits [b, 1, V/tp]."""
        self._cache.activate()
        if self.place == 0:
            return decode.prefill(self._network, self._tokens_bP, self._lengths_b, hidden)
        output = decode.advance(self._network, self._drawn_b, self._lengths_b, hidden)
        self._lengths_b = self._lengths_b + 1
        return output

    def take(self, tokens_b: Tensor, logprobs_b: Tensor) -> None:
        """Record what was drawn for `live_b`; rows that ended are packed away, a group that is done frees its cache."""
        open_b = self._open_b
        self.answers.record(self._live[open_b], self.place, tokens_b[open_b], logprobs_b[open_b], self._end)
        self._open_b = open_b & (tokens_b != self._end).cpu()
        self._drawn_b = tokens_b
        self.place += 1
        if self.done:
            self.drop()
            return
        self._cache.activate()
        self._cache.filled(self._lengths_b, decoding=True)
        if int(self._open_b.sum()) <= _CROWDED * len(self._open_b):
            self._pack(self._open_b.nonzero().squeeze(1).to(tokens_b.device))

    def _pack(self, keep: Tensor) -> None:
        self._cache.keep(keep)
        self._live, self._drawn_b, self._lengths_b = self._live[keep], self._drawn_b[keep], self._lengths_b[keep]
        self._open_b = self._open_b[self._open_b]

    def drop(self) -> None:
        """Free the cache."""
        self._cache.drop()
