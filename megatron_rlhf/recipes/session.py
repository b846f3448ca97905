"""What every recipe runs in: the world, the run's folder, its log, its clock and its stop signal."""

from __future__ import annotations

import math
import secrets
import signal
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from megatron_rlhf.checkpoint import lock, weights
from megatron_rlhf.checkpoint.differences import Terms
from megatron_rlhf.checkpoint.resume import Keeper, Saved, SaveFailed
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.load import flat
from megatron_rlhf.config.rules import BadInput, allowed, check
from megatron_rlhf.config.schema import Config, Model
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models import transformer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe import boards, pulse, stragglers, watchdog
from megatron_rlhf.observe.log import Log
from megatron_rlhf.observe.now import Now
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.parallel import collectives, cpu, deterministic, grid, waiting
from megatron_rlhf.recipes import places
from megatron_rlhf.train.engine import Engine

STOPPED = 75
_NOT_SAVED = 1
_FREE = ("out", "layout.", "checkpoint.", "cluster.", "reshard.", "observe.", "slurm.", "watchdog.")
"""Settings that may differ when a run goes on."""
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

    def over(self) -> None:
        """Signals have no effect from here on: what they asked for is done, and Python takes its handlers away before
        the process has ended."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

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
    keepers: dict[str, Keeper] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    """What a state is of beside the settings: `plan`, the phase switch's, and `weights.STAGE`, those a run reads."""
    now: Now = field(default_factory=lambda: Now(None))

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

    def fill(self, network: Network, folder: Path, *, fresh: tuple[str, ...] = ()) -> dict[str, Any]:
        """Fill a network with the weights in `folder`, checked as the settings ask; their manifest.

        Collective: world.
        """
        return weights.load(network, folder, fresh=fresh, digests=self.config.checkpoint.verify == "digest")

    def rows(self, model: Model) -> int:
        """Rows of the vocabulary of `model`, padded for every layout of the run."""
        return transformer.padded(model.vocabulary, _multiple(self.config))

    def save(
        self,
        stage: str,
        step: int,
        common: Mapping[str, Any],
        engines: Mapping[str, Engine],
        phase: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write the state after `step` steps of a stage, or inside the next one where `phase` says so, while the run
        goes on; one that cannot be written is said and the last one stands.

        `common` is equal on all ranks, and so are `metrics`, which `checkpoint.best` chooses by. Collective: world.
        """
        self._keeper(stage).save(step, common, engines, phase, metrics)

    def saved(self, stage: str) -> Saved | None:
        """The newest whole state of a stage, None where it starts anew. Collective: world."""
        return self._keeper(stage).load() if self.config.checkpoint.resume == "auto" else None

    def stopping(self) -> bool:
        """Whether any rank was asked to stop; between two steps, where background saves that are on disk begin to
        count. Collective: world."""
        pulse.beat()
        for keeper in self.keepers.values():
            keeper.settle()
        return self.stop.requested()

    def slowest(self) -> dict[str, int | float | str]:
        """Which rank was slow since the last call, under the names of log.jsonl; nothing of a world of one.

        Collective: world.
        """
        names, seconds = stragglers.aligned(self.timer.take_own())
        if collectives.world_size() == 1 or not names:
            return {}
        mine = torch.tensor(seconds, dtype=torch.float64, device=collectives.device())
        found = stragglers.slowest(names, collectives.gather(mine).tolist())
        return found.row() if found else {}

    def settle(self) -> None:
        """Wait for background saves; before the roles of a stage are freed. Collective: world."""
        for keeper in self.keepers.values():
            keeper.settle(wait=True)

    def leave(
        self, stage: str, step: int, common: Mapping[str, Any], engines: Mapping[str, Engine], phase: str = ""
    ) -> NoReturn:
        """Save and exit with the code that asks to be submitted again, or with 1 where that failed.

        Collective: world.
        """
        inside = f", in the next one after {phase}" if phase else ""
        try:
            self._keeper(stage).save(step, common, engines, phase, wait=True)
        except SaveFailed as error:
            self.log.say(f"{stage}: stopped by a signal after step {step}{inside}, and not saved: {error}")
            code = _NOT_SAVED
        else:
            self.log.say(
                f"{stage}: stopped by a signal after step {step}{inside}, saved; run the same command to go on"
            )
            code = STOPPED
        self.log.close()
        self.stop.over()
        raise SystemExit(code)

    def _keeper(self, stage: str) -> Keeper:
        if stage not in self.keepers:
            folder, settings = self.out / stage / "state", self.config.checkpoint
            self.keepers[stage] = Keeper(folder, settings, self._terms(), lambda text: self.log.say(f"{stage}: {text}"))
        return self.keepers[stage]

    def _terms(self) -> Terms:
        settings = {key: value for key, value in flat(self.config).items() if not key.startswith(_FREE)}
        pinned = {key: value for key, value in self.pinned.items() if key != "plan"}
        return Terms(
            {**settings, **pinned},
            asdict(self.config.layout),
            collectives.world_size(),
            allowed(self.config.checkpoint.allow),
            self.pinned.get("plan", ""),
        )


def start(config: Config, *, writes: bool = True) -> Session:
    """Join the world, check the config against it and open the run's folder, which one job at a time `writes`.

    Collective: world.
    """
    cpu.install()
    waiting.install()
    if config.compute.deterministic:
        deterministic.install()
    out = Path(config.out)
    grid.connect(config.watchdog.start)
    check(config, collectives.world_size())
    first = collectives.rank() == 0
    log, stop = Log(out, first, partial(boards.opened, config.observe)), Stop()
    if writes:
        _lock(out, log)
        _watch(out, config.watchdog.seconds)
    now = Now(out if first and writes else None, {"world": collectives.world_size()})

    def entered(phase: str) -> None:
        pulse.enter(phase)
        now.phase(phase)

    return Session(config, out, log, Timer(waiting.seconds, entered), stop, now=now)


def _lock(out: Path, log: Log) -> None:
    """Rank 0 holds the run's folder until it ends. Collective: world."""
    refusal = ""
    if collectives.rank() == 0:
        try:
            lock.take(out, log.say)
        except BadInput as error:
            refusal = str(error)
    if refusal := collectives.gather_objects(refusal)[0]:
        raise BadInput(refusal)


def _watch(out: Path, seconds: float) -> None:
    """Each rank's watchdog, under a word that this launch alone has. Collective: world."""
    run = collectives.gather_objects(secrets.token_hex(4))[0]
    watchdog.start(out, collectives.rank(), collectives.world_size(), run, seconds)


def _multiple(config: Config) -> int:
    """What every layout's tp divides, and 128 where tensor cores like it."""
    world = collectives.world_size()
    degrees = [Layout.parse(words, world).tp for words in astuple(config.layout)]
    return math.lcm(*degrees, 128 if torch.cuda.is_available() else 1)
