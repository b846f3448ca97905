"""The loop of the supervised recipes: resume, learn, log, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rlhf.algorithms.schedule import multiplier
from megatron_rlhf.config.schema import Learning
from megatron_rlhf.observe import pulse
from megatron_rlhf.observe.progress import Progress
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.train.engine import Engine, Loss
from megatron_rlhf.train.microbatch import Batch

ROLE = "model"
"""What a supervised stage's one role is called in its state."""


class Resumable(Protocol):
    """A data order that can be put down and taken up."""

    def state(self) -> dict[str, int]:
        """The place in the order."""

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from that place."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One supervised stage: `batch()` gives the next step's batch, `streams` are what it draws from; a language loss
    is `packable`."""

    stage: str
    engine: Engine
    learning: Learning
    steps: int
    batch: Callable[[], Batch]
    loss: Loss
    streams: Mapping[str, Resumable]
    packable: bool = False


def learn(session: Session, lesson: Lesson) -> Stats:
    """Run the lesson from where it was left; the statistics of its last tenth. Collective: world.

    Exits with 75 after saving when a signal asked for it.
    """
    start = take_up(session, lesson.stage, lesson.engine, lesson.streams)
    late = Stats()
    session.now.stage(lesson.stage, lesson.steps, start)
    with Progress(session.first, lesson.steps, lesson.stage, done=start) as progress:
        for step in range(start, lesson.steps):
            pulse.at(lesson.stage, step)
            stats = _step(session, lesson, step)
            if step >= lesson.steps * 9 // 10:
                late += stats
            session.now.step(step + 1)
            progress.advance(", ".join(f"{name} {stats[name]:.4g}" for name in stats.sums if name.startswith("loss.")))
            if session.stopping():
                session.leave(lesson.stage, step + 1, put_down(lesson.streams), {ROLE: lesson.engine})
            if session.config.checkpoint.every and (step + 1) % session.config.checkpoint.every == 0:
                engines = {ROLE: lesson.engine}
                session.save(lesson.stage, step + 1, put_down(lesson.streams), engines, metrics=stats.means())
    session.settle()
    session.now.end()
    return late


def rate(learning: Learning, step: int, steps: int) -> float:
    """The schedule's share of the peak rate after `step` updates, or iterations of PPO."""
    return multiplier(
        step,
        steps,
        schedule=learning.schedule,
        final=learning.final,
        warmup=learning.warmup,
        warmup_start=learning.warmup_start,
    )


def put_down(streams: Mapping[str, Resumable]) -> dict[str, Any]:
    """The places in the data orders."""
    return {"streams": {name: stream.state() for name, stream in streams.items()}}


def take_up(session: Session, stage: str, engine: Engine, streams: Mapping[str, Resumable]) -> int:
    """The step to go on with, after putting back what was saved; 0 anew. Collective: world."""
    saved = session.saved(stage)
    if saved is None:
        return 0
    saved.fill({ROLE: engine})
    for name, stream in streams.items():
        stream.restore(saved.common["streams"][name])
    session.log.truncate_after(stage, saved.step - 1)
    session.log.say(f"{stage}: going on after step {saved.step}")
    return saved.step


def _step(session: Session, lesson: Lesson, step: int) -> Stats:
    began, clock = time.monotonic(), session.timer
    with clock("data"):
        batch = lesson.batch()
    with clock("learn"):
        stats = lesson.engine.accumulate(batch, lesson.loss, packable=lesson.packable)
        stats += lesson.engine.update(rate(lesson.learning, lesson.engine.updates, lesson.steps))
    tokens, seconds = int(batch.rows.lengths_B.sum()), time.monotonic() - began
    row = {**stats.means(), "tokens": tokens, "tokens_per_second": tokens / seconds, **session.slowest()}
    by_phase = {name: round(value, 4) for name, value in clock.take().items()}
    session.log.row(lesson.stage, step, {**row, "seconds_by_phase": by_phase})
    return stats
