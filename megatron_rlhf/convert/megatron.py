"""Megatron-Core's distributed checkpoints, read and written without a process group.

The format (`torch_dist`) is free of layouts: a folder with `.metadata`, files of pieces, `common.pt` and
`metadata.json`. Whatever tp, pp and vp wrote it, here its tensors are whole; whatever they are, they read what is
written here. Megatron-LM's folder above it, with `latest_checkpointed_iteration.txt`, is known too.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rlhf.checkpoint.digest import sync_folder
from megatron_rlhf.config.layout import Layout, LayoutError
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import (
    dist_metadata,
    dist_pieces,
    folder,
    legacy,
    megatron_args,
    megatron_card,
    megatron_names,
    tokenizer_files,
    torch_file,
)
from megatron_rlhf.convert.logical import Card, Source, Tensors
from megatron_rlhf.convert.precision import name_of, stored_precision
from megatron_rlhf.observe.log import write_json
from megatron_rlhf.reshard import layout as places

TRACKER = "latest_checkpointed_iteration.txt"
MODEL = "model.yaml"
LARGEST_FILE = 1 << 30
"""Bytes of a file of pieces, unless one piece is larger."""
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}
_OWN = "megatron_rlhf"
_STATEFUL = ("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj",
             "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
"""Modules of a layer, local or of Transformer Engine, that ask for state beside their weights when they are loaded."""
_MULTIPLE = 128


class Checkpoint:
    """The logical tensors of a distributed checkpoint; `logical.Source`."""

    def __init__(
        self,
        path: Path,
        role: str | None = None,
        *,
        model: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> None:
        """Reads the metadata and the settings. Raises BadInput where they do not fit together.

        `model` is a YAML file of the architecture, for a checkpoint that does not say it; `settings` and `tokenizer`
        are given where another file than those of the folder says them.
        """
        self._folder = path
        _check_config(path)
        self._stored = dist_metadata.tensors(path)
        keys = megatron_names.weights(self._stored)
        self._keys: dict[tuple[str, str], str] = {}
        for key in keys:
            if self._keys.setdefault(megatron_names.logical(key), key) != key:
                raise BadInput(f"{path}: {key} and {self._keys[megatron_names.logical(key)]} are the same tensor")
        embedding = self._keys.get((megatron_names.EMBEDDING, ""))
        if embedding is None or not self._stored[embedding].shape:
            raise BadInput(f"{path} has no {megatron_names.EMBEDDING}: it is no checkpoint of a GPT model")
        found, said = _settings(path)
        self.card = megatron_card.of(
            path,
            found if settings is None else settings,
            rows=self._stored[embedding].shape[0],
            precision=stored_precision({self._stored[key].dtype for key in keys}),
            scalar=(megatron_names.HEAD, "") in self._keys,
            role=role,
            said=said,
            model=model,
            tokenizer=tokenizer,
        )
        self._shapes = self.card.shapes()
        self._parts = {name: parts for name in self._shapes if (parts := self._found(name))}
        for name, parts in self._parts.items():
            self._check_shape(name, parts)

    def read(self, name: str) -> Tensor:
        """One whole tensor, without the rows that pad its vocabulary."""
        parts = [dist_pieces.read(self._folder, key, self._stored[key], layer) for key, layer in self._parts[name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[: self.card.model.vocabulary] if name in megatron_names.VOCABULARY else whole

    def leftover(self) -> list[str]:
        """Keys of tensors that the model does not have; those of the optimizer are none of a model's."""
        used = {key for parts in self._parts.values() for key, _ in parts}
        return sorted(set(self._keys.values()) - used)

    def missing(self) -> list[str]:
        """Tensors of the model that the checkpoint does not have."""
        return [name for name in self._shapes if name not in self._parts]

    def _found(self, name: str) -> list[tuple[str, int | None]]:
        """Where the tensor lies: keys, one or the two halves of a gated projection, and the layer in a stacked one."""
        general, layer = megatron_names.stacked(name)
        unstacked = megatron_names.logical(general)[0]
        for ours, number in ((name, None), (unstacked, layer)):
            for halves in (("",), ("w", "v")):
                if all((ours, half) in self._keys for half in halves):
                    return [(self._keys[ours, half], number) for half in halves]
        return []

    def _check_shape(self, name: str, parts: list[tuple[str, int | None]]) -> None:
        shapes = []
        for key, layer in parts:
            shape = self._stored[key].shape
            if layer is not None and shape[:1] != (self.card.model.layers,):
                raise BadInput(f"{self._folder}: {key} is {list(shape)}, the model has {self.card.model.layers} layers")
            shapes.append(shape if layer is None else shape[1:])
        wanted = self._shapes[name]
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        padded = name in megatron_names.VOCABULARY and whole[:1] >= wanted[:1] and whole[1:] == wanted[1:]
        if whole != wanted and not padded:
            raise BadInput(f"{self._folder}: {name} is {list(whole)}, the model wants {list(wanted)}")


