"""What the shards of two layouts have in common: the units in which a plan moves weights. Pure, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.reshard.layout import Place, TensorSpec, spans, stage
from megatron_rlhf.reshard.message import Piece
from megatron_rlhf.reshard.topology import Ints

ANY = -1
"""In place of a tp rank: every one has it."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

Common = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The elements that shard `source` of the tensors held by source stages `held` and shard `target` of target stages
    `needed` both have, in the order of a message; a shard is a tp rank, or `ANY`."""

    held: tuple[int, ...]
    needed: tuple[int, ...]
    source: int
    target: int
    pieces: tuple[Piece, ...]
    rows: Ints
    """Bytes of one row of each piece."""
    ends: Ints
    """Byte at which each piece ends."""

    @property
    def size(self) -> int:
        """Bytes of the whole share."""
        return int(self.ends[-1])

    def snapped(self, offsets: Ints) -> Ints:
        """The nearest row boundaries to byte `offsets`."""
        place = np.minimum(np.searchsorted(self.ends, offsets, side="right"), len(self.ends) - 1)
        start = self.ends[place] - self.rows[place] * self._lengths[place]
        return start + (2 * (offsets - start) + self.rows[place]) // (2 * self.rows[place]) * self.rows[place]

    def cut(self, begin: int, end: int) -> Iterator[Piece]:
        """The pieces of the bytes [begin, end), which are row boundaries."""
        for piece, row, stop in zip(self.pieces, self.rows.tolist(), self.ends.tolist(), strict=True):
            start = stop - row * (piece.end - piece.start)
            low, high = max(begin, start), min(end, stop)
            if low < high:
                yield Piece(piece.name, piece.start + (low - start) // row, piece.start + (high - start) // row)

    @property
    def _lengths(self) -> Ints:
        return np.array([piece.end - piece.start for piece in self.pieces], dtype=np.int64)


def shares(
    source_tensors: Sequence[TensorSpec], source: Layout, target_tensors: Sequence[TensorSpec], target: Layout,
    *, fresh: Sequence[str] = (), merged: bool = False,
) -> tuple[Share, ...]:  # fmt: skip
    """Every element that both sides have, in one share; what `fresh` names is left out.

    `merged`, for layouts of one tp, puts the replicated tensors of a stage into the share of each of its shards, so
    that a stage moves as one. Raises BadInput when a target tensor has no source, or one of another form.
    """
    checked(source_tensors, target_tensors, fresh)
    wanted = {tensor.name: tensor for tensor in target_tensors if tensor.name not in fresh}
    held, needed = stages(source_tensors, source), stages(target_tensors, target)
    common = _intersector(source.tp, target.tp)
    found: dict[tuple[tuple[int, ...], tuple[int, ...], int, int], list[tuple[Piece, int]]] = {}
    for tensor in reversed(source_tensors):
        if tensor.name not in wanted:
            continue
        row = row_bytes(tensor)
        for mine, theirs, start, end in common(tensor, wanted[tensor.name]):
            piece = Piece(tensor.name, start, end)
            shards = [(k, k) for k in range(source.tp)] if merged and mine == ANY else [(mine, theirs)]
            for shard in shards:
                found.setdefault((held[tensor.name], needed[tensor.name], *shard), []).append((piece, row))
    return tuple(_share(*key, found[key]) for key in sorted(found))


def row_bytes(tensor: TensorSpec) -> int:
    """Bytes of one index along the dimension in which pieces are counted."""
    along = tensor.shape[tensor.dim or 0]
    return math.prod(tensor.shape) // along * BYTES[tensor.precision]


def stages(tensors: Sequence[TensorSpec], layout: Layout) -> dict[str, tuple[int, ...]]:
    """The pipeline ranks that hold each tensor, by name."""
    found: dict[str, set[int]] = {}
    for pp_rank in range(layout.pp):
        for chunk in range(layout.vp):
            for tensor in stage(tensors, layout, pp_rank, chunk):
                found.setdefault(tensor.name, set()).add(pp_rank)
    return {name: tuple(sorted(ranks)) for name, ranks in found.items()}


def intersection(source: TensorSpec, tp: int, target: TensorSpec, target_tp: int) -> Common:
    """(source shard, target shard, start, end) of every range that two shards of the tensor have in common."""
    if source.dim is None:
        return ((ANY, ANY, 0, source.shape[0]),)
    ours = [spans(source, tp, rank) for rank in range(tp)]
    theirs = [spans(target, target_tp, rank) for rank in range(target_tp)]
    found = []
    for mine in range(tp):
        for other in range(target_tp):
            for (start, end), (low, high) in zip(ours[mine], theirs[other], strict=True):
                if max(start, low) < min(end, high):
                    found.append((mine, other, max(start, low), min(end, high)))
    return tuple(found)


def checked(source: Sequence[TensorSpec], target: Sequence[TensorSpec], fresh: Sequence[str] = ()) -> None:
    """Raises BadInput naming the target tensors that have no source, or one of another shape, split or precision.

    The rows of vocabulary tensors may differ: those that both have are moved, the others stay as they are.
    """
    known = {tensor.name: tensor for tensor in source}
    missing = [tensor.name for tensor in target if tensor.name not in known and tensor.name not in fresh]
    if missing:
        raise BadInput(
            f"no weights for {', '.join(missing)}: the source has no tensor of that name; "
            f"leave it out of the target, or list it as fresh"
        )
    for tensor in target:
        if tensor.name not in fresh and _form(tensor) != _form(known[tensor.name]):
            ours = known[tensor.name]
            raise BadInput(
                f"{tensor.name} is {ours.shape} {ours.precision} in the source and {tensor.shape} {tensor.precision} "
                f"in the target; both must be of one model, but for the padding of the vocabulary"
            )


def _form(tensor: TensorSpec) -> tuple[object, ...]:
    """What must be equal on both sides."""
    vocabulary = tensor.dim == 0 and tensor.place in (Place.EMBEDDING, Place.HEAD)
    return (tensor.shape[1:] if vocabulary else tensor.shape, tensor.precision, tensor.dim, tensor.blocks)


def _intersector(tp: int, target_tp: int) -> Callable[[TensorSpec, TensorSpec], Common]:
    """`intersection` for two tp sizes; tensors of one form are computed once."""
    known: dict[tuple[object, ...], Common] = {}

    def common(source: TensorSpec, target: TensorSpec) -> Common:
        key = (source.shape, target.shape, source.dim, source.blocks, source.unit)
        if key not in known:
            known[key] = intersection(source, tp, target, target_tp)
        return known[key]

    return common


def _share(
    held: tuple[int, ...], needed: tuple[int, ...], source: int, target: int, found: list[tuple[Piece, int]]
) -> Share:
    rows = np.array([row for _, row in found], dtype=np.int64)
    lengths = np.array([piece.end - piece.start for piece, _ in found], dtype=np.int64)
    return Share(held, needed, source, target, tuple(piece for piece, _ in found), rows, np.cumsum(rows * lengths))
