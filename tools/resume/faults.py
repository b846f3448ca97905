"""What a careless resume forgets, planted into a run after it has taken up its state: the verifier must see each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch

from megatron_rlhf.checkpoint.resume import Saved
from megatron_rlhf.parallel.grid import Grid
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.train.engine import Engine


def _rng() -> None:
    """The second tensor-parallel rank draws its dropout masks as if no update had been made."""
    seed = Grid.seed

    def forgetful(updates: int) -> Callable[[Grid, int], None]:
        return lambda grid, key: seed(grid, key - 104729 * updates * (grid.tp_rank == 1))

    def forget(engines: Mapping[str, Engine]) -> None:
        Grid.seed = forgetful(max(engine.updates for engine in engines.values()))  # type: ignore[method-assign]

    _once_filled(forget)


def _cursor() -> None:
    """Every data order stands one element further than it did."""
    saved = Session.saved

    @wraps(saved)
    def shifted(run: Session, stage: str) -> Saved | None:
        found = saved(run, stage)
        if found is not None:
            for place in _cursors(found.common):
                place["place"] += 1
        return found

    Session.saved = shifted  # type: ignore[method-assign]


def _average() -> None:
    """The weight average was not saved: it starts once more at the live weights."""

    def restart(engines: Mapping[str, Engine]) -> None:
        for engine in engines.values():
            if engine.average is not None and engine.optimizer is not None:
                for shard, live in zip(engine.average.shards, engine.optimizer.shards(), strict=True):
                    shard.copy_(live.detach())

    _once_filled(restart)


def _shared_step() -> None:
    """All parameters of an optimizer count their steps in one tensor, which then races ahead."""

    def share(engines: Mapping[str, Engine]) -> None:
        for engine in engines.values():
            for adam in engine.optimizer.adams() if engine.optimizer else ():
                steps = [entry["step"] for entry in adam.state.values() if isinstance(entry.get("step"), torch.Tensor)]
                for entry in adam.state.values():
                    if "step" in entry:
                        entry["step"] = steps[0]

    _once_filled(share)


PLANT: Mapping[str, Callable[[], None]] = {
    "rng": _rng,
    "cursor": _cursor,
    "average": _average,
    "shared-step": _shared_step,
}
"""Plants the fault of chain.FAULTS of that name into this process."""


def _once_filled(spoil: Callable[[Mapping[str, Engine]], None]) -> None:
    fill = Saved.fill

    @wraps(fill)
    def spoiled(saved: Saved, engines: Mapping[str, Any]) -> None:
        fill(saved, engines)
        spoil(engines)

    Saved.fill = spoiled  # type: ignore[method-assign]


def _cursors(common: Mapping[str, Any]) -> list[dict[str, int]]:
    """The places in data orders anywhere in a state."""
    inner = [value for value in common.values() if isinstance(value, dict)]
    return [value for value in inner if "place" in value] + [
        found for value in inner if "place" not in value for found in _cursors(value)
    ]
