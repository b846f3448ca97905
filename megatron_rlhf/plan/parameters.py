"""Parameters of a network and of each pipeline stage's rank, and Megatron's flat buffers they lie in. Pure, no torch.

From the tensors that `reshard/layout.py` lists, which the live modules are checked against, so nothing is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Config, Model
from megatron_rlhf.reshard.layout import Place, TensorSpec, layers, shard_shape, specs

TENSOR_CORES = 128
"""What the rows of the vocabulary are padded to a multiple of on GPUs, besides every tp."""
_START = 64
"""Elements that a parameter's start in a flat buffer is a multiple of (mcore 0.16.1 param_and_grad_buffer.py:664)."""
_END = 128
"""The same of a bucket's end, besides dp (:655)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one rank of a pipeline stage holds, in numbers of a weight each.

    `weights` are its parameters; `buffer` their flat buffer, gaps included, in which a role that learns keeps weights
    and gradients; `shard` what the replica's distributed optimizer keeps of them where it keeps most.
    """

    weights: int
    buffer: int
    shard: int
    largest: int
    """Its largest parameter."""


def count(model: Model, *, scalar: bool = False, rows: int = 0) -> int:
    """Parameters of `model`, each once; `scalar` has a reward or value model's head.

    `rows` is the padded vocabulary, 0 leaves the padding out.
    """
    rows = rows or model.vocabulary
    pieces = _pieces(model, rows, scalar, 1)
    return sum(pieces.embedding) + model.layers * sum(pieces.layer) + sum(pieces.norm) + sum(pieces.head)


def padded(config: Config, model: Model, world: int, *, multiple: int = TENSOR_CORES) -> int:
    """Rows of the vocabulary of `model`, padded so that every layout's tp and `multiple` divide them."""
    divisor = math.lcm(multiple, *(Layout.parse(words, world).tp for words in astuple(config.layout)))
    return -(-model.vocabulary // divisor) * divisor


def per_rank(model: Model, layout: Layout, rows: int, *, scalar: bool = False) -> tuple[int, ...]:
    """Parameters on a rank of each pipeline stage, the last stage's copy of a tied embedding included.

    Raises BadInput where `layout` does not divide the model.
    """
    return tuple(stage.weights for stage in stages(model, layout, rows, scalar=scalar))


def stages(model: Model, layout: Layout, rows: int, *, scalar: bool = False) -> tuple[Stage, ...]:
    """What a rank of each pipeline stage holds. Raises BadInput where `layout` does not divide the model."""
    return _stages(model, layout.tp, layout.pp, layout.dp, layout.vp, rows, scalar)


def common(
    model: Model, tp: int, rows: int, layers_in_common: int, *, first: bool, last: bool, crossed: bool, same: bool
) -> int:
    """Parameters of a rank that two layouts of one policy both put there in the same shards.

    `first` and `last` say that both have it in their first or last stage, `crossed` that both have a tied embedding
    there; without `same` only those count that tp does not split.
    """
    found = 0
    for tensor in specs(replace(model, layers=1), rows):
        here = {
            Place.EMBEDDING: crossed if tensor.copied else first,
            Place.LAYER: layers_in_common > 0,
            Place.NORM: last,
            Place.HEAD: last,
        }[tensor.place]
        if here and (same or tensor.dim is None):
            times = layers_in_common if tensor.place is Place.LAYER else 1
            found += times * math.prod(shard_shape(tensor, tp))
    return found


@dataclass(frozen=True, slots=True)
class Pieces:
    """Sizes of one rank's parameters in Megatron's order, by where in the pipeline they live."""

    embedding: tuple[int, ...]
    layer: tuple[int, ...]
    norm: tuple[int, ...]
    head: tuple[int, ...]
    tied: bool
    """Whether the last stage has a copy of the embedding in place of a head."""


@lru_cache(maxsize=4096)
def _stages(model: Model, tp: int, pp: int, dp: int, vp: int, rows: int, scalar: bool) -> tuple[Stage, ...]:
    layout, pieces = Layout(tp, pp, dp, vp), _pieces(model, rows, scalar, tp)
    found = []
    for rank in range(pp):
        chunks = [_chunk(model, layout, pieces, rank, chunk) for chunk in range(vp)]
        buffers = [list(_buckets(sizes, apart, dp)) for sizes, apart in chunks]
        weights = sum(sum(sizes) for sizes, _ in chunks)
        buffer = sum(sum(buckets) for buckets in buffers)
        largest = max(max(sizes) for sizes, _ in chunks)
        # a shard of several replicas has gaps too, which are some of its 64ths at most
        found.append(Stage(weights, buffer, min(weights, buffer // dp), largest))
    return tuple(found)


def _chunk(model: Model, layout: Layout, pieces: Pieces, rank: int, chunk: int) -> tuple[list[int], set[int]]:
    """Sizes of a chunk's parameters, and which of them have a bucket of their own."""
    first = (rank, chunk) == (0, 0)
    last = (rank, chunk) == (layout.pp - 1, layout.vp - 1)
    sizes = list(pieces.embedding) if first else []
    sizes += pieces.layer * len(layers(model.layers, layout, rank, chunk))
    apart = {0} if pieces.tied and first and not last else set()
    if last:
        sizes += [*pieces.norm, *pieces.head]
        if pieces.tied and not first:
            apart = {len(sizes)}
            sizes.append(pieces.embedding[0])
    return sizes, apart


def _buckets(sizes: list[int], apart: set[int], dp: int) -> Iterator[int]:
    """Lengths of the buckets of a chunk's buffer: the parameters from last to first, each from a multiple of 64, a
    bucket's end at a multiple of 128 and of dp; a tied embedding has a bucket of its own."""
    end, begun = 0, False
    multiple = math.lcm(dp, _END)
    for place in reversed(range(len(sizes))):
        start = _up(end, _START)
        if place in apart and begun:
            yield _up(start, multiple)
            start = 0
        end, begun = start + sizes[place], True
        if place in apart:
            yield _up(end, multiple)
            end, begun = 0, False
    if begun:
        yield _up(end, multiple)


@lru_cache(maxsize=4096)
def _pieces(model: Model, rows: int, scalar: bool, tp: int) -> Pieces:
    """All layers are alike, so one is looked at."""
    tensors = specs(replace(model, layers=1), rows, scalar=scalar)
    by_place = {place: [tensor for tensor in tensors if tensor.place is place] for place in Place}
    sizes = {place: tuple(_sizes(group, tp)) for place, group in by_place.items()}
    tied = any(tensor.copied for tensor in tensors)
    return Pieces(sizes[Place.EMBEDDING], sizes[Place.LAYER], sizes[Place.NORM], sizes[Place.HEAD], tied)


def _sizes(tensors: Iterable[TensorSpec], tp: int) -> Iterator[int]:
    return (math.prod(shard_shape(tensor, tp)) for tensor in tensors)


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
