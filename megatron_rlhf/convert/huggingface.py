"""A Hugging Face folder (config.json, safetensors or pytorch_model.bin, tokenizer) read, and written as safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import folder, tokenizer_files
from megatron_rlhf.convert.huggingface_config import Family, Settings
from megatron_rlhf.convert.huggingface_families import GPT2, LLAMA, MISTRAL
from megatron_rlhf.convert.huggingface_files import INDEX, SINGLE, Folder, read_json
from megatron_rlhf.convert.huggingface_names import Fused, fused
from megatron_rlhf.convert.huggingface_neox import GPT_NEOX
from megatron_rlhf.convert.huggingface_qwen2 import QWEN2
from megatron_rlhf.convert.logical import Card, Tensors
from megatron_rlhf.convert.precision import DTYPES, name_of, stored_precision
from megatron_rlhf.convert.safetensors_file import SafetensorsWriter
from megatron_rlhf.observe.log import CONSOLE

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, GPT_NEOX)
"""What can be read; a model is written as the first of them that can express it."""
CONFIG = "config.json"
LARGEST_SHARD = 5 << 30
"""Bytes of a safetensors file, unless one tensor is larger."""
_EMBEDDING, _BIAS = "embedding.word_embeddings.weight", "head.bias"


class HuggingFace:
    """The logical tensors of a folder; `logical.Source`."""

    def __init__(self, path: Path, role: str | None = None) -> None:
        """Reads config and headers. Raises BadInput for an architecture, a setting or a file that cannot be read."""
        settings = Settings(read_json(path / CONFIG), str(path / CONFIG))
        self.family, found = _architecture(settings)
        card = Card(self.family.model(settings), _role(settings, found, role), tokenizer_files.collect(path))
        self._files = Folder(path)
        self._shapes = card.shapes()
        self._fused = {name: fused(self.family.table, card.model, name) for name in self._shapes}
        names = self._files.names()
        self._bare = not any(name.startswith(self.family.prefix) for name in names)
        known = set(names)
        dtypes = {self._files.dtype(name) for name in map(self._stored, self._parts()) if name in known}
        precision = stored_precision(dtypes, settings.take("dtype") or settings.take("torch_dtype"))
        self.card = replace(card, model=replace(card.model, precision=precision))

    def read(self, name: str) -> Tensor:
        """One whole logical tensor; a head without bias, as transformers has it, has a bias of 0."""
        if name == _BIAS and not self._has(self._fused[name]):
            return torch.zeros(1, dtype=DTYPES[self.card.model.precision])
        return self._fused[name].join(self._shapes[name], lambda part: self._files.read(self._stored(part)))

    def leftover(self) -> list[str]:
        """Tensors of the files that nothing is read from, but for buffers that are functions of the config.

        Raises BadInput when a tied model has an output layer of its own that differs from its embedding.
        """
        used = set(map(self._stored, self._parts()))
        harmless = re.compile(self.family.harmless)
        left = [name for name in self._files.names() if name not in used]
        left = [name for name in left if not harmless.fullmatch(self._full(name))]
        if self.family.language_head in left and self.card.role == "policy":
            self._check_tied(self.family.language_head)
            left.remove(self.family.language_head)
        return left

    def missing(self) -> list[str]:
        """Logical tensors that are not all there, each with those of its parts that are not."""
        return [
            f"{name} ({', '.join(self._lacks(parts))})"
            for name, parts in self._fused.items()
            if self._lacks(parts) and name != _BIAS
        ]

    def _parts(self) -> Iterator[str]:
        return (part for parts in self._fused.values() for part in parts.parts)

    def _has(self, parts: Fused) -> bool:
        return not self._lacks(parts)

    def _lacks(self, parts: Fused) -> list[str]:
        here = set(self._files.names())
        return [self._stored(part) for part in parts.parts if self._stored(part) not in here]

    def _stored(self, part: str) -> str:
        """What a tensor of the table is called in files of the bare body."""
        return part.removeprefix(self.family.prefix) if self._bare else part

    def _full(self, name: str) -> str:
        return self.family.prefix + name if self._bare else name

    def _check_tied(self, language_head: str) -> None:
        embedding = self._stored(self._fused[_EMBEDDING].parts[0])
        if embedding not in self._files.names():
            return
        head, words = self._files.read(language_head), self._files.read(embedding)
        if head.dtype != words.dtype or head.shape != words.shape or not _same_bits(head, words):
            raise BadInput(
                f"{self._files.path}: {CONFIG} ties the output layer to the embedding, and {language_head} differs "
                f"from {embedding}; write tie_word_embeddings false if the model was trained so"
            )


open_source = HuggingFace
"""`open_source(path, role)` as every format has it."""


def write(path: Path, card: Card, tensors: Tensors, dtype: torch.dtype, *, largest_shard: int = LARGEST_SHARD) -> None:
    """A folder that transformers reads: shards of at most `largest_shard` bytes, config.json, the tokenizer.

    Raises BadInput where no family of Hugging Face can express the model.
    """
    model = replace(card.model, precision=name_of(dtype))
    family, config = _family(model)
    shapes = card.shapes()
    parts = {name: fused(family.table, model, name) for name in shapes}
    planned = {part: shape for name in shapes for part, shape in parts[name].part_shapes(shapes[name]).items()}
    shards = list(_shards(planned, dtype, largest_shard))
    with folder.whole(path) as beside:
        where = _stream(beside, shards, tensors, parts, dtype)
        if len(shards) > 1:
            size = sum((beside / file).stat().st_size for file in set(where.values()))
            _json(beside / (SINGLE + INDEX), {"metadata": {"total_size": size}, "weight_map": where})
        tokenizer_files.put(beside, card.tokenizer)
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if card.role != "policy" else {}
        head = {"architectures": [family.policy if card.role == "policy" else family.scalar]}
        ids = tokenizer_files.for_hugging_face(beside)
        _json(beside / CONFIG, head | config | {"torch_dtype": str(dtype).removeprefix("torch.")} | labels | ids)


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file and what it is planned to hold."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]


def _shards(planned: Mapping[str, tuple[int, ...]], dtype: torch.dtype, largest: int) -> Iterator[_Shard]:
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in planned.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        # the head's bias, which may be left out, never stands alone
        if filled and filled + size > largest and len(shape) + size > 1 + dtype.itemsize:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        yield _Shard(file, group)


def _stream(
    beside: Path, shards: Sequence[_Shard], tensors: Tensors, parts: Mapping[str, Fused], dtype: torch.dtype
) -> dict[str, str]:
    """Write every tensor as it comes; the file of each."""
    where: dict[str, str] = {}
    waiting = iter(shards)
    writer: SafetensorsWriter | None = None
    try:
        shard = _Shard("", {})
        for name, whole in tensors:
            if name == _BIAS and not whole.any():
                continue
            if name == _BIAS:
                CONSOLE.print(
                    f"the head's bias is {float(whole):g}: score.bias holds it, transformers leaves it out, "
                    "and all its scores are that much lower"
                )
            for part, tensor in parts[name].split(whole):
                if part not in shard.shapes:
                    _close(writer)
                    shard = next(waiting)
                    writer = SafetensorsWriter(beside / shard.file, shard.shapes.items(), dtype)
                assert writer is not None
                writer.add(part, tensor)
                where[part] = shard.file
                del tensor
            del whole
        _close(writer)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    return where


def _close(writer: SafetensorsWriter | None) -> None:
    if writer is not None:
        writer.close()


def _family(model: Model) -> tuple[Family, dict[str, Any]]:
    reasons = []
    for family in FAMILIES:
        try:
            config = family.config(model)
            for name in Card(model).shapes():
                fused(family.table, model, name)
        except BadInput as error:
            reasons.append(str(error))
        else:
            return family, config
    raise BadInput(f"no family of Hugging Face that is known here holds this model: {'; '.join(reasons)}")


def _architecture(settings: Settings) -> tuple[Family, str]:
    """The family of a config, and the class of its head."""
    classes = {name: family for family in FAMILIES for name in (family.policy, family.scalar)}
    found = settings.take("architectures", [])
    if not isinstance(found, list) or len(found) != 1 or found[0] not in classes:
        said = ", ".join(map(str, found)) if isinstance(found, list) and found else "none"
        raise BadInput(f"{settings.where}: architectures: {said[:120]} is not one of {', '.join(classes)}")
    family = classes[found[0]]
    kind = settings.take("model_type", family.kind)
    if kind != family.kind:
        raise BadInput(f"{settings.where}: model_type={kind} does not go with {found[0]}; write {family.kind}")
    return family, found[0]


def _role(settings: Settings, found: str, asked: str | None) -> str:
    language = any(found == family.policy for family in FAMILIES)
    if language and asked not in (None, "policy"):
        raise BadInput(
            f"{settings.where}: {found} is a language model without a scalar head, which the role {asked} ends in; "
            "write --fresh-head SEED to begin one on it"
        )
    if language:
        return "policy"
    if asked == "policy":
        raise BadInput(f"{settings.where}: {found} ends in a scalar head and has no output layer; write --role reward")
    labels = settings.take("id2label")
    count = len(labels) if isinstance(labels, dict) else settings.take("num_labels", 2)
    if count != 1:
        raise BadInput(f"{settings.where}: num_labels={count}; a reward or value head has 1")
    return asked or "reward"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
