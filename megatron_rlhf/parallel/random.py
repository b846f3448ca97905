"""Noise that depends on what it is for and not on where it is drawn: a hash of counters instead of a generator.

B rows, V words. A row's key is (seed, iteration, sequence, position), a column's key the word's global number, so any
split of the batch or of the vocabulary draws the same noise. Integers are kept below 2^32 in int64 and every product
below 2^63, so that CPU and GPU compute the same bits up to the final logarithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# "lowbias32" (C. Wellons, hash-prospector); the second multiplier minus 2^32 is the same modulo 2^32 and smaller.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_ROWS = (0x243F6A88, 0x13198A2E)
_COLUMNS = 0x2B7E1516
_CHUNK = 1 << 16
"""Elements hashed at once on a CPU: 512 KiB of int64, which stays in cache."""


def gumbel(seed: int, iteration: int, sequence_B: Tensor, position_B: Tensor, vocab_start: int, columns: int) -> Tensor:
    """[B, columns] float32 Gumbel noise of the words from `vocab_start` on; argmax(log p + noise) draws from p.

    Each value is a function of (seed, iteration, sequence, position, word) alone.
    """
    keys_2B = _row_keys(seed, iteration, sequence_B.long(), position_B.long())
    words_V = torch.arange(vocab_start, vocab_start + columns, device=sequence_B.device)
    columns_V = _mix(words_V ^ _COLUMNS)
    noise_BV = torch.empty((len(sequence_B), columns), dtype=torch.float32, device=sequence_B.device)
    size = max(1, _CHUNK // max(1, columns)) if noise_BV.device.type == "cpu" else max(1, len(noise_BV))
    for start in range(0, len(noise_BV), size):
        rows = slice(start, start + size)
        _to_gumbel(_hash(keys_2B[:, rows, None], columns_V), noise_BV[rows])
    return noise_BV


def _row_keys(seed: int, iteration: int, sequence_B: Tensor, position_B: Tensor) -> Tensor:
    """[2, B] two independent 32-bit keys a row."""
    keys = torch.tensor(_ROWS, device=sequence_B.device)[:, None]
    for word in (seed, seed >> 32, iteration, sequence_B, sequence_B >> 32, position_B):
        keys = _mix(keys ^ (word & _MASK))
    return keys


def _hash(keys_2B1: Tensor, columns_V: Tensor) -> Tensor:
    """[B, V] 32 random bits in int64: one key enters before the first round, the other before the second."""
    bits = keys_2B1[0] ^ columns_V
    bits.bitwise_xor_(bits >> 16).mul_(_FIRST).bitwise_and_(_MASK)
    bits.bitwise_xor_(keys_2B1[1])
    bits.bitwise_xor_(bits >> 15).mul_(_SECOND).bitwise_and_(_MASK)
    return bits.bitwise_xor_(bits >> 16)


def _mix(bits: Tensor) -> Tensor:
    """A bijection of 32-bit numbers whose every output bit depends on every input bit."""
    bits = ((bits ^ (bits >> 16)) * _FIRST) & _MASK
    bits = ((bits ^ (bits >> 15)) * _SECOND) & _MASK
    return bits ^ (bits >> 16)


def _to_gumbel(bits: Tensor, out: Tensor) -> None:
    """out = -log(-log(1 - v)) with v = (bits + 1/2) / 2^32 in (0, 1): float32 is finest at small v, the upper tail."""
    out.copy_(bits).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    out.neg_().log1p_().neg_().log_().neg_()
