"""What is foreseen of one point of a sweep, to lie beside what is then measured. Pure, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_rlhf.config.load import flat
from megatron_rlhf.config.schema import Config
from megatron_rlhf.plan import times
from megatron_rlhf.plan.calibrate import CLOCKS
from megatron_rlhf.plan.plan import RECIPES, Plan
from megatron_rlhf.plan.times import Phase


def point(config: Config, world: int, verb: str, *, foreseen: bool) -> dict[str, Any]:
    """What the plan is for and, where machines were chosen for it to be `foreseen`: seconds of a step of `verb` by the
    phases of log.jsonl, bytes of the busiest GPU, and the operations that MFU counts. What is missing was not foreseen.
    """
    told = {
        "world": world,
        "layouts": asdict(config.layout),
        "cluster": asdict(config.cluster),
        "settings": {key: value for key, value in flat(config).items() if key != "out"},
    }
    if foreseen and verb == "ppo":
        plan = Plan.of(config, world)
        memory = {phase.name: phase.total for phase in plan.memory}
        return {**told, **_seconds(plan.phases), "rated_flops": config.cluster.flops, "memory_bytes": memory}
    if foreseen and verb in RECIPES:
        return {**told, **_seconds(times.step(config, world, verb)), "rated_flops": config.cluster.flops}
    return told


def _seconds(phases: Sequence[Phase]) -> dict[str, Any]:
    by_clock: dict[str, float] = {}
    for phase in phases:
        clock = next((clock for clock, timed in CLOCKS.items() if phase.name in timed), phase.name)
        by_clock[clock] = by_clock.get(clock, 0.0) + phase.seconds.total
    return {
        "seconds": math.fsum(phase.seconds.total for phase in phases),
        "seconds_by_phase": by_clock,
        "flops": math.fsum(phase.flops for phase in phases),
    }
