"""Means, moments and whitening over the positions a mask keeps.

`mask` has the shape of `x`: 1.0 where a position counts, 0.0 elsewhere. What stands under a 0 never reaches a result
or a gradient, be it NaN. Everything here is local: where the batch is spread over ranks, hand `moments` in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is 1 and 0 elsewhere, with no gradient elsewhere."""
    return x.masked_fill(mask == 0, 0)


def share(total: Tensor, count: int | Tensor) -> Tensor:
    """`total / count`, and `total` itself, a sum over nothing, where the count is 0."""
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of `x` over the mask, 0 where the mask is empty."""
    return share(kept(x, mask).sum(), mask.sum())


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (divided by the count) of `x` over the mask."""
    return _moments(x, mask)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`x` scaled to variance 1 over the mask, and to mean 0 if `shift_mean` (else it keeps its mean); 0 elsewhere.

    The variance is biased, as in lm-human-preferences; `moments` are mean and variance measured elsewhere.
    """
    center, variance = _moments(x, mask) if moments is None else moments
    whitened = (x - center) * torch.rsqrt(variance + 1e-8)
    return kept(whitened if shift_mean else whitened + center, mask)


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    center = mean(x, mask)
    return center, mean((x - center) ** 2, mask)
