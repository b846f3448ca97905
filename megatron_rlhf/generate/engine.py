"""The generate phase: batched sampling with a key-value cache under the generate layout.

B sequences of the whole batch, b sequences of a group, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rlhf.batch import Prompts, Rollout, Rows
from megatron_rlhf.generate import room, scheduler
from megatron_rlhf.generate.group import Answers, Group
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives


class Generator:
    """Draws responses from a network in the generate layout."""

    def __init__(
        self, network: Network, *, end: int, rows: int, groups: int = 0, ready: Callable[[], None] | None = None
    ) -> None:
        """`end` closes a response; `rows` sequences of a replica are decoded together (0: as many as fit in the free
        memory), in `groups` (0: one a stage). `ready` is asked before anything is drawn, and raises if it is not."""
        self.network = network
        self.end = end
        self.rows = rows
        self.groups = groups or network.grid.layout.pp
        self.ready = ready
        for chunk in network.chunks:
            chunk.eval()

    @torch.no_grad()
    def sample(self, prompts: Prompts, draw_as: Draw, max_tokens: int) -> Rollout:
        """A response to every prompt, on every rank; scores are still 0. Collective: world.

        Responses end with the end token or after `max_tokens`; `ended_B` tells which.
        """
        if self.ready is not None:
            self.ready()
        grid, rows = self.network.grid, self.rows
        if rows == 0:
            rows = room.rows(self.network, int(prompts.lengths_B.max()), max_tokens, self.groups)
        together = min(self.groups, rows)
        answers, index = Answers.empty(0, max_tokens), torch.zeros(0, dtype=torch.int64)
        if grid.inside:
            order = torch.argsort(prompts.lengths_B, descending=True, stable=True)
            parts = _parts(order[grid.dp_rank :: grid.layout.dp], rows, together)
            groups = (Group(self.network, prompts, sequence_b, max_tokens, self.end) for sequence_b in parts)
            done = scheduler.run(self.network, groups, together, draw_as)
            if done and grid.speaks:
                index = torch.cat([group.sequence_b for group in done])
                answers = Answers.joined([group.answers for group in done])
        owner = len(index) > 0
        whole = (collectives.assemble(getattr(answers, a), index, len(prompts), owner) for a in Answers.__slots__)
        return _rollout(prompts, Answers(*whole))


def _parts(index: Tensor, rows: int, groups: int) -> Sequence[Tensor]:
    """The sequences of a replica in parts of which `groups` hold at most `rows` sequences together.

    There are at least `groups` parts where there are as many sequences, and none without a sequence.
    """
    size = rows // groups
    if len(index) >= groups * size:
        return index.split(size)
    return index.tensor_split(min(groups, len(index))) if len(index) else []


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
