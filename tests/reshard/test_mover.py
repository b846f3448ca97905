"""Scratch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard.move import Mover
from megatron_rlhf.reshard.layout import specs
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid
from tests.helpers.naive_plan import naive


def planned(source, target):
    return naive(
        specs(source.model, source.rows, scalar=source.scalar), source.grid.layout,
        specs(target.model, target.rows, scalar=target.scalar), target.grid.layout)[dist.get_rank()]


@on_grid(4, timeout=40)
@pytest.mark.parametrize("pair", [("tp2 pp2", "tp2 dp2"), ("tp2 pp2", "pp4"), ("pp2 dp2 order=tp-pp-dp", "tp4"), ("tp1 pp2 @0-1", "tp2 @2-3"), ("pp2 vp2 dp2", "tp2 pp2"), ("tp4", "tp1 @0-0")])
def test_pairs(pair):
    for style in tiny.STYLES:
        role = tiny.engine(pair[0], model=tiny.STYLES[style], rate=0.01)
        for rows in (tiny.PADDED, 112):
            target = tiny.network(pair[1], role.network.model, seed=77, rows=rows)
            for staging in (1 << 20, 4096):
                mover = Mover(role.network, target, planned(role.network, target), staging=staging, check=staging==4096) if staging == 1<<20 else mover
                for number in range(2):
                    role.accumulate(tiny.rows(seed=number), losses.language)
                    role.update()
                    moved = mover.run()
                    print(dist.get_rank(), pair, moved, len(mover._exchanges))
                    expected = tiny.main_weights(role)
                    expected = {n: t[: rows] if t.shape[0] == tiny.PADDED and "embedding.word" in n or "output_layer" in n else t for n, t in expected.items()}
                    assert tiny.equal(tiny.weights(target), expected)
                    assert tiny.copies_agree(target)
