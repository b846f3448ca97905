"""Optimizer state as pieces that say what they are of, so that any layout reads what any other wrote.

A piece is a range of numbers of one tensor's tensor-parallel shard, under its global name. Who needs a range under the
layout that wrote it reads just that; under another the tensor is put together, split anew and cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.models.names import EMBEDDING, Split

VOCABULARY = (EMBEDDING, "output_layer.weight")
"""Tensors of a row a token, padded as the layouts of a run ask."""
STEP = "step"
"""Adam's count, one number a tensor."""


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers [start, stop) of a tensor's shard, flattened, under tensor parallelism `tp` at `tp_rank`.

    A replicated tensor's shard is the tensor, at `tp_rank` 0.
    """

    name: str
    split: Split
    tp: int
    tp_rank: int
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows of the whole tensor."""
        return self.split.whole_shape(self.shape, self.tp)[0]


@dataclass(frozen=True, slots=True)
class Piece:
    """What is kept of a range: the fp32 `main` weight, its `average`, Adam's moments, and `step`, one number."""

    where: Range
    values: Mapping[str, Tensor]


def index(pieces: Sequence[Piece], file: str) -> dict[str, Any]:
    """What a manifest says of the pieces in a file: each tensor's split and shard shape, and the ranges there."""
    return {
        piece.where.name: {
            "dim": piece.where.split.dim,
            "blocks": piece.where.split.blocks,
            "tp": piece.where.tp,
            "shape": list(piece.where.shape),
            "pieces": [[piece.where.tp_rank, piece.where.start, piece.where.stop, file]],
        }
        for piece in pieces
    }


def merged(indexes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One index of several files'."""
    found: dict[str, Any] = {}
    for each in indexes:
        for name, entry in each.items():
            if name in found:
                found[name]["pieces"] += entry["pieces"]
            else:
                found[name] = {**entry, "pieces": list(entry["pieces"])}
    return found


def fault(folder: Path, file: str, roles: Mapping[str, Any]) -> str:
    """What a file of a state should hold by the index of its roles, and does not; "" where it holds all."""
    wanted = [
        (role, name, start, stop)
        for role, index in roles.items()
        for name, entry in index.items()
        for _, start, stop, where in entry["pieces"]
        if where == file
    ]
    try:
        held = Shelf(folder).file(file) if wanted else {}
    except (UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, OSError) as error:
        return f"{file} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0][:80]})"
    for role, name, start, stop in wanted:
        values = held.get(role, {}).get("tensors", {}).get(name)
        if not values or any(value.numel() != stop - start for key, value in values.items() if key != STEP):
            return f"{file} does not hold the numbers from {start} to {stop} of {name}"
    return ""


class Shelf:
    """The files of one state, mapped into memory when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        """Nothing is opened yet."""
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}

    def file(self, name: str) -> dict[str, Any]:
        """What `torch.save` wrote, tensors mapped."""
        if name not in self._files:
            found = torch.load(self.folder / name, map_location="cpu", mmap=True, weights_only=True)
            self._files[name] = found
        return self._files[name]


class Stored(Protocol):
    """One role in a state."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What the role had counted."""

    def scaling(self) -> dict[str, Any]:
        """The role's loss scale."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises BadInput, alike on every rank, unless these tensors were saved whole."""

    def read(self, wanted: Range) -> dict[str, Tensor]:
        """The values of a range."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """One role in the files of a state: its counts, and where its pieces are."""

    role: str
    counts: Mapping[str, int]
    shelf: Shelf
    index: Mapping[str, Any]

    def scaling(self) -> dict[str, Any]:
        """What the role's ranks all hold of its loss scale."""
        file = next(piece[3] for entry in self.index.values() for piece in entry["pieces"])
        found: dict[str, Any] = self.shelf.file(file)[self.role]["scaling"]
        return found

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises BadInput, alike on every rank, unless these tensors were saved, in these shapes."""
        if missing := [name for name in shapes if name not in self.index]:
            raise BadInput(f"{self.shelf.folder} has no {', '.join(missing)} of the {self.role}")
        for name, wanted in shapes.items():
            entry = self.index[name]
            saved = Split(entry["dim"], entry["blocks"]).whole_shape(entry["shape"], entry["tp"])
            first = 1 if name in VOCABULARY else 0
            if saved[first:] != wanted[first:]:
                raise BadInput(f"{name} in {self.shelf.folder} is {saved}, the model wants {wanted}")

    def read(self, wanted: Range) -> dict[str, Tensor]:
        """The values of a range, whatever layout wrote them. Raises BadInput where some were not saved."""
        entry = self.index[wanted.name]
        if (entry["tp"] == wanted.tp or entry["dim"] is None) and tuple(entry["shape"]) == wanted.shape:
            return self._range(wanted.name, entry, wanted.tp_rank, wanted.start, wanted.stop)
        shape = tuple(entry["shape"])
        places = range(1 if entry["dim"] is None else entry["tp"])
        shards = [self._range(wanted.name, entry, place, 0, math.prod(shape)) for place in places]
        split = Split(entry["dim"], entry["blocks"])
        found = {STEP: shards[0][STEP]} if STEP in shards[0] else {}
        for key in shards[0].keys() - {STEP}:
            whole = split.join([shard[key].view(shape) for shard in shards])
            whole = with_rows(whole, wanted.rows) if wanted.name in VOCABULARY else whole
            part = wanted.split.part(whole, wanted.tp, wanted.tp_rank)
            found[key] = part.reshape(-1)[wanted.start : wanted.stop]
        return found

    def _range(self, name: str, entry: Mapping[str, Any], tp_rank: int, start: int, stop: int) -> dict[str, Tensor]:
        """The numbers [start, stop) of a saved shard, from the pieces that have them."""
        parts: dict[str, list[Tensor]] = {}
        reached, step = start, None
        for place, first, last, file in sorted(entry["pieces"]):
            if place != tp_rank or last <= reached or first >= stop:
                continue
            if first > reached:
                break
            values = self.shelf.file(file)[self.role]["tensors"][name]
            step = values.get(STEP)
            for key in values.keys() - {STEP}:
                if values[key].numel() != last - first:
                    raise BadInput(f"{self.shelf.folder / file} holds another range of {name} than its manifest says")
                parts.setdefault(key, []).append(values[key][reached - first : stop - first])
            reached = min(last, stop)
        if reached < stop:
            raise BadInput(f"{self.shelf.folder} does not have the numbers from {reached} to {stop} of {name}")
        found = {key: part[0] if len(part) == 1 else torch.cat(part) for key, part in parts.items()}
        return found if step is None else {**found, STEP: step}


def with_rows(whole: Tensor, rows: int) -> Tensor:
    """The tensor with `rows` rows: those behind the vocabulary are padding, which another run may have had more of."""
    return whole if rows == len(whole) else torch.nn.functional.pad(whole, (0, 0, 0, rows - len(whole)))
