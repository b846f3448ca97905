"""Which Hugging Face tensors each logical tensor is: one table a family, read in both directions.

A row of a table says under which names the rows of one logical tensor lie and in which order; joining and splitting are
both derived from it. Only the tensors that `reshard.layout.specs` asks for are looked up, so that a table may name
more (biases, an untied head) than a model has.

Conv1D of GPT-2 is [in, out]: such a row is `transposed`. All shapes below are [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Order(Enum):
    """How the rows of a logical tensor lie in theirs.

    PLAIN: as ours. GATED: theirs are gate, then up, as ours. QKV: theirs are all queries, all keys, all values; ours
    the queries of a group, its key, its value, group after group.
    """

    PLAIN = auto()
    GATED = auto()
    QKV = auto()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a family's table; `{}` in a name stands for the number of the layer.

    `theirs` is one tensor with all sections of the order one after another, or one a section.
    """

    ours: str
    theirs: tuple[str, ...]
    order: Order = Order.PLAIN
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Fused:
    """One logical tensor of a model and the tensors that it is made of.

    Its first dimension is `groups` times a row of sections, of `sections[i]` equal units each; section i of all groups,
    one after another, is what they store.
    """

    name: str
    parts: tuple[str, ...]
    groups: int = 1
    sections: tuple[int, ...] = (1,)
    transposed: bool = False

    def part_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shape of each of their tensors, as stored, from the logical one."""
        unit = shape[0] // (self.groups * sum(self.sections))
        rows = [self.groups * count * unit for count in self.sections]
        rows = rows if len(self.parts) > 1 else [sum(rows)]
        shapes = {name: (count, *shape[1:]) for name, count in zip(self.parts, rows, strict=True)}
        return {name: found[::-1] if self.transposed else found for name, found in shapes.items()}

    def join(self, shape: Sequence[int], read: Callable[[str], Tensor]) -> Tensor:
        """The logical tensor of `shape` from theirs, which are read one at a time.

        Raises BadInput when one has another shape or another dtype than its neighbours.
        """
        whole: Tensor | None = None
        for place, (name, expected) in enumerate(self.part_shapes(shape).items()):
            part = read(name)
            if tuple(part.shape) != expected:
                raise BadInput(f"{name} is {list(part.shape)}, config.json asks for {list(expected)}")
            if self.sections == (1,) and not self.transposed:
                return part
            whole = torch.empty(tuple(shape), dtype=part.dtype) if whole is None else whole
            if part.dtype != whole.dtype:
                raise BadInput(f"{name} is stored in {part.dtype}, {self.parts[0]} beside it in {whole.dtype}")
            sections = self._sections(whole)
            self._exchange(sections if len(self.parts) == 1 else sections[place : place + 1], part, out=False)
            del part
        assert whole is not None
        return whole

    def split(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Their tensors from the logical one, one at a time, contiguous."""
        sections = self._sections(whole)
        for place, (name, shape) in enumerate(self.part_shapes(whole.shape).items()):
            here = sections if len(self.parts) == 1 else sections[place : place + 1]
            if len(here) == 1 and not self.transposed:
                yield name, here[0].reshape(shape)
                continue
            part = torch.empty(shape, dtype=whole.dtype)
            self._exchange(here, part, out=True)
            yield name, part
            del part

    def _exchange(self, sections: Sequence[Tensor], part: Tensor, *, out: bool) -> None:
        """Copies `sections` out to one of their tensors, or in from it."""
        part = part.T if self.transposed else part
        start = 0
        for section in sections:
            rows = section.shape[0] * section.shape[1] * section.shape[2]
            theirs = part[start : start + rows].view(section.shape)
            if out:
                theirs.copy_(section)
            else:
                section.copy_(theirs)
            start += rows

    def _sections(self, whole: Tensor) -> list[Tensor]:
        """A view [groups, units, unit's rows, ...] of each section."""
        parts = sum(self.sections)
        spread = whole.view(self.groups, parts, whole.shape[0] // (self.groups * parts), *whole.shape[1:])
        return list(spread.split(self.sections, dim=1))


def fused(table: Sequence[Row], model: Model, name: str) -> Fused:
    """What the logical tensor `name` of `model` is made of.

    Raises BadInput when the table has no such tensor: the family cannot hold this model.
    """
    rows = {row.ours: row for row in table}
    match = _LAYER.search(name)
    number = match[1] if match else ""
    row = rows.get(_LAYER.sub(".layers.{}.", name))
    if row is None:
        raise BadInput(f"{name} has no place among {table[0].theirs[0]} and its neighbours: they hold another kind")
    groups, sections = _split_of(row.order, model)
    parts = tuple(part.replace("{}", number) for part in row.theirs)
    return Fused(name, parts, groups, sections, row.transposed)


def _split_of(order: Order, model: Model) -> tuple[int, tuple[int, ...]]:
    if order is Order.QKV:
        return model.groups, (model.heads // model.groups, 1, 1)
    return 1, (1, 1) if order is Order.GATED else (1,)


def linear(ours: str, theirs: Sequence[str], order: Order = Order.PLAIN, *, transposed: bool = False) -> list[Row]:
    """The rows of a projection's weight and bias; biases are never transposed."""
    return [
        Row(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), order, transposed),
        Row(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), order),
    ]


