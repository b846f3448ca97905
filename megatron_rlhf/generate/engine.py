"""The generate phase: batched sampling with a key-value cache under the generate layout.

B sequences of the whole batch, b rows in flight, P prompt positions, R response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.batch import Prompts, Rollout, Rows
from megatron_rlhf.generate.sampling import Draw, draw
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


class Generator:
    """Draws responses from a network in the generate layout."""

    def __init__(self, network: Network, *, end: int, rows: int) -> None:
        """`end` closes a response; `rows` sequences of a replica are decoded together."""
        self.network = network
        self.end = end
        self.rows = rows
        self._pp = network.grid.groups.pp if network.grid.groups is not None else None
        for chunk in network.chunks:
            chunk.eval()

    @torch.no_grad()
    def sample(self, prompts: Prompts, draw_as: Draw, max_tokens: int) -> Rollout:
        """A response to every prompt, on every rank; scores are still 0. Collective: world.

        Responses end with the end token or after `max_tokens`; `ended_B` tells which.
        """
        grid = self.network.grid
        answers = Answers(torch.zeros(0, max_tokens, dtype=torch.int64), torch.zeros(0, max_tokens), *_none(), *_none())
        index = torch.zeros(0, dtype=torch.int64)
        if grid.inside:
            order = torch.argsort(prompts.lengths_B, descending=True, stable=True)
            index = order[grid.dp_rank :: grid.layout.dp]
            found = [self._batch(prompts, rows, draw_as, max_tokens) for rows in index.split(self.rows) if len(rows)]
            if found and grid.speaks:
                answers = Answers(*(torch.cat([getattr(a, name) for a in found]) for name in Answers.__slots__))
        owner = grid.speaks and len(answers.lengths_b) > 0
        whole = Answers(
            *(
                collectives.assemble(getattr(answers, name), index if owner else index[:0], len(prompts), owner)
                for name in Answers.__slots__
            )
        )
        return _rollout(prompts, whole)

    def _batch(self, prompts: Prompts, sequence_b: Tensor, draw_as: Draw, max_tokens: int) -> Answers:
        """Decode some sequences of this replica to their ends. Collective: tp, pp."""
        device = collectives.device()
        chosen = prompts.select(sequence_b)
        width = int(chosen.lengths_B.max())
        tokens_bP, lengths_b = chosen.tokens_BT[:, :width].to(device), chosen.lengths_B.to(device)
        sequence_b = sequence_b.to(device)
        cache = decode.Cache(self.network, len(sequence_b), width + max_tokens)
        answers = Answers(
            torch.zeros(len(sequence_b), max_tokens, dtype=torch.int64, device=device),
            torch.zeros(len(sequence_b), max_tokens, device=device),
            torch.zeros(len(sequence_b), dtype=torch.int64, device=device),
            torch.zeros(len(sequence_b), dtype=torch.int64, device=device),
        )
        cache.filled(lengths_b, decoding=False)
        live, open_b = torch.arange(len(sequence_b), device=device), torch.ones(len(sequence_b), dtype=torch.bool)
        drawn_b, logprobs_b = self._prefilled(tokens_bP, lengths_b, draw_as, sequence_b)
        try:
            for place in range(max_tokens):
                _record(answers, live[open_b], place, drawn_b[open_b], logprobs_b[open_b], self.end)
                open_b = open_b & (drawn_b != self.end).cpu()
                if place + 1 == max_tokens or not bool(open_b.any()):
                    break
                cache.filled(lengths_b, decoding=True)
                if int(open_b.sum()) <= _CROWDED * len(open_b):
                    keep = open_b.nonzero().squeeze(1).to(device)
                    cache.keep(keep)
                    live, drawn_b, lengths_b, open_b = live[keep], drawn_b[keep], lengths_b[keep], open_b[open_b]
                drawn_b, logprobs_b = self._advanced(drawn_b, lengths_b, draw_as, sequence_b[live], place + 1)
                lengths_b = lengths_b + 1
        finally:
            cache.drop()
        return Answers(*(getattr(answers, name).cpu() for name in Answers.__slots__))

    def _prefilled(
        self, tokens_bP: Tensor, lengths_b: Tensor, draw_as: Draw, sequence_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self._received((tokens_bP.shape[1], len(lengths_b)))
        output = decode.prefill(self.network.chunks[0], tokens_bP, lengths_b, hidden)
        return self._passed_on(output, draw_as, sequence_b, 0)

    def _advanced(
        self, drawn_b: Tensor, lengths_b: Tensor, draw_as: Draw, sequence_b: Tensor, place: int
    ) -> tuple[Tensor, Tensor]:
        hidden = self._received((1, len(drawn_b)))
        output = decode.advance(self.network.chunks[0], drawn_b, lengths_b, hidden)
        return self._passed_on(output, draw_as, sequence_b, place)

    def _received(self, shape: tuple[int, int]) -> Tensor | None:
        grid, config = self.network.grid, self.network.config
        if grid.first_stage:
            return None
        source = grid.layout.rank(grid.tp_rank, grid.pp_rank - 1, grid.dp_rank)
        return collectives.receive((*shape, config.hidden_size), config.params_dtype, source, self._pp)

    def _passed_on(self, output: Tensor, draw_as: Draw, sequence_b: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Send hidden states on, or draw on the last stage; every stage gets the tokens. Collective: tp, pp."""
        grid = self.network.grid
        if grid.last_stage:
            position_b = torch.full_like(sequence_b, place)
            tokens_b, logprobs_b = draw(self.network, output[:, 0], draw_as, sequence_b, position_b)
        else:
            following = grid.layout.rank(grid.tp_rank, grid.pp_rank + 1, grid.dp_rank)
            handle = collectives.send(output, following, self._pp)
            tokens_b, logprobs_b = torch.zeros_like(sequence_b), torch.zeros_like(sequence_b, dtype=torch.float32)
            handle.wait()
        if grid.layout.pp > 1:
            last = grid.layout.rank(grid.tp_rank, grid.layout.pp - 1, grid.dp_rank)
            collectives.broadcast(tokens_b, last, self._pp)
        return tokens_b, logprobs_b


def _record(answers: Answers, rows: Tensor, place: int, tokens_b: Tensor, logprobs_b: Tensor, end: int) -> None:
    answers.tokens_bR[rows, place] = tokens_b
    answers.logprobs_bR[rows, place] = logprobs_b
    answers.lengths_b[rows] = place + 1
    answers.ended_b[rows] = (tokens_b == end).long()


def _none() -> tuple[Tensor]:
    return (torch.zeros(0, dtype=torch.int64),)


def _rollout(prompts: Prompts, answers: Answers) -> Rollout:
    """The rows `[prompt, response, pad]` of prompts and their answers."""
    lengths_B = prompts.lengths_B + answers.lengths_b
    tokens_BT = torch.zeros(len(prompts), int(lengths_B.max()), dtype=torch.int64)
    tokens_BT[:, : prompts.tokens_BT.shape[1]] = prompts.tokens_BT[:, : tokens_BT.shape[1]]
    width = int(answers.lengths_b.max())
    at_BR = prompts.lengths_B[:, None] + torch.arange(width)
    real = torch.arange(width) < answers.lengths_b[:, None]
    rows = torch.arange(len(prompts))[:, None].expand_as(at_BR)
    tokens_BT[rows[real], at_BR[real]] = answers.tokens_bR[:, :width][real]
    return Rollout(
        Rows(tokens_BT, prompts.lengths_B, lengths_B),
        answers.logprobs_bR[:, :width],
        answers.ended_b,
        torch.zeros(len(prompts)),
    )