def open_source(path: Path, role: str | None = None, *, model: Path | None = None) -> Source:
    """The checkpoint at `path`: distributed, or of `mp_rank` folders; in it or in the folder that tracks iterations."""
    path = resolve(path)
    if (path / dist_metadata.FILE).is_file() or (path / "metadata.json").is_file():
        return Checkpoint(path, role, model=model)
    return legacy.Checkpoint(path, role, model=model)


def resolve(path: Path) -> Path:
    """The folder of the iteration that Megatron-LM's tracker in `path` names, or `path` where there is none."""
    tracker = path / TRACKER
    if not tracker.is_file():
        if not path.is_dir():
            raise BadInput(f"{path} is no folder; name one of a Megatron checkpoint")
        return path
    word = tracker.read_bytes()[:64].decode("ascii", "replace").strip()
    if word != "release" and not re.fullmatch(r"\d{1,12}", word):
        raise BadInput(f"{tracker} holds {word!r}; it must be a number of an iteration, or release")
    inner = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not inner.is_dir():
        raise BadInput(f"{tracker} names {inner.name}, which is not there; copy it too")
    return inner


def write(path: Path, card: Card, tensors: Tensors, dtype: torch.dtype, *, layout: str = "") -> None:
    """Megatron-LM's folder with a `release` in it, the tokenizer and model.yaml beside.

    Every layout reads it; pieces are cut as the tp of `layout` cuts them, so that its ranks read no more than their
    own. Raises BadInput where the model cannot be laid out so.
    """
    laid = laid_out(card, layout)
    tp = laid.tp
    model = replace(card.model, precision=name_of(dtype))
    with folder.whole(path) as beside:
        release = beside / "release"
        release.mkdir()
        save(release, card, tensors, tp=tp)
        rows = -(-model.vocabulary // (_MULTIPLE * tp)) * _MULTIPLE * tp
        args = megatron_args.args_of(model, rows)
        args |= {"params_dtype": dtype, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": laid.pp}
        common = {
            "args": argparse.Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": 0,
            _OWN: {"role": card.role},
        }
        with _synced(release / "common.pt") as stream:
            torch.save(common, stream)
        sync_folder(release)
        (beside / TRACKER).write_text("release\n", encoding="ascii")
        (beside / MODEL).write_text(yaml.safe_dump(asdict(model), sort_keys=False), encoding="utf-8")
        tokenizer_files.put(beside, card.tokenizer)


def laid_out(card: Card, words: str) -> Layout:
    """The layout of these words. Raises BadInput where there is none such, or it does not divide the card's model."""
    degrees = [int(degree) for degree in re.findall(r"(?:tp|pp|dp)(\d{1,6})", words)]
    try:
        layout = Layout.parse(words, prod(degrees))
    except LayoutError as error:
        raise BadInput(str(error)) from error
    for spec in places.specs(card.model, card.model.vocabulary, scalar=card.role != "policy"):
        if spec.name not in megatron_names.VOCABULARY:
            places.shard_shape(spec, layout.tp)
    places.layers(card.model.layers, layout, 0)
    return layout


def save(inside: Path, card: Card, tensors: Tensors, *, tp: int = 1, prefix: str = "") -> None:
    """The tensors as files of pieces and their `.metadata` in the folder `inside`; layers are stacked, keys begin with
    `prefix`."""
    specs = places.specs(card.model, card.model.vocabulary, scalar=card.role != "policy")
    by_name = {spec.name: spec for spec in specs}
    writer = _Pieces(inside)
    try:
        for name, tensor in tensors:
            key, layer = megatron_names.stacked(name)
            for offset, part in _cut(tensor, by_name[name], tp):
                writer.add(prefix + key, tensor.shape, offset, part, layer, card.model.layers)
            del tensor
        for layer in range(card.model.layers):
            for module in _STATEFUL:
                writer.add_nothing(f"{prefix}decoder.layers.{module}._extra_state/shard_{layer}_{card.model.layers}")
        writer.add_nothing(f"{prefix}decoder.final_layernorm._extra_state/shard_0_1")
        writer.close()
        write_json(inside / "metadata.json", {**_CONFIG, **_COMMON})
    finally:
        writer.abandon()


class _Pieces:
    """The files of pieces of one checkpoint, and their metadata."""

    def __init__(self, inside: Path) -> None:
        self._inside = inside
        self._stream: IO[bytes] | None = None
        self._count = 0
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(
        self, key: str, whole: torch.Size, offset: tuple[int, ...], part: Tensor, layer: int | None, layers: int
    ) -> None:
        """Write one piece, at `offset` of its tensor, in the layer's place of the stacked one."""
        shape = tuple(whole)
        if layer is not None:
            shape, offset, part = (layers, *shape), (layer, *offset), part[None]
        # a slice would be saved with all that it is a slice of
        own = part.clone() if part.untyped_storage().nbytes() != part.nbytes else part
        self._places[MetadataIndex(key, torch.Size(offset))] = self._saved(own)
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), part.shape))

    def add_nothing(self, key: str) -> None:
        """An object without state, where a module of Megatron's expects one."""
        self._places[MetadataIndex(key)] = self._saved([None])
        self._tensors[key] = BytesStorageMetadata()

    def close(self) -> None:
        """Write the metadata, and bring all to disk."""
        self.abandon()
        found = Metadata(state_dict_metadata=dict(self._tensors), storage_data=self._places, version="1.0.0")
        with _synced(self._inside / dist_metadata.FILE) as stream:
            pickle.dump(found, stream)

    def abandon(self) -> None:
        """Close the file that is open."""
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def _saved(self, value: object) -> _StorageInfo:
        if self._stream is None or self._stream.tell() >= LARGEST_FILE:
            self._next()
        assert self._stream is not None
        start = self._stream.tell()
        torch.save(value, self._stream)
        return _StorageInfo(f"__0_{self._count - 1}.distcp", start, self._stream.tell() - start)

    def _next(self) -> None:
        self.abandon()
        self._stream = (self._inside / f"__0_{self._count}.distcp").open("wb")
        self._count += 1


