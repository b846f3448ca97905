"""What every recipe runs in: the world, the run's folder, its log, its clock and its stop signal."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from megatron_rlhf.checkpoint import resume
from megatron_rlhf.checkpoint.resume import Saved
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.load import digest
from megatron_rlhf.config.rules import check
from megatron_rlhf.config.schema import Checkpoint, Cluster, Config, Model, Reshard
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models import transformer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.log import Log
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.parallel import collectives, cpu, grid
from megatron_rlhf.recipes import places
from megatron_rlhf.train.engine import Engine

STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Remembers that a signal asked this rank to stop; every rank learns of it between two steps."""

    def __init__(self) -> None:
        """Install the handlers; they only take note."""
        self.asked = False
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def requested(self) -> bool:
        """Whether any rank was asked. Collective: world."""
        return collectives.any_rank(self.asked)


@dataclass(frozen=True, slots=True)
class Session:
    """One run's surroundings on this rank."""

    config: Config
    out: Path
    log: Log
    timer: Timer
    stop: Stop

    @property
    def first(self) -> bool:
        """Whether this rank speaks for the run."""
        return collectives.rank() == 0

    @property
    def data(self) -> Path:
        """The folder of the data room."""
        return places.data(self.config)

    def weights(self, stage: str) -> Path:
        """The folder of a stage's weights."""
        return places.weights(self.config, stage)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data room; BadInput unless it has the policy's vocabulary."""
        found = Tokenizer.load(self.data, self.config.data.end_token)
        found.check_vocabulary(self.config.model.vocabulary)
        return found

    def done(self, stage: str) -> bool:
        """Whether a stage's weights are there and a run may go on from them; says so."""
        there = self.config.checkpoint.resume == "auto" and (self.weights(stage) / "manifest.json").exists()
        if there:
            self.log.say(f"{stage}: done before, see {self.weights(stage)}; checkpoint.resume=never trains anew")
        return there

    def layout(self, words: str) -> Layout:
        """The layout that `words` name in this world."""
        return Layout.parse(words, collectives.world_size())

    def network(self, model: Model, layout: Layout | str, *, scalar: bool = False, dropout: float = 0.0) -> Network:
        """A network of `model` under `layout`, or the words of one, with its initial weights. Collective: world."""
        return transformer.build(
            model,
            grid.build(self.layout(layout) if isinstance(layout, str) else layout),
            rows=self.rows(model),
            seed=self.config.seed,
            scalar=scalar,
            dropout=dropout,
            recompute=self.config.compute.recompute,
            engine=self.config.compute.transformer_engine,
        )

    def rows(self, model: Model) -> int:
        """Rows of the vocabulary of `model`, padded for every layout of the run."""
        return transformer.padded(model.vocabulary, _multiple(self.config))

    def save(
        self, stage: str, step: int, common: dict[str, Any], engines: Mapping[str, Engine], phase: str = ""
    ) -> None:
        """Write the state after `step` steps of a stage, or inside the next one where `phase` says so.

        `common` is equal on all ranks. Collective: world.
        """
        folder, layout = self.out / stage / "state", str(self.config.layout)
        resume.save(folder, step, common, engines, phase, layout=layout, digest=_digest(self.config))

    def saved(self, stage: str) -> Saved | None:
        """The newest state of a stage, None where it starts anew. Collective: world."""
        if self.config.checkpoint.resume != "auto":
            return None
        return resume.load(self.out / stage / "state", layout=str(self.config.layout), digest=_digest(self.config))

    def leave(
        self, stage: str, step: int, common: dict[str, Any], engines: Mapping[str, Engine], phase: str = ""
    ) -> NoReturn:
        """Save and exit with the code that asks to be submitted again. Collective: world."""
        self.save(stage, step, common, engines, phase)
        inside = f", in the next one after {phase}" if phase else ""
        self.log.say(f"{stage}: stopped by a signal after step {step}{inside}, saved; run the same command to go on")
        self.log.close()
        raise SystemExit(STOPPED)


def start(config: Config) -> Session:
    """Join the world, check the config against it and open the run's folder. Collective: world."""
    cpu.install()
    stop_at = Path(config.out)
    grid.connect()
    check(config, collectives.world_size())
    if collectives.rank() == 0:
        stop_at.mkdir(parents=True, exist_ok=True)
    collectives.wait_for_all()
    return Session(config, stop_at, Log(stop_at, collectives.rank() == 0), Timer(), Stop())


def _multiple(config: Config) -> int:
    """What every layout's tp divides, and 128 where tensor cores like it."""
    world = collectives.world_size()
    degrees = [Layout.parse(words, world).tp for words in astuple(config.layout)]
    return math.lcm(*degrees, 128 if torch.cuda.is_available() else 1)


def _digest(config: Config) -> str:
    """The settings that change what a run computes."""
    return digest(replace(config, out="", checkpoint=Checkpoint(), cluster=Cluster(), reshard=Reshard()))
