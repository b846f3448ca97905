"""A conversion: every tensor of the source consumed, every tensor of the target filled, one at a time.

At most twice the largest tensor is in memory: the one that is read, and what it is changed into.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import folder
from megatron_rlhf.convert.logical import Card, Source, Tensors, Write
from megatron_rlhf.convert.precision import DTYPES, READ, changed, name_of
from megatron_rlhf.observe.progress import Progress

_NAMED = 8
"""Tensors that an error names."""
_HEAD = ("head.weight", "head.bias")
_OUTPUT = "output_layer.weight"


def convert(
    source: Source,
    write: Write,
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: Mapping[str, bytes] | None = None,
    quiet: bool = False,
) -> Card:
    """Write `source` at `path` and return the card of what was written; the path appears whole or not at all.

    Without `dtype` weights keep the one that all of them are stored in; `tokenizer` takes the place of the source's.
    Raises BadInput when a tensor is missing, left over, of another shape or, without `dtype`, stored in another one
    than the rest.
    """
    folder.refuse_taken(path)
    check(source)
    target = dtype or DTYPES[source.card.model.precision]
    card = replace(source.card, model=replace(source.card.model, precision=name_of(target)))
    card = card if tokenizer is None else replace(card, tokenizer=tokenizer)
    shapes = card.shapes()
    with Progress(not quiet, len(shapes), "tensors") as progress:
        write(path, card, _tensors(source, shapes, target, progress, asked=dtype is not None), target)
    return card


def check(source: Source) -> None:
    """Raises BadInput naming the tensors that the source lacks, and those that belong to nothing."""
    if missing := source.missing():
        raise BadInput(f"{_named(missing)} missing; the files are not of this model, or not all of them are here")
    if left := source.leftover():
        raise BadInput(f"{_named(left)} left over: nothing here corresponds to what the files hold there")


@dataclass(frozen=True, slots=True)
class Headed:
    """A language model's source as a scalar one's: its body, and a head that is new; `logical.Source`.

    The head is what a network of that seed starts with (models/transformer.py); an output layer of its own is dropped.
    """

    policy: Source
    card: Card
    seed: int

    def read(self, name: str) -> Tensor:
        """A tensor of the body, or of the new head."""
        if name not in _HEAD:
            return self.policy.read(name)
        dtype = DTYPES[self.card.model.precision]
        if name == "head.bias":
            return torch.zeros(1, dtype=dtype)
        width = self.card.model.hidden
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
        return torch.normal(0.0, (width + 1) ** -0.5, (1, width), generator=generator).to(dtype)

    def leftover(self) -> list[str]:
        """What the language model's source has left over."""
        return self.policy.leftover()

    def missing(self) -> list[str]:
        """What the language model's source lacks of the body."""
        return [name for name in self.policy.missing() if name.partition(" ")[0] != _OUTPUT]


def headed(policy: Source, role: str, seed: int) -> Headed:
    """`policy` with a fresh scalar head for the reward or value role. Raises BadInput where it has one already."""
    if policy.card.role != "policy":
        raise BadInput("the source has a scalar head already; leave --fresh-head out")
    if role == "policy":
        raise BadInput("--fresh-head begins a scalar head; write --role reward or --role value with it")
    return Headed(policy, replace(policy.card, role=role), seed)


def _tensors(
    source: Source, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, progress: Progress, *, asked: bool
) -> Tensors:
    stored = DTYPES[source.card.model.precision]
    for name, shape in shapes.items():
        # no name is bound to the tensor here: it would stay in memory while the next one is read
        yield name, _changed(source, name, shape, dtype, stored, asked)
        progress.advance(name)


def _changed(
    source: Source, name: str, shape: tuple[int, ...], dtype: torch.dtype, stored: torch.dtype, asked: bool
) -> Tensor:
    tensor = source.read(name)
    if tuple(tensor.shape) != shape:
        raise BadInput(f"{name} is {list(tensor.shape)}, the model wants {list(shape)}")
    if not asked and tensor.dtype != stored and tensor.dtype in READ.values():
        said = str(tensor.dtype).removeprefix("torch.")
        raise BadInput(
            f"{name} is stored in {said}, the model's precision is {name_of(stored)}; write --dtype with the one to "
            "write all tensors in"
        )
    return changed(name, tensor, dtype)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more} {'is' if len(names) == 1 else 'are'}"
