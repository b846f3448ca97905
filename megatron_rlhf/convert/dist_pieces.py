"""A tensor of a distributed checkpoint from its pieces."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import torch_file
from megatron_rlhf.convert.dist_metadata import Piece, Stored


def read(folder: Path, key: str, stored: Stored, layer: int | None = None) -> Tensor:
    """The tensor, or one layer of a stacked one (whose first dimension counts layers), in the dtype it is stored in.

    Raises BadInput where pieces overlap, leave a hole, or are not what the metadata says.
    """
    shape, pieces = stored.shape, stored.pieces
    if layer is not None:
        shape = shape[1:]
        pieces = tuple(piece for piece in pieces if piece.offset[0] <= layer < piece.offset[0] + piece.shape[0])
    lead = len(stored.shape) - len(shape)
    whole_is_one = len(pieces) == 1 and pieces[0].shape[lead:] == shape
    if whole_is_one:
        return _part(folder, stored, pieces[0], layer)
    _check(folder, key, shape, pieces, lead)
    whole = torch.empty(shape, dtype=stored.dtype)
    for piece in pieces:
        whole[_spot(piece, lead)] = _part(folder, stored, piece, layer)
    return whole


def _part(folder: Path, stored: Stored, piece: Piece, layer: int | None) -> Tensor:
    found = torch_file.tensor(folder / piece.file, piece.start, piece.length, stored.dtype, piece.shape)
    return found if layer is None else found[layer - piece.offset[0]]


def _spot(piece: Piece, lead: int) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(piece.offset[lead:], piece.shape[lead:], strict=True))


def _check(folder: Path, key: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], lead: int) -> None:
    filled = sum(math.prod(piece.shape[lead:]) for piece in pieces)
    spots = [_spot(piece, lead) for piece in pieces]
    if filled != math.prod(shape) or any(_meet(one, other) for one, other in combinations(spots, 2)):
        raise BadInput(f"{folder}: the pieces of {key[:120]} overlap or leave a hole; copy the checkpoint again")


def _meet(one: tuple[slice, ...], other: tuple[slice, ...]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))
