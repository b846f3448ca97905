"""NeMo's `.nemo` archives of GPT models, read and written with the standard library and torch.

One is a tar of `model_config.yaml`, the weights (`model_weights.ckpt`, a folder a rank, or a distributed checkpoint
`model_weights/`) and the tokenizer's files, which the config names `nemo:<hash>_<file>`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from megatron_rlhf.config import plain_yaml
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import (
    archive,
    folder,
    legacy,
    megatron,
    megatron_card,
    megatron_names,
    nemo_config,
    tokenizer_files,
)
from megatron_rlhf.convert.logical import Card, Source, Tensors
from megatron_rlhf.convert.precision import name_of
from megatron_rlhf.data.tokenizer import TRAINED, Tokenizer

CONFIG, WEIGHTS = "model_config.yaml", "model_weights"
_PREFIX = "model."
_MARK = "nemo:"
_OWN = "megatron_rlhf"
# where a config names files of a tokenizer, and what the file is called among ours
_ARTIFACTS = {"model": TRAINED, "tokenizer_model": TRAINED, "vocab_file": "vocab.json", "merge_file": "merges.txt"}


class Archive:
    """The logical tensors of a `.nemo` file, unpacked into a temporary folder, or of one unpacked; `logical.Source`."""

    def __init__(self, path: Path, role: str | None = None, *, model: Path | None = None) -> None:
        """Unpacks it and reads its config. Raises BadInput where it is none, or its parts do not fit together."""
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        root = path
        if not path.is_dir():
            if not path.is_file():
                raise BadInput(f"{path} is not there; name a .nemo file")
            self._unpacked = tempfile.TemporaryDirectory(prefix="nemo-", ignore_cleanup_errors=True)
            root = Path(self._unpacked.name)
            archive.unpack(path, root)
        config = _config(path, root)
        tokenizer = _tokenizer(path, root, config)
        settings = nemo_config.args_of(config, f"{path}: {CONFIG}")
        settings.setdefault("vocab_size", _tokens(tokenizer))
        inner: Source
        kind: Any = megatron.Checkpoint if (root / WEIGHTS).is_dir() else legacy.Checkpoint
        where = root / WEIGHTS if (root / WEIGHTS).is_dir() else root
        inner = kind(where, role, model=model, settings=settings, tokenizer=tokenizer)
        self._inner = inner
        said = config.get(_OWN)
        if role is None and isinstance(said, dict) and (said.get("role"), inner.card.role) == ("value", "reward"):
            inner.card = replace(inner.card, role="value")
        self.card = inner.card

    def read(self, name: str) -> Tensor:
        """One whole tensor, without the rows that pad its vocabulary."""
        return self._inner.read(name)

    def leftover(self) -> list[str]:
        """Tensors of the archive that the model does not have."""
        return self._inner.leftover()

    def missing(self) -> list[str]:
        """Tensors of the model that the archive does not have."""
        return self._inner.missing()


def open_source(path: Path, role: str | None = None, *, model: Path | None = None) -> Source:
    """The archive at `path`, or the folder that one was unpacked into."""
    return Archive(path, role, model=model)


def write(path: Path, card: Card, tensors: Tensors, dtype: torch.dtype, *, layout: str = "") -> None:
    """A `.nemo` file of a Megatron-Core GPT: config, weights under the names of Transformer Engine's layers, tokenizer.

    The weights are one file, which NeMo reads on one GPU, and with `layout` a distributed checkpoint, which it reads
    under any. They wait on the disk beside it while they come in, so that only one of them is in memory.
    """
    laid = megatron.laid_out(card, layout)
    model = replace(card.model, precision=name_of(dtype))
    files = {name: f"{hashlib.sha256(data).hexdigest()[:32]}_{name}" for name, data in card.tokenizer.items()}
    config = nemo_config.config_of(model)
    config["tokenizer"] = _named(files)
    config |= {"tensor_model_parallel_size": laid.tp, "pipeline_model_parallel_size": laid.pp}
    config[_OWN] = {"role": card.role, "files": {name: _MARK + member for name, member in files.items()}}
    folder.refuse_taken(path)
    with _whole(path) as stream, _room(path) as room:
        packed = archive.Writer(stream)
        packed.add(CONFIG, yaml.safe_dump(config, sort_keys=True).encode())
        for name, member in files.items():
            packed.add(member, card.tokenizer[name])
        if layout:
            megatron.save(room, card, tensors, tp=laid.tp, prefix=_PREFIX)
            torch.save({}, room / "common.pt")
            for file in sorted(room.iterdir()):
                with packed.member(f"{WEIGHTS}/{file.name}") as inner, file.open("rb") as source:
                    shutil.copyfileobj(source, inner, 1 << 24)
        else:
            with (room / WEIGHTS).open("w+b") as raw, packed.member(f"{WEIGHTS}.ckpt") as inner:
                torch.save(_Waiting(raw, tensors).mapped(), inner)
        packed.close()


class _Waiting:
    """Tensors that were written to a file one after another."""

    def __init__(self, raw: IO[bytes], tensors: Tensors) -> None:
        self._raw = raw
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        for name, tensor in tensors:
            self._places[name] = raw.tell(), tensor.dtype, tensor.shape
            raw.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            raw.write(bytes(-raw.tell() % 64))
            del tensor
        raw.flush()

    def mapped(self) -> dict[str, Tensor]:
        """All of them, each a map of its bytes, by the names that NeMo's Megatron-Core models have."""
        view = mmap.mmap(self._raw.fileno(), 0, access=mmap.ACCESS_COPY)
        return {
            _PREFIX + megatron_names.numbered(name): torch.frombuffer(
                view, dtype=dtype, count=shape.numel(), offset=start
            ).view(shape)
            for name, (start, dtype, shape) in self._places.items()
        }


