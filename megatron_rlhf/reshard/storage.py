"""Where the shards of a network lie in this rank's memory, and which contiguous ranges the pieces of a message are.

Megatron keeps the weights of a role that learns in one flat buffer a dtype, parameters in reverse order from multiples
of 64 elements (mcore 0.16.1 distributed/param_and_grad_buffer.py:620). A generate network gets the same, so that a
stage is one range on both sides where their tp agrees, and travels without being packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhf.models.names import EMBEDDING, Split
from megatron_rlhf.models.stage import PRECISIONS
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.reshard.layout import TensorSpec, shard_shape, spans, specs, stage
from megatron_rlhf.reshard.message import Piece

_START = 64
"""Elements that starts of parameters are multiples of."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A range of a message: the tensors it belongs to and, in its order, where its elements lie on this rank."""

    names: tuple[str, ...]
    parts: tuple[Tensor, ...]
    """Of one dtype, of one or two dimensions; neighbours in memory are one part."""

    @property
    def bytes(self) -> int:
        """Its length."""
        return sum(part.nbytes for part in self.parts)

    @property
    def whole(self) -> Tensor | None:
        """All of it as one flat tensor, where it lies in one piece."""
        return self.parts[0].view(-1) if len(self.parts) == 1 and self.parts[0].is_contiguous() else None


