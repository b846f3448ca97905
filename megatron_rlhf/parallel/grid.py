"""The grid of ranks of a role: layout words → ranks → process groups, handed to Megatron as a ProcessGroupCollection.

Several grids live in one process. Megatron's own global state is never initialised (its memory buffer alone is set,
which sequence parallelism reads), so a forgotten group is an error and not another layout's group.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rlhf.config import env
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.parallel.meeting import meet

TIMEOUT = timedelta(minutes=30)
_PRIME = 0x9E3779B1


@dataclass(frozen=True, slots=True)
class Grid:
    """One layout's groups as this rank sees them; outside its ranks `groups` is None and coordinates are -1."""

    layout: Layout
    groups: ProcessGroupCollection | None
    tp_rank: int
    pp_rank: int
    dp_rank: int

    @property
    def inside(self) -> bool:
        """Whether this rank is one of the layout's."""
        return self.groups is not None

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pp_rank == self.layout.pp - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank hands out its replica's results: the first shard of the last stage."""
        return self.inside and self.last_stage and self.tp_rank == 0

    def seed(self, seed: int) -> None:
        """Seed this rank's generators: equal over tp outside tensor-parallel regions, different over pp and dp."""
        place = self.pp_rank + self.layout.pp * self.dp_rank
        model_parallel_cuda_manual_seed(
            (seed * _PRIME + place * 2654435) % 2**31,
            tp_rank=self.tp_rank,
            ep_rank=0,
            etp_rank=0,
            force_reset_rng=True,
        )


def connect(seconds: float = TIMEOUT.total_seconds()) -> None:
    """Join the world that the environment describes: NCCL where there are GPUs, gloo elsewhere.

    Raises Absent where a rank has not come after `seconds`. Collective: world.
    """
    if not dist.is_initialized():
        store = meet(seconds)
        store.set_timeout(TIMEOUT)
        if torch.cuda.is_available():
            torch.cuda.set_device(env.local_rank())
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=env.rank(),
            world_size=env.world_size(),
            timeout=TIMEOUT,
        )


@cache
def build(layout: Layout) -> Grid:
    """The grid of `layout`; the same layout gives the same groups. Collective: world."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    tp, pp, dp = range(layout.tp), range(layout.pp), range(layout.dp)
    at = layout.rank
    tp_group = _mine([[at(t, p, d) for t in tp] for p in pp for d in dp])
    pp_group = _mine([[at(t, p, d) for p in pp] for t in tp for d in dp])
    dp_group = _mine([[at(t, p, d) for d in dp] for t in tp for p in pp])
    mp_group = _mine([[at(t, p, d) for p in pp for t in tp] for d in dp])
    tp_dp_group = _mine([[at(t, p, d) for d in dp for t in tp] for p in pp])
    ends = [[at(t, p, d) for p in sorted({0, layout.pp - 1})] for t in tp for d in dp]
    embd_group = _mine(ends)
    pos_embd_group = _mine([[at(t, 0, d)] for t in tp for d in dp])
    everyone = _mine([[at(t, p, d) for p in pp for d in dp for t in tp]])
    alone = _alone()
    coordinate = layout.coordinate(dist.get_rank())
    if coordinate is None:
        return Grid(layout, None, -1, -1, -1)
    groups = ProcessGroupCollection(
        tp=tp_group, pp=pp_group, mp=mp_group, embd=embd_group, pos_embd=pos_embd_group,
        cp=alone, tp_cp=tp_group, hcp=[], ep=alone, expt_tp=tp_group, tp_ep=tp_group, tp_ep_pp=mp_group,
        tp_dp_cp=tp_dp_group, dp=dp_group, dp_cp=dp_group, expt_dp=dp_group, intra_dp_cp=dp_group,
        intra_expt_dp=dp_group, inter_dist_opt=alone, intra_dist_opt=everyone,
    )  # fmt: skip
    t, p, d = coordinate
    return Grid(layout, groups, t, p, d)


@cache
def _alone() -> dist.ProcessGroup | None:
    return _mine([[rank] for rank in range(dist.get_world_size())])


def _mine(partition: list[list[int]]) -> dist.ProcessGroup | None:
    """Make every group of the partition, in the same order on all ranks, and keep the one this rank is in."""
    mine = None
    for ranks in partition:
        group = dist.new_group(ranks, timeout=TIMEOUT)
        if dist.get_rank() in ranks:
            mine = group
    return mine