def norm(ours: str, theirs: str) -> list[Row]:
    """The rows of a norm's weight and bias."""
    return linear(ours, [theirs])


HEAD = (Row("head.weight", ("score.weight",)), Row("head.bias", ("score.bias",)))
"""The scalar head of *ForSequenceClassification, which has no bias of its own: ours is one more tensor."""

GPT2 = (
    Row("embedding.word_embeddings.weight", ("transformer.wte.weight",)),
    Row("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    *norm("decoder.layers.{}.input_layernorm", "transformer.h.{}.ln_1"),
    *linear(
        "decoder.layers.{}.self_attention.linear_qkv", ["transformer.h.{}.attn.c_attn"], Order.QKV, transposed=True
    ),
    *linear("decoder.layers.{}.self_attention.linear_proj", ["transformer.h.{}.attn.c_proj"], transposed=True),
    *norm("decoder.layers.{}.pre_mlp_layernorm", "transformer.h.{}.ln_2"),
    *linear("decoder.layers.{}.mlp.linear_fc1", ["transformer.h.{}.mlp.c_fc"], transposed=True),
    *linear("decoder.layers.{}.mlp.linear_fc2", ["transformer.h.{}.mlp.c_proj"], transposed=True),
    *norm("decoder.final_layernorm", "transformer.ln_f"),
    Row("output_layer.weight", ("lm_head.weight",)),
    *HEAD,
)

LLAMA = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    *norm("decoder.layers.{}.input_layernorm", "model.layers.{}.input_layernorm"),
    *linear(
        "decoder.layers.{}.self_attention.linear_qkv",
        [f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
        Order.QKV,
    ),
    *linear("decoder.layers.{}.self_attention.linear_proj", ["model.layers.{}.self_attn.o_proj"]),
    *norm("decoder.layers.{}.pre_mlp_layernorm", "model.layers.{}.post_attention_layernorm"),
    *linear(
        "decoder.layers.{}.mlp.linear_fc1",
        [f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up")],
        Order.GATED,
    ),
    *linear("decoder.layers.{}.mlp.linear_fc2", ["model.layers.{}.mlp.down_proj"]),
    *norm("decoder.final_layernorm", "model.norm"),
    Row("output_layer.weight", ("lm_head.weight",)),
    *HEAD,
)
"""Mistral's and Qwen2's too."""

GPT_NEOX = (
    Row("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",)),
    *norm("decoder.layers.{}.input_layernorm", "gpt_neox.layers.{}.input_layernorm"),
    # the query, key and value of a head, head after head, as ours
    *linear("decoder.layers.{}.self_attention.linear_qkv", ["gpt_neox.layers.{}.attention.query_key_value"]),
    *linear("decoder.layers.{}.self_attention.linear_proj", ["gpt_neox.layers.{}.attention.dense"]),
    *norm("decoder.layers.{}.pre_mlp_layernorm", "gpt_neox.layers.{}.post_attention_layernorm"),
    *linear("decoder.layers.{}.mlp.linear_fc1", ["gpt_neox.layers.{}.mlp.dense_h_to_4h"]),
    *linear("decoder.layers.{}.mlp.linear_fc2", ["gpt_neox.layers.{}.mlp.dense_4h_to_h"]),
    *norm("decoder.final_layernorm", "gpt_neox.final_layer_norm"),
    Row("output_layer.weight", ("embed_out.weight",)),
    *HEAD,
)
