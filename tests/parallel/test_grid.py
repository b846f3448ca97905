"""Proves that a layout's words become the right groups on every rank, several layouts beside each other, and that a
group nobody handed in is an error and not another layout's group.

Not proved here: NCCL; the rendezvous of `connect`.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.parallel import grid
from megatron_rlhf.parallel.collectives import any_rank, gather
from tests.helpers.grid import on_grid

LAYOUTS = {
    "tp2 pp2": {"tp": [[0, 1], [2, 3]], "pp": [[0, 2], [1, 3]], "dp": [[0], [1], [2], [3]]},
    "tp2 dp2": {"tp": [[0, 1], [2, 3]], "pp": [[0], [1], [2], [3]], "dp": [[0, 2], [1, 3]]},
    "pp2 dp2": {"tp": [[0], [1], [2], [3]], "pp": [[0, 2], [1, 3]], "dp": [[0, 1], [2, 3]]},
    "pp2 dp2 order=tp-pp-dp": {"tp": [[0], [1], [2], [3]], "pp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]]},
    "dp4": {"tp": [[0], [1], [2], [3]], "pp": [[0], [1], [2], [3]], "dp": [[0, 1, 2, 3]]},
    "tp2 @2-3": {"tp": [[2, 3]], "pp": [[2], [3]], "dp": [[2], [3]]},
}


def ranks(group: dist.ProcessGroup) -> list[int]:
    """The world ranks of a group."""
    return dist.get_process_group_ranks(group)


@on_grid(4)
@pytest.mark.parametrize("words", LAYOUTS)
def test_groups_are_those_of_the_words(words: str) -> None:
    """tp, pp and dp are as written; every other group Megatron reads follows from them."""
    built = grid.build(Layout.parse(words, 4))
    me, expected = dist.get_rank(), LAYOUTS[words]
    inside = any(me in group for group in expected["tp"])
    assert built.inside == inside
    if not inside:
        assert (built.groups, built.tp_rank, built.pp_rank, built.dp_rank) == (None, -1, -1, -1)
        assert not built.speaks
        return
    groups = built.groups
    for axis in ("tp", "pp", "dp"):
        (mine,) = (group for group in expected[axis] if me in group)
        assert ranks(getattr(groups, axis)) == mine
        assert mine.index(me) == getattr(built, f"{axis}_rank")
    pipeline = ranks(groups.pp)
    assert ranks(groups.embd) == sorted({pipeline[0], pipeline[-1]})
    if built.first_stage:
        assert ranks(groups.pos_embd) == [me]
    else:
        assert groups.pos_embd is None
    assert ranks(groups.cp) == ranks(groups.ep) == [me]
    assert ranks(groups.dp_cp) == ranks(groups.intra_dp_cp) == ranks(groups.dp)
    assert ranks(groups.intra_dist_opt) == sorted(r for group in expected["tp"] for r in group)
    assert len(ranks(groups.mp)) == built.layout.tp * built.layout.pp
    assert len(ranks(groups.tp_dp_cp)) == built.layout.tp * built.layout.dp


@on_grid(4)
def test_layouts_live_beside_each_other() -> None:
    """A sum over each layout's own group, in turn, is over its own ranks; the same words give the same grid."""
    built = [grid.build(Layout.parse(words, 4)) for words in LAYOUTS]
    for words, one in zip(LAYOUTS, built, strict=True):
        assert grid.build(Layout.parse(words, 4)) is one
        if one.groups is None:
            continue
        for axis in ("tp", "pp", "dp"):
            total = torch.tensor([float(dist.get_rank())])
            dist.all_reduce(total, group=getattr(one.groups, axis))
            (mine,) = (group for group in LAYOUTS[words][axis] if dist.get_rank() in group)
            assert float(total) == sum(mine), (words, axis)


@on_grid(4)
@pytest.mark.parametrize("words", LAYOUTS)
def test_one_rank_speaks_for_each_replica(words: str) -> None:
    """The first shard of the last stage."""
    built = grid.build(Layout.parse(words, 4))
    said = gather(torch.tensor([built.dp_rank if built.speaks else -1])).flatten().tolist()
    assert sorted(replica for replica in said if replica >= 0) == list(range(built.layout.dp))
    assert not any_rank(built.speaks and not (built.last_stage and built.tp_rank == 0))


@on_grid(4)
def test_a_forgotten_group_is_an_error() -> None:
    """Megatron's own global state stays uninitialised after grids are built."""
    grid.build(Layout.parse("tp2 pp2", 4))
    assert not parallel_state.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    for getter in (
        parallel_state.get_tensor_model_parallel_group,
        parallel_state.get_pipeline_model_parallel_group,
        parallel_state.get_data_parallel_group,
        parallel_state.get_embedding_group,
    ):
        with pytest.raises(AssertionError):
            getter()


@on_grid(4)
def test_seeds_are_equal_over_tp_and_differ_elsewhere() -> None:
    """Outside tensor-parallel regions shards draw alike, stages and replicas do not; the seed itself matters."""
    for words in ("tp2 pp2", "tp2 dp2"):
        built = grid.build(Layout.parse(words, 4))
        drawn = []
        for seed in (1, 2, 1):
            built.seed(seed)
            drawn.append(gather(torch.rand(1)).flatten().tolist())
        first, second, again = drawn
        assert first == again
        assert first[0] == first[1]
        assert first[2] == first[3]
        assert len({*first, *second}) == 4