def _cut(tensor: Tensor, spec: places.TensorSpec, tp: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(offset, part) of the tensor as `tp` ranks hold it, whole where they hold it all or do not divide it."""
    whole = tuple(0 for _ in tensor.shape)
    if spec.dim is None or tensor.shape[spec.dim] % (tp * spec.blocks):
        yield whole, tensor
        return
    step = tensor.shape[spec.dim] // (tp * spec.blocks)
    for start in range(0, tensor.shape[spec.dim], step):
        offset = tuple(start if dim == spec.dim else 0 for dim in range(tensor.ndim))
        yield offset, tensor.narrow(spec.dim, start, step).contiguous()


def _check_config(path: Path) -> None:
    file = path / "metadata.json"
    if not file.is_file():
        return
    text = megatron_card.text(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is no JSON; copy it again") from error
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != "torch_dist":
        raise BadInput(f"{file}: sharded_backend {str(backend)[:40]!r} is not read; save it as torch_dist")


def _settings(path: Path) -> tuple[dict[str, Any], object]:
    """Megatron-LM's words for the architecture, from common.pt or run_config.yaml, and the role that we noted."""
    common: Any = torch_file.load(path / "common.pt") if (path / "common.pt").is_file() else {}
    common = common if isinstance(common, dict) else {}
    own = common.get(_OWN)
    said = own.get("role") if isinstance(own, dict) else None
    if args := torch_file.arguments(common.get("args")):
        return args, said
    for file in (path / "run_config.yaml", path.parent / "run_config.yaml"):
        if file.is_file():
            return megatron_args.of_provider(megatron_card.section(file, "model")), said
    return {}, said


class _synced:
    """A new file that is on disk when the block ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> IO[bytes]:
        self._stream = self._path.open("wb")
        return self._stream

    def __exit__(self, *_: object) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
