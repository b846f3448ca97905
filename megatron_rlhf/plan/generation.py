"""Seconds of the generate phase: prompts fill the cache, then one token a row at a time. Pure, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlhf.plan.pipeline import waited
from megatron_rlhf.plan.roofline import Seconds
from megatron_rlhf.plan.stage import Stage


@dataclass(frozen=True, slots=True)
class Turns:
    """How a replica's sequences take turns in its stages (generate/engine.py): `groups` of `rows`."""

    groups: int
    rows: int
    together: int
    """Groups that are under way at a time."""

    @classmethod
    def of(cls, episodes: int, replicas: int, batch: int, asked: int, stages: int) -> Turns:
        """`episodes` over `replicas`, `batch` decoded together in `asked` groups, 0 for one a stage."""
        local = math.ceil(episodes / replicas)
        together = min(asked or stages, batch)
        size = batch // together
        if local >= together * size:
            return cls(math.ceil(local / size), size, together)
        groups = min(together, local)
        return cls(groups, math.ceil(local / groups), groups)

    @property
    def rounds(self) -> float:
        """How often as many groups as fit follow each other from prompt to end."""
        return self.groups / self.together


def prefilled(stage: Stage, turns: Turns, prompt: int) -> Seconds:
    """Every group's prompts through the stages, the first token drawn."""
    layer = stage.layer_forward(turns.rows, prompt)
    return _taking_turns(stage, turns, stage.layers * layer + stage.drawn(turns.rows), turns.rows * prompt)


def decoded(stage: Stage, turns: Turns, slots: int, tokens: int) -> Seconds:
    """`tokens` further tokens of every row. A step reads the stage's weights and the group's whole cache, `slots` a
    row: the filled ones and those that wait, since the mask and not the length leaves them out (models/attention.py).
    """
    step = stage.layers * stage.decoded(turns.rows, slots) + stage.drawn(turns.rows)
    return tokens * _taking_turns(stage, turns, step, turns.rows)


def _taking_turns(stage: Stage, turns: Turns, step: Seconds, tokens: int) -> Seconds:
    """One step of every group. A stage is busy for each of its groups in turn; the groups that are together come back
    to it after all stages and hops between them, so fewer groups than stages leave a bubble (generate/scheduler.py).
    """
    stages = stage.layout.pp
    hop = stage.passed(tokens) + (stage.roof.sent(8 * turns.rows, stage.reach.pp) if stages > 1 else Seconds())
    busy = turns.groups * (step + hop)
    around = turns.rounds * stages * (step + hop).total
    return waited(busy + Seconds(bubble=max(0.0, around - busy.total)), stage)
