"""Noise that depends on what it is for and not on where it is drawn: a hash of counters instead of a generator.

B rows, V words. A row's key is (seed, iteration, sequence, position), a column's key the word's global number, so any
split of the batch or of the vocabulary draws the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.ops import noise

_ROWS = (0x243F6A88, 0x13198A2E)


def gumbel(seed: int, iteration: int, sequence_B: Tensor, position_B: Tensor, vocab_start: int, columns: int) -> Tensor:
    """[B, columns] float32 Gumbel noise of the words from `vocab_start` on; argmax(log p + noise) draws from p.

    Each value is a function of (seed, iteration, sequence, position, word) alone.
    """
    return noise.gumbel(row_keys(seed, iteration, sequence_B, position_B), vocab_start, columns)


def row_keys(seed: int, iteration: int, sequence_B: Tensor, position_B: Tensor) -> Tensor:
    """[2, B] two independent 32-bit keys a row, in int64."""
    sequence_B, position_B = sequence_B.long(), position_B.long()
    # filled in on the device: copying numbers to a GPU would wait for its queue
    keys = torch.stack([torch.full_like(sequence_B, row) for row in _ROWS])
    for word in (seed, seed >> 32, iteration, sequence_B, sequence_B >> 32, position_B):
        keys = noise.mix(keys ^ (word & noise.MASK))
    return keys
