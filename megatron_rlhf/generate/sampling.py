"""Drawing a token from logits split over the vocabulary, by perturbed maxima.

Noise is keyed by (seed, iteration, sequence, position, global vocabulary id), so a draw does not depend on the layout,
on the other rows, or on when it is made. b rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import random, vocab
from megatron_rlhf.parallel.collectives import Group, gather


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw: temperature (0 is greedy), and top-k / top-p for samples shown to people (never in PPO)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    iteration: int = 0


def draw(
    network: Network, logits_bV: Tensor, draw_as: Draw, sequence_b: Tensor, position_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The drawn tokens [b] and their log-probs [b] under the full temperature-scaled softmax.

    Collective: tp (every shard gets the same answer).
    """
    groups = network.grid.groups
    assert groups is not None
    where: dict[str, Any] = {
        "vocab_start": network.vocab_start,
        "vocab_size": network.model.vocabulary,
        "group": groups.tp,
        "temperature": draw_as.temperature or 1.0,
    }
    if draw_as.temperature == 0:
        return vocab.draw(logits_bV, None, **where)
    if not draw_as.top_k and draw_as.top_p == 1.0:
        return vocab.draw(logits_bV, random.row_keys(draw_as.seed, draw_as.iteration, sequence_b, position_b), **where)
    tokens_b = _among_the_likeliest(logits_bV, draw_as, sequence_b, position_b, **where)
    logprobs_b, _ = vocab.logprobs(logits_bV, tokens_b, **where)
    return tokens_b, logprobs_b


def _among_the_likeliest(
    logits_bV: Tensor,
    draw_as: Draw,
    sequence_b: Tensor,
    position_b: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: Group,
    temperature: float,
) -> Tensor:
    """Tokens drawn from the k likeliest, or the smallest set of mass p. Collective: tp."""
    scaled_bV = logits_bV[:, : max(0, vocab_size - vocab_start)].float() / temperature
    noise_bV = random.gumbel(draw_as.seed, draw_as.iteration, sequence_b, position_b, vocab_start, scaled_bV.shape[1])
    perturbed_bV = (scaled_bV + noise_bV).masked_fill(~_allowed(scaled_bV, draw_as, group), -torch.inf)
    best_b, index_b = _local_best(perturbed_bV, vocab_start)
    pairs = gather(torch.stack([best_b.double(), index_b.double()]), group)
    winner_b = pairs[:, 0].argmax(0)
    return pairs[:, 1].gather(0, winner_b[None]).squeeze(0).long()


def _local_best(perturbed_bV: Tensor, start: int) -> tuple[Tensor, Tensor]:
    if perturbed_bV.shape[1] == 0:
        nothing = torch.full(perturbed_bV.shape[:1], -torch.inf, device=perturbed_bV.device)
        return nothing, torch.zeros_like(nothing, dtype=torch.int64)
    best_b, index_b = perturbed_bV.max(1)
    return best_b, index_b + start


def _allowed(scaled_bV: Tensor, draw_as: Draw, group: Group) -> Tensor:
    """Which of this shard's columns are among the k best and in the smallest set of mass p."""
    widest = gather(torch.tensor([scaled_bV.shape[1]], device=scaled_bV.device), group).max()
    padding = int(widest) - scaled_bV.shape[1]
    even_bV = torch.nn.functional.pad(scaled_bV, (0, padding), value=-torch.inf)
    everything_bV = gather(even_bV, group).transpose(0, 1).flatten(1)
    ordered_bV, _ = everything_bV.sort(1, descending=True)
    threshold_b = ordered_bV[:, min(draw_as.top_k, ordered_bV.shape[1]) - 1] if draw_as.top_k else ordered_bV[:, -1]
    if draw_as.top_p < 1.0:
        mass_bV = ordered_bV.softmax(1).cumsum(1)
        count_b = (mass_bV < draw_as.top_p).sum(1).clamp(max=ordered_bV.shape[1] - 1)
        threshold_b = torch.maximum(threshold_b, ordered_bV.gather(1, count_b[:, None]).squeeze(1))
    return scaled_bV >= threshold_b[:, None]
