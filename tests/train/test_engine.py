"""Proves that a pass that learns runs all modules in training mode and a pass that reads none, whatever went before.

Not proved here: what dropout then does (test_optimizer).
"""

from __future__ import annotations

from megatron_rlhf.recipes import losses
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


@on_grid(4)
def test_the_mode_follows_the_pass() -> None:
    """One after the other, and after someone set the mode of the stage inside the buffers, as a generator does."""
    role = tiny.engine("tp2 pp2")
    rows = tiny.rows(6)
    assert role.optimizer is not None
    modules = [module for stage in role.optimizer.stages for module in stage.modules()]
    for learns in (False, True, True, False, False, True):
        for meddles in (False, True):
            if meddles:
                for chunk in role.network.chunks:
                    chunk.train(not learns)
            if learns:
                role.accumulate(rows, losses.language)
            else:
                role.forward(rows)
            assert {module.training for module in modules} == {learns}
