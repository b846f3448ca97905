"""The folders of weights that the stages of a run leave, read under whatever layout wrote them, and written whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
import yaml
from torch import Tensor

from megatron_rlhf.checkpoint import digest
from megatron_rlhf.checkpoint import manifest as manifests
from megatron_rlhf.checkpoint.manifest import FILE, HEAD
from megatron_rlhf.config.load import build
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import architecture, folder, tokenizer_files
from megatron_rlhf.convert.logical import ROLES, Card, Tensors
from megatron_rlhf.convert.pickled_file import PickledFile
from megatron_rlhf.convert.precision import name_of, stored_precision

MODEL = "model.yaml"
"""The architecture as the values of a `model=` file."""
LARGEST_FILE = 1 << 28
"""Bytes of weights in a file, unless one tensor is larger; as much waits in memory to be written."""
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the manifest: how its shards, one a file, make it."""

    dim: int | None
    blocks: int
    files: tuple[str, ...]
    shard: tuple[int, ...]

    def join(self, shards: list[Tensor]) -> Tensor:
        """The whole tensor; each of its blocks was cut for itself."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        if self.blocks == 1:
            return torch.cat(shards, self.dim)
        cut = [shard.chunk(self.blocks, self.dim) for shard in shards]
        return torch.cat([parts[block] for block in range(self.blocks) for parts in cut], self.dim)


class Weights:
    """The logical tensors of a stage's folder; `logical.Source`."""

    def __init__(self, path: Path, role: str | None = None) -> None:
        """Reads the manifest and the names in the files. Raises BadInput where they do not fit together."""
        self._path = path
        found = manifests.readable(path)
        where = str(path / FILE)
        self._entries = {name: _entry(entry) for name, entry in found["tensors"].items()}
        if "model" not in found:
            raise BadInput(f"{where} does not say of what model the weights are; write them again with this version")
        model = build(Model, found["model"], "model")
        architecture.check(model, where)
        files = {file for entry in self._entries.values() for file in entry.files}
        _check_digests(path, files, found["digests"])
        self._files = {file: PickledFile(path / file) for file in sorted(files)}
        dtypes = {
            self._files[file].tensors[name][0]
            for name, entry in self._entries.items()
            for file in entry.files
            if name in self._files[file].tensors
        }
        model = dataclasses.replace(model, precision=stored_precision(dtypes, model.precision))
        self.card = Card(model, _role(found, self._entries, role, where), tokenizer_files.collect(path))
        self._shapes = self.card.shapes()

    def read(self, name: str) -> Tensor:
        """One whole tensor from its shards, without the rows that pad its vocabulary."""
        entry = self._entries[name]
        shards = [self._shard(name, file, entry) for file in entry.files]
        whole = entry.join(shards)
        return whole[: self.card.model.vocabulary] if name in _VOCABULARY else whole

    def leftover(self) -> list[str]:
        """Tensors of the manifest or of a file that the model does not have."""
        held = {name for file in self._files.values() for name in file.tensors}
        return sorted((held | set(self._entries)) - set(self._shapes))

    def missing(self) -> list[str]:
        """Tensors of the model that the manifest or one of its files does not have."""
        return [
            name
            for name in self._shapes
            if name not in self._entries
            or any(name not in self._files[file].tensors for file in self._entries[name].files)
        ]

    def _shard(self, name: str, file: str, entry: _Entry) -> Tensor:
        shard = self._files[file].read(name)
        if tuple(shard.shape) != entry.shard:
            raise BadInput(f"{self._path / file}: {name} is {list(shard.shape)}, {FILE} says {list(entry.shard)}")
        return shard


open_source = Weights
"""`open_source(path, role)` as every format has it."""


def write(path: Path, card: Card, tensors: Tensors, dtype: torch.dtype) -> None:
    """A folder of weights that every layout reads: whole tensors, the manifest, model.yaml and the tokenizer."""
    model = dataclasses.replace(card.model, precision=name_of(dtype))
    with folder.whole(path) as beside:
        digests: digest.Digests = {}
        entries = dict(_write(beside, tensors, digests))
        facts = {
            "tensors": entries,
            "layout": "tp1 pp1 dp1",
            "vocabulary": model.vocabulary,
            "model": dataclasses.asdict(model),
            "role": card.role,
            "digests": digests,
        }
        manifests.write(beside, facts)
        (beside / MODEL).write_text(yaml.safe_dump(dataclasses.asdict(model), sort_keys=False), encoding="utf-8")
        tokenizer_files.put(beside, card.tokenizer)


def _write(beside: Path, tensors: Tensors, digests: digest.Digests) -> Iterator[tuple[str, dict[str, Any]]]:
    """Save the tensors in files of at most LARGEST_FILE; the manifest's entry of each. Modifies: digests."""
    waiting: dict[str, Tensor] = {}
    size = count = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.dtype.itemsize
        if waiting and size + nbytes > LARGEST_FILE:
            digests[_file(count)] = _save(beside / _file(count), waiting)
            waiting, size, count = {}, 0, count + 1
        size += nbytes
        yield name, {"dim": None, "blocks": 1, "files": [_file(count)], "shard": list(tensor.shape)}
        # a slice would be saved with all that it is a slice of
        waiting[name] = tensor.clone() if tensor.untyped_storage().nbytes() != nbytes else tensor
        del tensor
        if size > LARGEST_FILE:
            digests[_file(count)] = _save(beside / _file(count), waiting)
            waiting, size, count = {}, 0, count + 1
    if waiting:
        digests[_file(count)] = _save(beside / _file(count), waiting)


def _file(number: int) -> str:
    return f"part_{number}.pt"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return digest.write(path, lambda file: torch.save(dict(tensors), cast(IO[bytes], file)))


def _check_digests(path: Path, files: Collection[str], digests: Mapping[str, Any]) -> None:
    """Raises BadInput where a file is not the one that was written, or nothing is said of it."""
    for file in sorted(files):
        if file not in digests:
            raise BadInput(f"{path / FILE} has no digest of {file}; write the weights again with this version")
    if found := digest.faults(path, {file: digests[file] for file in files}, digests=True):
        raise BadInput(f"{path} is damaged: {'; '.join(found[:3])}; copy it again")


def _entry(entry: Mapping[str, Any]) -> _Entry:
    """What the manifest says of a tensor; its form was looked at when it was read."""
    return _Entry(entry["dim"], entry.get("blocks") or 1, tuple(entry["files"]), tuple(entry["shard"]))


def _role(found: Mapping[str, Any], entries: Mapping[str, _Entry], asked: str | None, where: str) -> str:
    scalar = HEAD in entries
    said = found.get("role", "reward" if scalar else "policy")
    if said not in ROLES or (said != "policy") != scalar:
        raise BadInput(f"{where} says role {str(said)[:40]!r}, and its tensors are not of one")
    if asked is None or asked == said:
        return str(said)
    if scalar and asked != "policy":
        return asked
    if scalar:
        raise BadInput(f"{where}: the weights end in a scalar head and have no output layer; write --role {said}")
    raise BadInput(
        f"{where}: the weights are of a language model without a scalar head, which the role {asked} ends in; write "
        "--fresh-head SEED to begin one on it"
    )
