"""The vocabulary head of a language model, applied to those hidden states whose words are asked for.

c lines of S positions, N positions that are asked for, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import vocab, vocab_head

FORWARD_ROWS = 1024
"""Positions whose logits exist together where no gradient is wanted."""


def weight(network: Network) -> Tensor:
    """This rank's words of the head [V/tp, H], the word embedding where they are tied; on the last stage alone."""
    stage = network.chunks[-1]
    if stage.share_embeddings_and_output_weights:
        return stage.shared_embedding_or_output_weight()
    return stage.output_layer.weight


def whole(network: Network, hidden_cSH: Tensor) -> Tensor:
    """The last stage's hidden states at all S positions, equal on the ranks of tp, as their gradients must be.

    Collective: tp, under sequence parallelism.
    """
    if not network.config.sequence_parallel:
        return hidden_cSH
    assert network.grid.groups is not None
    # Every rank will have the same gradient, so it is sliced and not summed.
    gathered = gather_from_sequence_parallel_region(
        hidden_cSH.transpose(0, 1), tensor_parallel_output_grad=False, group=network.grid.groups.tp
    )
    return gathered.transpose(0, 1)


def logits(network: Network, hidden: Tensor) -> Tensor:
    """This rank's columns of the logits [..., V/tp] of hidden states [..., H] equal on the ranks of tp, in their dtype.

    Collective: tp, in the backward pass.
    """
    assert network.grid.groups is not None
    return copy_to_tensor_model_parallel_region(hidden, network.grid.groups.tp) @ weight(network).T


def logprobs(
    network: Network, hidden_NH: Tensor, targets_N: Tensor, *, temperature: float = 1.0, rows: int = 0
) -> Tensor:
    """Log-probs [N], float32, of `targets_N` under the head's temperature-scaled softmax over the true vocabulary.

    With `rows` only so many positions' logits exist at a time, and are made once more in the backward pass; with 0 they
    are made once and the gradient is written over them. Never more than FORWARD_ROWS without a gradient.
    Collective: tp.
    """
    where = _where(network)
    if not torch.is_grad_enabled():
        rows = min(rows or FORWARD_ROWS, FORWARD_ROWS)
    if rows:
        hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, where["group"])
        found_N, _ = vocab_head.linear_logprobs(
            hidden_NH, weight(network), targets_N, temperature=temperature, rows=rows, **where
        )
    else:
        found_N, _ = vocab.logprobs(
            logits(network, hidden_NH), targets_N, temperature=temperature, inplace=True, **where
        )
    return found_N


@torch.no_grad()
def kl(
    network: Network,
    hidden_NH: Tensor,
    reference_NH: Tensor,
    reference_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    rows: int = 0,
) -> Tensor:
    """[4, N] float32, no gradient: log-prob, entropy, exact KL(policy || reference), and the reference's log-prob.

    `reference_NH` are its hidden states at the same positions, in any memory, and `reference_VH` this rank's words of
    its head. At most `rows` positions' logits exist at a time, and never more than FORWARD_ROWS. Collective: tp.
    """
    where, rows, head_VH = _where(network), min(rows or FORWARD_ROWS, FORWARD_ROWS), weight(network)
    found = []
    for ours_NH, theirs_NH, at_N in zip(
        hidden_NH.split(rows), reference_NH.split(rows), targets_N.split(rows), strict=True
    ):
        theirs_NV = theirs_NH.to(ours_NH.device) @ reference_VH.T
        found.append(torch.stack(vocab.kl(ours_NH @ head_VH.T, theirs_NV, at_N, temperature=temperature, **where)))
    return torch.cat(found, 1)


def _where(network: Network) -> dict[str, Any]:
    """Which words this rank has and who has the others, as parallel/vocab.py takes it."""
    group = network.grid.groups.tp if network.grid.groups is not None else None
    return {"vocab_start": network.vocab_start, "vocab_size": network.model.vocabulary, "group": group}
