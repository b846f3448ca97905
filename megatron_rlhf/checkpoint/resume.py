"""A run's state between two phases, saved beside the training and taken up under any layout.

Every rank writes the pieces of the optimizer state that it holds, as they lie, into a file of its own; rank 0 writes
what is equal on all ranks, and when every rank has written, the manifest. Until then the folder does not count and the
last state stands.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint import digest, pieces, snapshot, states
from megatron_rlhf.checkpoint.differences import Terms
from megatron_rlhf.checkpoint.pieces import OnDisk, Shelf
from megatron_rlhf.checkpoint.snapshot import COMMON, Role, Snapshot
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Checkpoint
from megatron_rlhf.parallel import collectives

_LEGACY = "newest.json"


class SaveFailed(RuntimeError):
    """One sentence: which state could not be written, why, and which one stands."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A state on disk: the steps done, the phase inside the next one ("" between two), and what is equal on all
    ranks."""

    step: int
    phase: str
    common: dict[str, Any]
    _roles: Mapping[str, OnDisk]

    def fill(self, engines: Mapping[str, Role]) -> None:
        """Put the roles back where they were, under whatever layouts they have now. Collective: world."""
        for name, engine in engines.items():
            if name not in self._roles:
                raise BadInput(f"step {self.step} was saved without the {name}; there are {', '.join(self._roles)}")
            engine.restore(self._roles[name])


@dataclass(slots=True)
class _Writing:
    """A state on its way to disk, and what came of this rank's part."""

    step: int
    phase: str
    metrics: Mapping[str, float]
    error: str = ""
    index: Mapping[str, Any] = field(default_factory=dict)
    digests: digest.Digests = field(default_factory=dict)
    thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return states.name_of(self.step, self.phase)

    def write(self, taken: Snapshot, folder: Path) -> None:
        """Runs in a thread and talks to no other rank."""
        try:
            self.digests = taken.write(folder)
        except Exception as error:
            self.error = _reason(error)


