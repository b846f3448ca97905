"""Whether a manifest has the form that is read of it, whoever wrote it; no torch.

Each function gives what is wrong in a few words, "" where nothing is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 1 << 48
"""Numbers of a tensor, or bytes of a file."""


def digests(table: object) -> str:
    """Of a table of files: names of this folder, lengths and digests."""
    if not isinstance(table, dict):
        return "its files are no table"
    for name, facts in table.items():
        known = isinstance(facts, dict) and _number(facts.get("bytes"))
        if not known or not isinstance(facts.get("sha256"), str) or not _SHA256.fullmatch(facts["sha256"]):
            return f"of the file {name[:80]!r} it does not say bytes and sha256"
        if not _plain(name):
            return f"it names {name[:80]!r}, which is no file of its folder"
    return ""


def tensors(table: object) -> str:
    """Of the tensors of a folder of weights: how the shards in files of the folder make each."""
    if not isinstance(table, dict):
        return "its tensors are no table"
    for name, entry in table.items():
        files = entry.get("files") if isinstance(entry, dict) else None
        if not isinstance(files, list) or not files or not all(isinstance(f, str) and _plain(f) for f in files):
            return f"of the tensor {name[:80]!r} it does not say which files of its folder hold it"
        if not _split(entry, "shard"):
            return f"of the tensor {name[:80]!r} it does not say dim, blocks and shard"
    return ""


def roles(table: object, files: Collection[str]) -> str:
    """Of the roles of a state: which range of each tensor is in which of `files`."""
    if not isinstance(table, dict) or not all(isinstance(index, dict) for index in table.values()):
        return "its roles are no table"
    for index in table.values():
        for name, entry in index.items():
            if not isinstance(entry, dict) or not _split(entry, "shape") or not _number(entry.get("tp"), least=1):
                return f"of the tensor {name[:80]!r} it does not say dim, blocks, tp and shape"
            pieces, size = entry.get("pieces"), math.prod(entry["shape"])
            if not isinstance(pieces, list) or not pieces or not all(_piece(piece, size, files) for piece in pieces):
                return f"of the tensor {name[:80]!r} it does not say which of its files hold which range"
            shards = 1 if entry["dim"] is None else entry["tp"]
            if shards > len(pieces) or not all(_tiled(pieces, shard, size) for shard in range(shards)):
                return f"the ranges of the tensor {name[:80]!r} do not make all of it"
    return ""


def _piece(piece: Any, size: int, files: Collection[str]) -> bool:
    if not isinstance(piece, list) or len(piece) != 4 or not all(_number(number) for number in piece[:3]):
        return False
    return piece[1] <= piece[2] <= size and isinstance(piece[3], str) and piece[3] in files


def _tiled(pieces: list[Any], shard: int, size: int) -> bool:
    """Whether the ranges of one shard lie one behind the other from 0 to its size."""
    reached = 0
    for start, stop in sorted((start, stop) for place, start, stop, _ in pieces if place == shard):
        if start != reached:
            return False
        reached = stop
    return reached == size


def _split(entry: dict[str, Any], key: str) -> bool:
    """Whether an entry says how a tensor is split, and into what shape."""
    dim, shape = entry.get("dim"), entry.get(key)
    if not isinstance(shape, list) or not all(_number(size) for size in shape) or math.prod(shape) > _LARGEST:
        return False
    # weights of before gated layers do not say the blocks
    known = entry.get("blocks", 1 if key == "shard" else 0) in ((None, 1, 2) if key == "shard" else (1, 2))
    return known and "dim" in entry and (dim is None or (_number(dim) and dim < len(shape)))


def _plain(name: str) -> bool:
    return bool(name) and not set(name) & set("/\\\0") and name not in (".", "..")


def _number(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _LARGEST
