"""Which logical tensors a network has and where a layout puts them, from its settings alone. Pure, no torch.

A logical tensor is the whole of what tensor-parallel ranks hold in shards and replicas hold in copies. Names, shapes
and splits are those of Megatron-Core's GPTModel with its local layers, under the names of `models/names.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model


class Place(Enum):
    """Where in the pipeline a tensor lives: the first chunk, its layer's chunk, or the last chunk."""

    EMBEDDING = auto()
    LAYER = auto()
    NORM = auto()
    HEAD = auto()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One logical tensor.

    Tensor parallelism splits dimension `dim`, None where it is replicated. That dimension consists of `blocks` equal
    parts that are split each for itself, so that shard i is [gate_i; up_i] of SwiGLU's [gate; up]; a shard holds a
    whole number of `unit` rows of a block (the rows of one key-value group in the fused QKV).
    """

    name: str
    shape: tuple[int, ...]
    precision: str
    place: Place
    layer: int = -1
    """The layer it belongs to, -1 outside the layers."""
    dim: int | None = None
    blocks: int = 1
    unit: int = 1
    copied: bool = False
    """Whether the last chunk holds a copy where it is not the first (the tied output layer)."""


def specs(model: Model, rows: int, *, scalar: bool = False) -> tuple[TensorSpec, ...]:
    """Every logical tensor of `model` once, in the order of the pipeline.

    `rows` is the padded vocabulary; `scalar` puts the head of a reward or value model in place of the output layer.
    """
    width, precision = model.hidden, model.precision
    vocabulary = (rows, width)
    tied = model.tied and not scalar

    def at(place: Place, name: str, shape: tuple[int, ...], dim: int | None = None, copied: bool = False) -> TensorSpec:
        return TensorSpec(name, shape, precision, place, dim=dim, copied=copied)

    found = [at(Place.EMBEDDING, "embedding.word_embeddings.weight", vocabulary, 0, tied)]
    if not model.rotary:
        found.append(at(Place.EMBEDDING, "embedding.position_embeddings.weight", (model.context, width)))
    for layer in range(model.layers):
        found.extend(_layer(model, layer))
    found.extend(at(Place.NORM, f"decoder.final_layernorm.{part}", (width,)) for part in _norm_parts(model))
    if scalar:
        found += [at(Place.HEAD, "head.weight", (1, width)), at(Place.HEAD, "head.bias", (1,))]
    elif not tied:
        found.append(at(Place.HEAD, "output_layer.weight", vocabulary, 0))
    return tuple(found)


def stage(tensors: Iterable[TensorSpec], layout: Layout, pp_rank: int, chunk: int = 0) -> tuple[TensorSpec, ...]:
    """The tensors of virtual chunk `chunk` of pipeline stage `pp_rank`, in the order of Megatron's parameters.

    The last chunk ends in its copy of a tied output layer. Raises BadInput as `layers` does.
    """
    tensors = tuple(tensors)
    first, last = (pp_rank, chunk) == (0, 0), (pp_rank, chunk) == (layout.pp - 1, layout.vp - 1)
    held = layers(1 + max(tensor.layer for tensor in tensors), layout, pp_rank, chunk)

    def here(tensor: TensorSpec) -> bool:
        if tensor.place is Place.LAYER:
            return tensor.layer in held
        return first if tensor.place is Place.EMBEDDING else last

    copies = (tensor for tensor in tensors if tensor.copied and last and not first)
    return (*(tensor for tensor in tensors if here(tensor)), *copies)


def layers(count: int, layout: Layout, pp_rank: int, chunk: int = 0) -> range:
    """The layers of virtual chunk `chunk` of stage `pp_rank`: Megatron deals them out chunk by chunk.

    Raises BadInput when `count` layers do not divide into the layout's pp x vp chunks.
    """
    chunks = layout.pp * layout.vp
    if count % chunks:
        raise BadInput(
            f"{count} layers do not divide into the {chunks} chunks of '{layout}'; "
            f"write for example layers={-(-count // chunks) * chunks}"
        )
    each = count // chunks
    start = (chunk * layout.pp + pp_rank) * each
    return range(start, start + each)


def shard_shape(tensor: TensorSpec, tp: int) -> tuple[int, ...]:
    """The shape of one of `tp` shards. Raises BadInput when `tp` cuts through a row group of the tensor."""
    if tensor.dim is None:
        return tensor.shape
    size = tensor.shape[tensor.dim]
    groups = size // (tensor.blocks * tensor.unit)
    if groups % tp:
        raise BadInput(
            f"tp{tp} does not divide the {groups} parts that {tensor.name} {tensor.shape} may be split in; "
            f"write for example tp{math.gcd(groups, tp)}"
        )
    return (*tensor.shape[: tensor.dim], size // tp, *tensor.shape[tensor.dim + 1 :])


def spans(tensor: TensorSpec, tp: int, tp_rank: int) -> tuple[tuple[int, int], ...]:
    """The [start, end) ranges of the split dimension in shard `tp_rank`, in the shard's order, one a block.

    A replicated tensor is one range of its first dimension. Raises BadInput as `shard_shape` does.
    """
    if tensor.dim is None:
        return ((0, tensor.shape[0]),)
    block = tensor.shape[tensor.dim] // tensor.blocks
    part = shard_shape(tensor, tp)[tensor.dim] // tensor.blocks
    starts = (number * block + tp_rank * part for number in range(tensor.blocks))
    return tuple((start, start + part) for start in starts)


def parameters(tensors: Iterable[TensorSpec], tp: int = 1) -> int:
    """Numbers in one rank's shards of `tensors` under `tp`; with tp 1 in the tensors themselves."""
    return sum(math.prod(shard_shape(tensor, tp)) for tensor in tensors)


def _layer(model: Model, layer: int) -> Iterator[TensorSpec]:
    """One layer's tensors; the biases of layers split by rows of output are split, those after a sum are not."""
    width, ffn = model.hidden, model.ffn_width
    groups, head = model.groups, model.head_width
    queries = model.heads // groups * head
    gates = 2 if model.gated else 1

    def at(name: str, *shape: int, dim: int | None = None, blocks: int = 1, unit: int = 1) -> TensorSpec:
        name = f"decoder.layers.{layer}.{name}"
        return TensorSpec(name, shape, model.precision, Place.LAYER, layer, dim, blocks, unit)

    def column(name: str, size: int, blocks: int = 1, unit: int = 1, bias: bool = model.biased) -> Iterator[TensorSpec]:
        yield at(f"{name}.weight", size, width, dim=0, blocks=blocks, unit=unit)
        if bias:
            yield at(f"{name}.bias", size, dim=0, blocks=blocks, unit=unit)

    def row(name: str, size: int, unit: int = 1) -> Iterator[TensorSpec]:
        yield at(f"{name}.weight", width, size, dim=1, unit=unit)
        if model.biased:
            yield at(f"{name}.bias", width)

    yield from (at(f"input_layernorm.{part}", width) for part in _norm_parts(model))
    yield from row("self_attention.linear_proj", groups * queries, unit=queries)
    unit = queries + 2 * head
    yield from column("self_attention.linear_qkv", groups * unit, unit=unit, bias=model.biased or model.qkv_bias)
    yield from (at(f"pre_mlp_layernorm.{part}", width) for part in _norm_parts(model))
    yield from column("mlp.linear_fc1", gates * ffn, blocks=gates)
    yield from row("mlp.linear_fc2", ffn)


def _norm_parts(model: Model) -> tuple[str, ...]:
    return ("weight",) if model.gated else ("weight", "bias")
