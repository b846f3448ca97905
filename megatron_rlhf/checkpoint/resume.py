"""The state of a run between two steps: one file a rank, as it lies, and a marker that names the newest whole one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import write_json

NEWEST = "newest.json"


def save(folder: Path, step: int, state: dict[str, Any], *, layout: str, digest: str, phase: str = "") -> None:
    """Write this rank's `state` after `step`, or inside the next after `phase`; the marker moves when every rank has
    written. Collective: world."""
    target = folder / _name(step, phase)
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
        write_json(
            folder / NEWEST,
            {"step": step, "phase": phase, "world": dist.get_world_size(), "layout": layout, "config": digest},
        )
        for old in folder.glob("step_*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load(folder: Path, *, layout: str, digest: str) -> tuple[int, dict[str, Any]] | None:
    """The newest step and this rank's state, None where nothing was saved.

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
    path = folder / _name(newest["step"], newest["phase"]) / f"rank_{dist.get_rank()}.pt"
    return newest["step"], torch.load(path, map_location="cpu", weights_only=True)


def _name(step: int, phase: str) -> str:
    return f"step_{step}.{phase}" if phase else f"step_{step}"
