"""The exact KL of a policy from its reference at every response token, the sum over the vocabulary and no estimate.

Neither pass can have both models' logits, so the reference's leaves its hidden states on the rank that made them, and
the policy's, cut into the same micro-batches under the same layout, applies both heads side by side. b rows, N response
tokens of a micro-batch, R response positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.models import vocabulary
from megatron_rlhf.models.roles import Read, responses
from megatron_rlhf.models.transformer import Network


class ExactKl:
    """What the reference's pass over a batch leaves for the policy's, on the ranks of the last stage: hidden states
    [N, H] of response positions in host memory, a tensor a micro-batch, and the head. Nothing of it travels."""

    def __init__(self, temperature: float = 1.0, *, head_rows: int = 0) -> None:
        """Nothing is kept yet; of both models `head_rows` positions' logits exist at a time (models/vocabulary.py)."""
        self._temperature = temperature
        self._head_rows = head_rows
        self._head_VH: Tensor | None = None
        self._waiting: deque[tuple[Rows, Tensor]] = deque()

    def kept(self, *, lent: bool) -> Read:
        """Keeps the reference's hidden states and reads how many a row has, [b].

        `lent` says that its weights only lodge where they are (train/offload.py): the head is then copied, once.
        Collective: tp, under sequence parallelism.
        """

        def read(network: Network, hidden_cSH: Tensor, rows: Rows, width: int) -> Tensor:
            hidden_NH, at = responses(network, hidden_cSH, rows, width)
            if self._head_VH is None:
                head_VH = vocabulary.weight(network).detach()
                self._head_VH = head_VH.clone() if lent else head_VH
            self._waiting.append((rows, hidden_NH.detach().cpu()))
            return at.exists_bR.sum(1).float()

        return Read(read, per_token=False)

    def compared(self) -> Read:
        """Reads the policy's log-prob, entropy, KL(policy || reference) and the reference's log-prob, [b, 4, R], 0 on
        padding.

        Raises RuntimeError where the reference did not read the same rows in the same turn. Collective: tp.
        """

        def read(network: Network, hidden_cSH: Tensor, rows: Rows, width: int) -> Tensor:
            hidden_NH, at = responses(network, hidden_cSH, rows, width)
            reference_NH, head_VH = self._next(rows)
            found_4N = vocabulary.kl(
                network,
                hidden_NH,
                reference_NH,
                head_VH,
                at.targets_N,
                temperature=self._temperature,
                rows=self._head_rows,
            )
            return torch.stack([at.spread(found_N) for found_N in found_4N], 1)

        return Read(read, numbers=4)

    def finish(self) -> None:
        """Raises RuntimeError where the policy left some of what the reference kept."""
        if self._waiting:
            raise RuntimeError(f"the reference read {len(self._waiting)} micro-batches that the policy did not")

    def _next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The reference's hidden states of these rows, which are forgotten, and its head."""
        if not self._waiting or self._head_VH is None:
            raise RuntimeError("the policy reads a micro-batch that the reference did not")
        theirs, hidden_NH = self._waiting.popleft()
        if not _same(rows, theirs):
            raise RuntimeError("the policy reads other rows in this micro-batch than the reference did")
        return hidden_NH, self._head_VH


def _same(left: Rows, right: Rows) -> bool:
    return (
        torch.equal(left.lengths_B, right.lengths_B)
        and torch.equal(left.prompt_lengths_B, right.prompt_lengths_B)
        and torch.equal(left.tokens_BT, right.tokens_BT)
    )