class Storage:
    """The live shards of a network on this rank, found by pieces of logical tensors."""

    def __init__(self, network: Network) -> None:
        """Look at the shards where they are now. Raises RuntimeError as `check` does."""
        check(network)
        self.network = network
        self.specs = tensors(network)
        self.shards = {name: parameter.data for name, parameter in network.parameters.items()}

    def spans(self, name: str) -> tuple[tuple[int, int], ...]:
        """The ranges of a tensor that this rank holds, in the order of its shard."""
        grid = self.network.grid
        return spans(self.specs[name], grid.layout.tp, grid.tp_rank)

    def view(self, piece: Piece) -> Tensor:
        """The elements of a piece, in place. Raises RuntimeError where they are not on this rank."""
        offset = 0
        for start, end in self.spans(piece.name) if piece.name in self.shards else ():
            if start <= piece.start and piece.end <= end:
                dim = self.specs[piece.name].dim or 0
                return self.shards[piece.name].narrow(dim, offset + piece.start - start, piece.end - piece.start)
            offset += end - start
        raise RuntimeError(f"the plan asks for [{piece.start}, {piece.end}) of {piece.name}, which is not on this rank")

    def buckets(self, pieces: Iterable[Piece], size: int) -> Iterator[Bucket]:
        """The message cut into ranges of at most `size` bytes; both sides of it cut at the same elements.

        A bucket ends, too, where a side may have a gap: around the word embedding, which Megatron keeps apart where it
        is tied, where layers do not follow each other, and where the dtype changes.
        """
        names: list[str] = []
        parts: list[Tensor] = []
        room, before = size, None
        for piece in pieces:
            spec, view = self.specs[piece.name], self.view(piece)
            if before is not None and parts and _apart(before, spec):
                yield Bucket(tuple(names), tuple(_joined(parts)))
                names, parts, room = [], [], size
            before, taken = spec, 0
            while taken < view.numel():
                end = min(view.numel(), taken + room // view.element_size())
                parts += _range(view, taken, end)
                names += [piece.name] if piece.name not in names[-1:] else []
                room -= (end - taken) * view.element_size()
                taken = end
                if room < view.element_size():
                    yield Bucket(tuple(names), tuple(_joined(parts)))
                    names, parts, room = [], [], size
        if parts:
            yield Bucket(tuple(names), tuple(_joined(parts)))

    def verify(self) -> None:
        """Returns where every shard is where it was. Raises RuntimeError naming one that is not."""
        for name, parameter in self.network.parameters.items():
            if parameter.data_ptr() != self.shards[name].data_ptr():
                raise RuntimeError(f"{name} lies elsewhere than when the move was planned: build a new Mover")


def tensors(network: Network) -> dict[str, TensorSpec]:
    """The logical tensors of a network by name, in the order of its pipeline."""
    return {spec.name: spec for spec in specs(network.model, network.rows, scalar=network.scalar)}


def check(network: Network) -> None:
    """Returns where the live modules are what the tensor specs say: names, shapes, how tp splits them, dtypes.

    Raises RuntimeError naming what differs.
    """
    expected, grid = tensors(network), network.grid
    _same("the model's tensors", set(network.directory), set(expected))
    for name, entry in network.directory.items():
        spec = expected[name]
        live = entry.split, entry.shard_shape, entry.dtype
        said = Split(spec.dim, spec.blocks), shard_shape(spec, grid.layout.tp), PRECISIONS[spec.precision]
        if live != said:
            raise RuntimeError(f"{name} is {_words(*live)} in the model, its spec says {_words(*said)}")
    chunks = range(grid.layout.vp) if grid.inside else ()
    here = {spec.name for chunk in chunks for spec in stage(expected.values(), grid.layout, grid.pp_rank, chunk)}
    _same("this rank's tensors", set(network.parameters), here)
    for name, parameter in network.parameters.items():
        entry = network.directory[name]
        if (tuple(parameter.shape), parameter.dtype) != (entry.shard_shape, entry.dtype):
            raise RuntimeError(f"{name} is {tuple(parameter.shape)} {parameter.dtype} on this rank, not {entry}")


def flatten(network: Network, lent: Mapping[str, Tensor]) -> dict[torch.dtype, Tensor]:
    """One flat buffer a dtype that now holds the network's weights, values and all, in Megatron's order.

    Shards named in `lent` take that tensor's memory instead. Raises RuntimeError for a role that learns, whose weights
    are in a buffer of its optimizer.
    """
    sizes: dict[torch.dtype, int] = {}
    starts: dict[str, int] = {}
    for name, parameter in reversed(network.parameters.items()):
        if hasattr(parameter, "main_grad"):
            raise RuntimeError(f"{name} is a weight that learns: what it is copied into must not be trained")
        if name not in lent:
            starts[name] = -(-sizes.get(parameter.dtype, 0) // _START) * _START
            sizes[parameter.dtype] = starts[name] + parameter.numel()
    device = next((parameter.device for parameter in network.parameters.values()), None)
    for name, tensor in lent.items():
        network.parameters[name].data = tensor
    for name in starts:
        # in host memory meanwhile, so that a GPU never has to hold them twice
        network.parameters[name].data = network.parameters[name].data.cpu()
    flat = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
    for name, start in starts.items():
        parameter = network.parameters[name]
        shard = flat[parameter.dtype][start : start + parameter.numel()].view(parameter.shape)
        parameter.data = shard.copy_(parameter.data)
    return flat


def _apart(before: TensorSpec, after: TensorSpec) -> bool:
    jump = before.layer >= 0 and after.layer >= 0 and abs(before.layer - after.layer) > 1
    around = before.name != after.name and EMBEDDING in (before.name, after.name)
    return jump or around or before.precision != after.precision


def _range(view: Tensor, start: int, end: int) -> Iterator[Tensor]:
    """Elements [start, end) of the view's rows laid end to end, as at most three rectangles of it."""
    if view.is_contiguous():
        yield view.view(-1)[start:end]
        return
    width = view.shape[1]
    row, column = divmod(start, width)
    last, rest = divmod(end, width)
    if column and row == last:
        yield view[row, column:rest]
        return
    if column:
        yield view[row, column:]
        row += 1
    if row < last:
        yield view[row:last]
    if rest:
        yield view[last, :rest]


def _joined(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The parts, with neighbours in memory as one."""
    run: Tensor | None = None
    for part in parts:
        if run is not None and _follows(run, part):
            run = run.as_strided((run.numel() + part.numel(),), (1,), run.storage_offset())
            continue
        if run is not None:
            yield run
        run = part
    if run is not None:
        yield run


def _follows(run: Tensor, part: Tensor) -> bool:
    return (
        run.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        and run.dtype == part.dtype
        and run.is_contiguous()
        and part.is_contiguous()
        and run.storage_offset() + run.numel() == part.storage_offset()
    )


def _same(what: str, live: set[str], said: set[str]) -> None:
    if live != said:
        raise RuntimeError(f"{what} and the specs differ in {', '.join(sorted(live ^ said))}")


def _words(split: Split, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    cut = "replicated" if split.dim is None else f"split along {split.dim} in {split.blocks} blocks"
    return f"{shape} {dtype} {cut}"
