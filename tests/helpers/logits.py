"""Reading every logit off a policy, to compare with another implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.models import roles, vocabulary
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel.collectives import gather


class AllLogits(roles.Read):
    """Reads every logit of the vocabulary at `shape[0]` positions, [b, length, V]. Collective: tp."""

    __slots__ = ("shape",)

    def trailing(self, width: int) -> tuple[int, ...]:
        return self.shape


def all_logits(length: int, words: int) -> roles.Read:
    """What a policy says of each of `words` words at the first `length` positions."""

    def read(network: Network, hidden_bSH: Tensor, rows: Rows, width: int) -> Tensor:
        assert network.grid.groups is not None
        logits_bSV = vocabulary.logits(network, vocabulary.whole(network, hidden_bSH))
        shards = gather(logits_bSV, network.grid.groups.tp)
        return torch.cat(list(shards), -1)[:, :length, :words].float()

    chosen = AllLogits(read)
    object.__setattr__(chosen, "shape", (length, words))
    return chosen
