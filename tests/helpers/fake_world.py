"""One rank of a large world in this process: torch's fake process group, which sends nothing and waits for nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.parallel import grid
from megatron_rlhf.parallel.grid import Grid


@contextmanager
def fake_grid(layout: Layout, tp: int, pp: int, dp: int = 0) -> Iterator[Grid]:
    """The product's grid of `layout` as the rank at (tp, pp, dp) of its world sees it."""
    rank, world = layout.rank(tp, pp, dp), layout.first + layout.size
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield grid.build(layout)
    finally:
        grid.build.cache_clear()
        grid._alone.cache_clear()
        dist.destroy_process_group()
