"""Where ranks sit: the nodes of a cluster, and the places of a layout as arrays. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Cluster

__all__ = ["OUTSIDE", "Cluster", "Ints", "Seats"]

Ints = NDArray[np.int64]
OUTSIDE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Seats:
    """A layout's coordinates by world rank, `OUTSIDE` for ranks it does not span, and its ranks by coordinate."""

    tp: Ints
    pp: Ints
    dp: Ints
    ranks: Ints
    """World ranks, indexed [tp, pp, dp]."""

    @classmethod
    def of(cls, layout: Layout, world: int) -> Seats:
        """The seats of `layout` in a world of `world` ranks."""
        shape = (layout.tp, layout.pp, layout.dp)
        slots = list(np.ndindex(*shape))
        ranks = np.array([layout.rank(*slot) for slot in slots], dtype=np.int64)
        axes = np.full((3, world), OUTSIDE, dtype=np.int64)
        axes[:, ranks] = np.array(slots, dtype=np.int64).T
        return cls(axes[0], axes[1], axes[2], ranks.reshape(shape))
