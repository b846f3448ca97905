"""Rotary positions with their scaling variants, and rows at positions of their own while decoding.

s positions of a row, b rows, d numbers of a head that turn: its first ones, all where `rope.fraction` is 1. The module
of Megatron has one offset for a whole batch and fixed constants for the Llama 3 variant; the angles made here go into
its attention unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rlhf.config.schema import Model, Rope

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""Rotations within the original context above which YaRN leaves a frequency, and below which it divides it."""


def frequencies(rope: Rope, width: int) -> Tensor:
    """The d/2 inverse frequencies base^(-2i/d) in float32 of heads that turn d of their numbers, changed as
    `rope.scaling` says.

    linear: Chen et al. 2023 (arXiv 2306.15595); llama3: Llama 3.1's smoothed division of the low frequencies;
    yarn: Peng et al. 2023 (arXiv 2309.00071), "NTK by parts".
    """
    plain = rope.base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        rotations = rope.original_context * plain / (2 * math.pi)
        smooth = ((rotations - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        return plain * (smooth + (1 - smooth) / rope.factor)
    if rope.scaling == "yarn":
        return _by_parts(rope, width, plain)
    return plain


def attention_factor(rope: Rope) -> float:
    """What attention logits are multiplied by: 1, and (0.1 ln(factor) + 1)^2 for yarn (arXiv 2309.00071, eq. 22)."""
    return (0.1 * math.log(rope.factor) + 1) ** 2 if rope.scaling == "yarn" and rope.factor > 1 else 1.0


def _by_parts(rope: Rope, width: int, plain: Tensor) -> Tensor:
    def place(rotations: float) -> float:
        """The pair of dimensions that turns `rotations` times within the original context."""
        return width * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = max(math.floor(place(BETA_FAST)), 0), min(math.ceil(place(BETA_SLOW)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / rope.factor * ramp


class Rotary(torch.nn.Module):
    """Angles [s, 1, 1, d] of positions 0 to s-1, or [1, b, 1, d] of `positions_b` while these are set."""

    def __init__(self, model: Model, config: TransformerConfig) -> None:
        """Compute the frequencies of `model` once, in fp32 whatever the stage's precision."""
        super().__init__()
        with torch.device("cpu"):
            self.frequencies = frequencies(model.rope, model.rotary_width)
        self.shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.positions_b: Tensor | None = None

    def get_rotary_seq_len(self, context: Any, transformer: Any, hidden: Tensor, *_: Any) -> int:
        """Positions of the rows that the stage is given, whatever part of them this shard holds."""
        received = transformer.input_tensor
        return int((hidden if received is None else received).shape[0]) * self.shards

    def forward(self, length: int, **_: Any) -> Tensor:
        """The angles; the two halves of the numbers that turn do so together."""
        self.frequencies = self.frequencies.to(torch.cuda.current_device())
        if self.positions_b is None:
            positions = torch.arange(length, device=self.frequencies.device)
            angles = torch.outer(positions.float(), self.frequencies)[:, None]
        else:
            angles = torch.outer(self.positions_b.float(), self.frequencies)[None]
        return torch.cat([angles, angles], dim=-1)[:, :, None]
