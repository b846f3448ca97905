"""The tensors of a Hugging Face folder by name: safetensors or pytorch_model.bin, in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert.pickled_file import PickledFile
from megatron_rlhf.convert.safetensors_file import SafetensorsFile

SINGLE, BINARY = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
LARGEST_JSON = 1 << 26
"""Bytes of an index or a config that are read at all."""

TensorFile = SafetensorsFile | PickledFile


class Folder:
    """Every tensor of a folder and the file it is in; safetensors count before pickles."""

    def __init__(self, path: Path) -> None:
        """Reads the headers. Raises BadInput where there are no weights, or files and index do not fit together."""
        self.path = path
        names, index = _files(path)
        self._files = {name: _open(path / name) for name in names}
        self._at: dict[str, str] = {}
        for name, file in self._files.items():
            for tensor in file.tensors:
                if tensor in self._at:
                    raise BadInput(f"{path}: {tensor} is in {self._at[tensor]} and again in {name}")
                self._at[tensor] = name
        for tensor, name in index.items():
            if self._at.get(tensor) != name:
                raise BadInput(f"{path}: the index says that {tensor} is in {name}, it is in {self._at.get(tensor)}")

    def names(self) -> list[str]:
        """Every tensor."""
        return list(self._at)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._files[self._at[name]].read(name)

    def dtype(self, name: str) -> torch.dtype:
        """What it is stored in, without reading it."""
        stored = self._files[self._at[name]].tensors[name]
        return stored[0] if isinstance(stored, tuple) else stored.dtype


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput where there is none."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise BadInput(f"{path} is larger than {LARGEST_JSON >> 20} MiB, no such file is")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON ({str(error)[:120]})") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} is no JSON object")
    return found


def _files(path: Path) -> tuple[list[str], Mapping[str, str]]:
    """The files of weights, and which tensor the index, where there is one, says is in which."""
    for single in (SINGLE, BINARY):
        if (path / single).is_file():
            return [single], {}
        if (path / (single + INDEX)).is_file():
            index = read_json(path / (single + INDEX)).get("weight_map")
            return _indexed(path / (single + INDEX), index, single.rpartition(".")[2])
    raise BadInput(f"{path} holds no weights: neither {SINGLE} nor {BINARY}, nor an index of either's shards")


def _indexed(where: Path, index: object, ending: str) -> tuple[list[str], Mapping[str, str]]:
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise BadInput(f"{where} has no weight_map of tensor names to file names")
    names = sorted(set(index.values()))
    for name in names:
        # a link inside the folder may lead to a cache; a name may not lead out of it
        if name != Path(name).name or "\\" in name or not name.endswith(f".{ending}"):
            raise BadInput(f"{where} names the file {name[:120]!r}; it must be a .{ending} file of its own folder")
        if not (where.parent / name).is_file():
            raise BadInput(f"{where} names {name}, which is not there; copy it too")
    return names, index


def _open(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)
