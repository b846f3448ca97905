"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_rlhf.checkpoint.digest import sync_folder
from megatron_rlhf.config.rules import BadInput


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, which takes that name when the block ends without error, else is removed.

    Raises BadInput where something is there already.
    """
    refuse_taken(path)
    beside = path.with_name(f"{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for file in beside.iterdir():
            _sync(file)
        sync_folder(beside)
        os.replace(beside, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_taken(path: Path) -> None:
    """Raises BadInput where `path` is anything but an empty folder or nothing."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise BadInput(f"{path} is there already; name another folder, or move it away first")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
