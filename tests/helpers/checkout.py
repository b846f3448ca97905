"""A copy of the checkout to build in: a build leaves files beside the sources."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = (".*", "*.so", "kernels.json", "build", "*.egg-info", "__pycache__", "runs", "outputs")


def copied(folder: Path) -> Path:
    """`folder`, which it creates, filled with what the checkout holds but for builds and results."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*BUILT)))
