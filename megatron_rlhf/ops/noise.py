"""Gumbel noise of words from a row's two keys: a hash of counters, the same bits on every device.

B rows, V words. Integers are kept below 2^32 in int64 and every product below 2^63, so that CPU and GPU compute the
same bits up to the final logarithms; csrc/ computes them in 32-bit arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# "lowbias32" (C. Wellons, hash-prospector); the second multiplier minus 2^32 is the same modulo 2^32 and smaller.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_COLUMNS = 0x2B7E1516
_CHUNK = 1 << 16
"""Elements hashed at once on a CPU: 512 KiB of int64, which stays in cache."""


def gumbel(keys_2B: Tensor, vocab_start: int, columns: int) -> Tensor:
    """[B, columns] float32 Gumbel noise of the words from `vocab_start` on, a function of row keys and word alone.

    `keys_2B` are two independent numbers below 2^32 a row, in int64.
    """
    words_V = torch.arange(vocab_start, vocab_start + columns, device=keys_2B.device)
    columns_V = mix(words_V ^ _COLUMNS)
    noise_BV = torch.empty((keys_2B.shape[1], columns), dtype=torch.float32, device=keys_2B.device)
    size = max(1, _CHUNK // max(1, columns)) if noise_BV.device.type == "cpu" else max(1, len(noise_BV))
    for start in range(0, len(noise_BV), size):
        rows = slice(start, start + size)
        _to_gumbel(_hash(keys_2B[:, rows, None], columns_V), noise_BV[rows])
    return noise_BV


def mix(bits: Tensor) -> Tensor:
    """A bijection of 32-bit numbers whose every output bit depends on every input bit."""
    bits = ((bits ^ (bits >> 16)) * _FIRST) & MASK
    bits = ((bits ^ (bits >> 15)) * _SECOND) & MASK
    return bits ^ (bits >> 16)


def _hash(keys_2B1: Tensor, columns_V: Tensor) -> Tensor:
    """[B, V] 32 random bits in int64: one key enters before the first round, the other before the second."""
    bits = keys_2B1[0] ^ columns_V
    bits.bitwise_xor_(bits >> 16).mul_(_FIRST).bitwise_and_(MASK)
    bits.bitwise_xor_(keys_2B1[1])
    bits.bitwise_xor_(bits >> 15).mul_(_SECOND).bitwise_and_(MASK)
    return bits.bitwise_xor_(bits >> 16)


def _to_gumbel(bits: Tensor, out: Tensor) -> None:
    """out = -log(-log(1 - v)) with v = (bits + 1/2) / 2^32 in (0, 1): float32 is finest at small v, the upper tail."""
    out.copy_(bits).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    out.neg_().log1p_().neg_().log_().neg_()
