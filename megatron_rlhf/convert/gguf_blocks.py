"""ggml's block formats as floats: 32 numbers share a scale d, the formats _1 a smallest number m too.

A format _0 holds signed integers q and stands for d q, a format _1 unsigned ones and stands for d q + m; the low
halves of 16 bytes are the first 16 numbers, the high halves the last 16, and fifth bits lie in 32 bits of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kind:
    """A block format: how many `numbers` a block of `size` bytes stands for, and the dtype that they are read in."""

    name: str
    numbers: int
    size: int
    dtype: torch.dtype = torch.float32


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2, torch.float16),
    30: Kind("BF16", 1, 2, torch.bfloat16),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
}
"""What can be read, by ggml's number."""
_OTHERS = (
    "9 Q8_1, 10 Q2_K, 11 Q3_K, 12 Q4_K, 13 Q5_K, 14 Q6_K, 15 Q8_K, 16 IQ2_XXS, 17 IQ2_XS, 18 IQ3_XXS, 19 IQ1_S, "
    "20 IQ4_NL, 21 IQ3_S, 22 IQ2_S, 23 IQ4_XS, 24 I8, 25 I16, 26 I32, 27 I64, 28 F64, 29 IQ1_M, 34 TQ1_0, 35 TQ2_0, "
    "39 MXFP4"
)
OTHERS = {int(number): name for number, name in (pair.split() for pair in _OTHERS.split(", "))}
"""Names of what cannot."""


def numbers(kind: Kind, data: bytes) -> Tensor:
    """The numbers of whole blocks, in `kind.dtype`."""
    if kind.numbers == 1:
        # writable memory of its own, which torch asks for
        return torch.frombuffer(bytearray(data), dtype=kind.dtype)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.size)
    lowest = kind.name.endswith("_1")
    scale = _halves(blocks[:, :2])
    rest = blocks[:, 4 if lowest else 2 :]
    whole = rest.view(np.int8).astype(np.float32) if kind.name == "Q8_0" else _small(kind, rest, lowest)
    found = whole * scale
    return torch.from_numpy(found + _halves(blocks[:, 2:4]) if lowest else found).view(-1)


def _small(kind: Kind, rest: NDArray[np.uint8], unsigned: bool) -> NDArray[np.float32]:
    five = kind.name.startswith("Q5")
    packed = rest[:, 4:] if five else rest
    whole = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int16)
    if five:
        whole |= np.unpackbits(rest[:, :4], axis=1, bitorder="little").astype(np.int16) << 4
    return (whole - (0 if unsigned else 16 if five else 8)).astype(np.float32)


def _halves(two: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(two).view("<f2").astype(np.float32)
