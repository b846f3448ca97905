"""Where a run's recipes leave things for one another; no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_rlhf.config.schema import Config


def data(config: Config) -> Path:
    """The folder of the data room."""
    return Path(config.data.directory or Path(config.out) / "data")


def weights(config: Config, stage: str) -> Path:
    """The folder of a stage's weights."""
    if stage == "pretrain" and config.checkpoint.pretrained:
        return Path(config.checkpoint.pretrained)
    return Path(config.out) / stage / "weights"