@contextmanager
def _room(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as place:
        yield Path(place)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its name when the block ends without error, else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with beside.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _named(files: Mapping[str, str]) -> dict[str, Any]:
    """The config's section of a tokenizer as NeMo has it."""
    named: dict[str, Any] = {"library": "huggingface", "type": None}
    named |= {"model": None, "vocab_file": None, "merge_file": None}
    if TRAINED in files:
        return named | {"library": "sentencepiece", "model": _MARK + files[TRAINED]}
    for key, ours in _ARTIFACTS.items():
        if ours in files:
            named[key] = _MARK + files[ours]
    if named["vocab_file"] and named["merge_file"]:
        return named | {"library": "megatron", "type": "GPT2BPETokenizer"}
    return named


def _config(path: Path, root: Path) -> dict[str, Any]:
    if not (root / CONFIG).is_file():
        raise BadInput(f"{path} holds no {CONFIG}: it is no .nemo archive")
    text = megatron_card.text(root / CONFIG)
    try:
        found = plain_yaml.load(text)
    except ValueError as error:
        raise BadInput(f"{path}: {CONFIG} is no plain YAML ({error}); save the archive again") from error
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise BadInput(f"{path}: {CONFIG} holds no settings; save the archive again")
    return found


def _tokenizer(path: Path, root: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files by our names, of those that the config names."""
    own, section = config.get(_OWN), config.get("tokenizer")
    named: dict[str, object] = {}
    if isinstance(section, dict):
        named = {ours: section.get(key) for key, ours in _ARTIFACTS.items() if section.get(key)}
    if isinstance(own, dict) and isinstance(own.get("files"), dict):
        named = {name: value for name, value in own["files"].items() if name in tokenizer_files.NAMES}
    found = {}
    for name, value in named.items():
        member = value.removeprefix(_MARK) if isinstance(value, str) else ""
        if not isinstance(value, str) or not value.startswith(_MARK):
            continue  # a path on the machine that trained
        if member != Path(member).name or not (root / member).is_file():
            raise BadInput(f"{path}: {CONFIG} names the file {str(value)[:120]!r}, which the archive does not hold")
        if (root / member).stat().st_size > tokenizer_files.LARGEST:
            raise BadInput(f"{path}: {member} is larger than {tokenizer_files.LARGEST >> 20} MiB, no tokenizer is")
        found[name] = (root / member).read_bytes()
    return found


def _tokens(files: Mapping[str, bytes]) -> int | None:
    """How many tokens the tokenizer has, None where there is none that can be read."""
    with tempfile.TemporaryDirectory() as place:
        tokenizer_files.put(Path(place), files)
        try:
            return Tokenizer.load(Path(place)).vocabulary
        except BadInput:
            return None
