"""One rank's part of a state in host memory: a copy, so that training goes on while it is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rlhf.checkpoint import digest, pieces
from megatron_rlhf.checkpoint.pieces import Piece, Stored

COMMON = "common.pt"


class Role(Protocol):
    """A role whose state is put down and taken up."""

    def counts(self) -> dict[str, int]:
        """What it has counted, equal on all ranks."""

    def scaling(self) -> dict[str, Any] | None:
        """Its loss scale, None on a rank that has no part in it."""

    def pieces(self) -> list[Piece]:
        """This rank's part of its optimizer's state, the live tensors."""

    def restore(self, stored: Stored) -> None:
        """Go on from what was saved."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the files of this rank will hold, and where its pieces will be."""

    files: Mapping[str, Any]
    index: Mapping[str, Any]

    def write(self, folder: Path) -> digest.Digests:
        """Write the files and give their digests; they are on disk. Raises OSError."""
        found = {
            file: digest.write(folder / file, lambda out, content=content: torch.save(content, out))  # type: ignore[misc]
            for file, content in self.files.items()
        }
        digest.sync_folder(folder)
        return found


def take(rank: int, common: Mapping[str, Any], roles: Mapping[str, Role]) -> Snapshot:
    """A copy of this rank's pieces, and on rank 0 of what is equal on all ranks."""
    held = {name: role.pieces() for name, role in roles.items()}
    file = f"rank_{rank}.pt"
    files: dict[str, Any] = {
        file: {
            name: {
                "scaling": copy.deepcopy(role.scaling()),
                "tensors": {piece.where.name: _copied(piece.values) for piece in held[name]},
            }
            for name, role in roles.items()
        }
    }
    if rank == 0:
        counts = {name: role.counts() for name, role in roles.items()}
        files[COMMON] = {"common": copy.deepcopy(dict(common)), "counts": counts}
    return Snapshot(files, {name: pieces.index(found, file) for name, found in held.items()})


def _copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", copy=True) for key, value in values.items()}
