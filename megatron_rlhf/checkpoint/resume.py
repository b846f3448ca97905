"""The state of a run between two steps: one file a rank, as it lies, and a marker that names the newest whole one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import write_json

NEWEST = "newest.json"


class Stateful(Protocol):
    """A role whose state is put down and taken up."""

    def state(self) -> dict[str, Any]:
        """What it needs to go on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A state on disk: the steps done, the phase inside the next one ("" between two), and what is equal on all
    ranks."""

    step: int
    phase: str
    common: dict[str, Any]
    _roles: dict[str, Any]

    def fill(self, engines: Mapping[str, Stateful]) -> None:
        """Put the roles back where they were. Collective: world."""
        for name, engine in engines.items():
            engine.restore(self._roles[name])


def save(
    folder: Path,
    step: int,
    common: dict[str, Any],
    engines: Mapping[str, Stateful],
    phase: str = "",
    *,
    layout: str,
    digest: str,
) -> None:
    """Write `common`, which is equal on all ranks, and the roles' state; the marker moves when every rank has written.

    Collective: world.
    """
    state = {"common": common, "roles": {name: engine.state() for name, engine in engines.items()}}
    target = folder / ".".join(filter(None, (f"step_{step}", phase)))
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    path = target / f"rank_{dist.get_rank()}.pt"
    with path.with_suffix(".partial").open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(path.with_suffix(".partial"), path)
    dist.barrier()
    if dist.get_rank() == 0:
        facts = {"step": step, "phase": phase, "world": dist.get_world_size(), "layout": layout, "config": digest}
        write_json(folder / NEWEST, facts)
        for old in folder.glob("step_*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load(folder: Path, *, layout: str, digest: str) -> Saved | None:
    """The newest state, None where nothing was saved.

    Raises BadInput when it was written under another layout, world or config.
    """
    marker = folder / NEWEST
    if not marker.exists():
        return None
    newest = json.loads(marker.read_text())
    for what, saved, here in (
        ("layouts", newest["layout"], layout),
        ("ranks", newest["world"], dist.get_world_size()),
        ("settings", newest["config"], digest),
    ):
        if saved != here:
            raise BadInput(
                f"{folder} was saved with {what} {saved}, this run has {here}: "
                "run it as it was started, or give another `out`, or checkpoint.resume=never"
            )
    name = ".".join(filter(None, (f"step_{newest['step']}", newest["phase"])))
    path = folder / name / f"rank_{dist.get_rank()}.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return Saved(newest["step"], newest["phase"], state["common"], state["roles"])
