"""Weights & Biases, where the extra `wandb` is installed; without it log.jsonl still holds every number.

`WANDB_MODE=offline` keeps everything in the run's folder, for `wandb sync` later.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.observe.board import numbers


def installed() -> bool:
    """Whether wandb is there."""
    return importlib.util.find_spec("wandb") is not None


class WandbBoard:
    """One run of Weights & Biases, whose files lie in the folder `wandb` of `directory`."""

    def __init__(self, directory: Path) -> None:
        """Starts the run under the folder's name; one that was stopped goes on."""
        import wandb

        # the folder's path tells runs apart, so that two folders of one name stay two runs
        self._run: Any = wandb.init(
            dir=str(directory),
            project="megatron-rlhf",
            name=directory.resolve().name,
            id=hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds the finite numbers of `values` as `phase/name`, with `phase/step` beside them."""
        self._run.log({**numbers(phase, values), f"{phase}/step": step})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
