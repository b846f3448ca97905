"""The states of one stage on disk: a folder each, which appears whole, by a rename, or not at all. No torch.

`step_40` is the state after 40 steps, `step_40.score` one inside the next step; `step_40.partial` was not finished and
`step_40.removed` is on its way out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint import digest, form, manifest
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Checkpoint

PARTIAL, REMOVED = ".partial", ".removed"
_NEEDED = {"step": int, "phase": str, "serial": int, "files": dict, "roles": dict, "settings": dict, "layout": dict}


@dataclass(frozen=True, slots=True)
class State:
    """One folder: its name, what its manifest says, and why it cannot be used ("" where nothing is known against
    it)."""

    name: str
    facts: Mapping[str, Any]
    fault: str = ""


def name_of(step: int, phase: str) -> str:
    """The folder's name of a state."""
    return f"step_{step}.{phase}" if phase else f"step_{step}"


def listed(folder: Path) -> list[State]:
    """Every finished state of a stage, the newest first; those whose manifest cannot be read come before all."""
    found = [_state(path) for path in sorted(folder.glob("step_*")) if not path.name.endswith((PARTIAL, REMOVED))]
    return sorted(found, key=lambda state: float("inf") if state.fault else state.facts["serial"], reverse=True)


def unfinished(folder: Path) -> list[str]:
    """Names of the states whose writing was cut short."""
    return sorted(path.name for path in folder.glob(f"step_*{PARTIAL}"))


def begin(folder: Path, name: str) -> Path:
    """The empty folder in which a state is written; what was left unfinished goes. Raises OSError."""
    sweep(folder)
    beside = folder / f"{name}{PARTIAL}"
    beside.mkdir(parents=True)
    return beside


def commit(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """The files written since `begin` are the state `name`, on disk with a manifest of `facts`. Raises OSError."""
    beside = folder / f"{name}{PARTIAL}"
    manifest.write(beside, facts)
    digest.sync_folder(beside)
    remove(folder, [name])
    os.rename(beside, folder / name)
    digest.sync_folder(folder)


def abandon(folder: Path, name: str) -> None:
    """What was written since `begin` is gone."""
    shutil.rmtree(folder / f"{name}{PARTIAL}", ignore_errors=True)


def remove(folder: Path, names: Sequence[str]) -> None:
    """Take these states away; a kill in the middle leaves none that looks damaged."""
    for name in names:
        if (folder / name).is_dir():
            gone = folder / f"{name}{REMOVED}"
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(folder / name, gone)
            shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    for end in (PARTIAL, REMOVED):
        for path in folder.glob(f"step_*{end}"):
            shutil.rmtree(path, ignore_errors=True)


def superseded(states: Sequence[State], settings: Checkpoint) -> list[str]:
    """Names of the states, newest first, that retention lets go: all but the last `keep`, those of every
    `keep_every`-th step and the best; a damaged one always."""
    good = [state for state in states if not state.fault]
    kept = {state.name for state in good[: settings.keep]}
    if settings.keep_every:
        kept |= {s.name for s in good if not s.facts["phase"] and s.facts["step"] % settings.keep_every == 0}
    kept |= {state.name for state in _best(good, settings.best)}
    return [state.name for state in states if state.name not in kept]


def _best(states: Sequence[State], wanted: str) -> list[State]:
    if not wanted:
        return []
    way, name = wanted.split()
    measured = [state for state in states if isinstance(_metrics(state).get(name), (int, float))]
    choose = max if way == "max" else min
    return [choose(measured, key=lambda state: _metrics(state)[name])] if measured else []


def _metrics(state: State) -> Mapping[str, Any]:
    found = state.facts.get("metrics")
    return found if isinstance(found, dict) else {}


def _state(path: Path) -> State:
    try:
        facts = manifest.read(path)
    except BadInput as error:
        return State(path.name, {}, str(error).replace(f"{path}{os.sep}", ""))
    if wrong := [name for name, kind in _NEEDED.items() if type(facts.get(name)) is not kind]:
        return State(path.name, facts, f"{manifest.FILE} has no {', '.join(wrong)}")
    return State(path.name, facts, form.digests(facts["files"]) or form.roles(facts["roles"], facts["files"]))