class Keeper:
    """The states of one stage: saves them in the background, one at a time, and finds the newest good one."""

    def __init__(self, folder: Path, settings: Checkpoint, terms: Terms, say: Callable[[str], None]) -> None:
        """`terms` are what a state is saved under and must agree with; `say` tells a person a sentence."""
        self.folder = folder
        self.settings = settings
        self.terms = terms
        self.say = say
        self.failures = 0
        """Saves that came to nothing."""
        self._writing: _Writing | None = None
        self._last = ""
        self._anew = True
        self._warned = False
        self._damaged: list[str] = []

    def save(
        self,
        step: int,
        common: Mapping[str, Any],
        engines: Mapping[str, Role],
        phase: str = "",
        metrics: Mapping[str, float] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Copy the state to host memory and write it while the caller goes on; a save under way is waited for first.

        With `wait`, or where `checkpoint.asynchronous` is off, it is on disk when this returns. Where it fails the last
        state stands; with `wait` it raises SaveFailed, else it is said and counted. Collective: world.
        """
        self.settle(wait=True)
        self._check_best(metrics)
        writing = _Writing(step, phase, dict(metrics or {}))
        if writing.name == self._last:
            return
        taken = snapshot.take(collectives.rank(), common, engines)
        writing.index = taken.index
        if collectives.rank() == 0:
            try:
                states.begin(self.folder, writing.name)
            except OSError as error:
                writing.error = _reason(error)
        if not collectives.any_rank(bool(writing.error)):
            beside = self.folder / f"{writing.name}{states.PARTIAL}"
            writing.thread = threading.Thread(target=writing.write, args=(taken, beside), name="checkpoint")
            writing.thread.start()
        self._writing = writing
        del taken
        if wait or writing.thread is None or not self.settings.asynchronous:
            self._finish(raising=wait)

    def settle(self, *, wait: bool = False) -> None:
        """Take in a background save that every rank has written; with `wait`, wait for it. Collective: world."""
        if self._writing is None:
            return
        thread = self._writing.thread
        if wait or not collectives.any_rank(thread is not None and thread.is_alive()):
            self._finish(raising=False)

    def load(self) -> Saved | None:
        """The newest state that is whole, None where there is none at all.

        Says what was passed over and what differs. Raises BadInput where every state is damaged, and where it is of
        other settings that `checkpoint.allow` does not name. Collective: world.
        """
        found, cut_short, legacy = collectives.gather_objects(self._look())[0]
        if legacy:
            raise BadInput(
                f"{self.folder} holds a state of an earlier version, which this one cannot read; "
                "give another `out`, or checkpoint.resume=never"
            )
        passed = [f"{name} was not finished" for name in cut_short]
        for state in found:
            fault = state.fault or self._verified(state)
            if not fault:
                return self._taken(state, passed)
            self._damaged.append(state.name)
            passed.append(f"{state.name} is damaged ({fault})")
        if found:
            raise BadInput(f"no state in {self.folder} is whole: {'; '.join(passed)}; write checkpoint.resume=never")
        if passed:
            self.say(f"{self.folder}: {'; '.join(passed)}; starting anew")
        return None

    def _check_best(self, metrics: Mapping[str, float] | None) -> None:
        """Say, once, that there is no such number as `checkpoint.best` names."""
        name = self.settings.best.partition(" ")[2]
        if name and metrics and name not in metrics and not self._warned:
            self._warned = True
            self.say(f"checkpoint.best names {name}, which is not measured; there are {', '.join(metrics)}")

    def _look(self) -> tuple[list[states.State], list[str], bool]:
        """What rank 0 finds in the folder; nothing on the others."""
        if collectives.rank() > 0:
            return [], [], False
        found, cut_short = states.listed(self.folder), states.unfinished(self.folder)
        states.sweep(self.folder)
        return found, cut_short, (self.folder / _LEGACY).exists()

    def _verified(self, state: states.State) -> str:
        """What is wrong with a state's files, each rank having read its share of them. Collective: world."""
        mine = sorted(state.facts["files"])[collectives.rank() :: collectives.world_size()]
        files = {name: state.facts["files"][name] for name in mine}
        where = self.folder / state.name
        faults = digest.faults(where, files, digests=self.settings.verify == "digest")
        faults = faults or [wrong for name in mine if (wrong := pieces.fault(where, name, state.facts["roles"]))]
        return "; ".join(fault for each in collectives.gather_objects(faults) for fault in each)

    def _taken(self, state: states.State, passed: list[str]) -> Saved:
        where = self.folder / state.name
        sentences = self.terms.compare(state.facts, str(where))
        if passed:
            self.say(f"{self.folder}: {'; '.join(passed)}; taking {state.name}")
        for sentence in sentences:
            self.say(sentence)
        self._anew, self._last = False, state.name
        shelf = Shelf(where)
        common = shelf.file(COMMON)
        roles = {
            name: OnDisk(name, common["counts"][name], shelf, index)
            for name, index in state.facts["roles"].items()
            if name in common["counts"]
        }
        # a copy, so that nothing refers to the file while the run goes on
        return Saved(state.facts["step"], state.facts["phase"], copy.deepcopy(common["common"]), roles)

    def _finish(self, *, raising: bool) -> None:
        """Wait for this rank's files, agree with the others, and let the state count or be gone. Collective: world."""
        writing, self._writing = self._writing, None
        assert writing is not None
        if writing.thread is not None:
            writing.thread.join()
        everyone = collectives.gather_objects((writing.error, writing.digests, writing.index))
        errors = [f"rank {rank}: {error}" for rank, (error, _, _) in enumerate(everyone) if error]
        outcome = "; ".join(errors)
        if collectives.rank() == 0:
            outcome = outcome or self._committed(writing, [(digests, index) for _, digests, index in everyone])
            if outcome:
                states.abandon(self.folder, writing.name)
        outcome = collectives.gather_objects(outcome)[0]
        if not outcome:
            self._anew, self._last, self._damaged = False, writing.name, []
            return
        self.failures += 1
        stands = f"{self._last} stands" if self._last else "none was saved before"
        sentence = f"{self.folder / writing.name} could not be written ({outcome}): {stands}"
        if raising:
            raise SaveFailed(sentence)
        self.say(f"{sentence}, the run goes on (failed saves: {self.failures})")

    def _committed(self, writing: _Writing, parts: list[tuple[digest.Digests, Mapping[str, Any]]]) -> str:
        """Let the state count and older ones go, on rank 0; why it does not, or nothing."""
        roles = sorted({role for _, index in parts for role in index})
        before = states.listed(self.folder)
        facts = {
            "step": writing.step,
            "phase": writing.phase,
            "serial": 1 + max((state.facts["serial"] for state in before if not state.fault), default=0),
            "time": round(time.time(), 3),
            "metrics": dict(writing.metrics),
            **self.terms.facts(),
            "files": {name: fact for digests, _ in parts for name, fact in digests.items()},
            "roles": {role: pieces.merged([index.get(role, {}) for _, index in parts]) for role in roles},
        }
        try:
            states.commit(self.folder, writing.name, facts)
        except OSError as error:
            return _reason(error)
        self._retain(writing.name)
        return ""

    def _retain(self, newest: str) -> None:
        """Remove what retention lets go; a run that started anew owns none of what it found."""
        found = states.listed(self.folder)
        gone = [state.name for state in found] if self._anew else states.superseded(found, self.settings)
        try:
            states.remove(self.folder, [name for name in (*gone, *self._damaged) if name != newest])
        except OSError as error:
            self.say(f"{self.folder}: older states could not be removed: {_reason(error)}")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
