"""Megatron-LM's checkpoints of a file a rank, `mp_rank_TT[_PPP]/model_optim_rng.pt`, read and joined over tp and pp.

Both kinds are known: of Megatron-Core's GPTModel (`--ckpt-format torch`), and of the `language_model` of before it.
Files are mapped; nothing in them is run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import megatron_card, megatron_names, torch_file
from megatron_rlhf.convert.precision import stored_precision
from megatron_rlhf.reshard import layout as places

FILES = ("model_optim_rng.pt", "model_rng.pt", "model_weights.ckpt")
OLDEST = 3.0
"""Checkpoints before this version order the rows of query, key and value otherwise."""
_FOLDER = re.compile(r"(?:mp|tp)_rank_(\d{2})(?:_(?:pp_rank_)?(\d{3}))?")
_DEPTH = 8
# what of a file is neither weights nor of use here
_BESIDE = ("args", "optimizer", "opt_param_scheduler", "rng_state")


@dataclass(frozen=True, slots=True)
class _Shard:
    """What one rank's file says of one logical tensor: the tensor, by halves of a gated projection."""

    halves: dict[str, Tensor]

    def whole(self) -> Tensor:
        """Both halves, gate before up, where it has them."""
        if "" in self.halves:
            return self.halves[""]
        return torch.cat([self.halves["w"], self.halves["v"]])


class Checkpoint:
    """The logical tensors of `mp_rank` or `tp_rank` folders; `logical.Source`."""

    def __init__(
        self,
        path: Path,
        role: str | None = None,
        *,
        model: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> None:
        """Maps every file. Raises BadInput where one is missing, of a version before 3, or they do not fit together.

        `model` is a YAML file of the architecture, for a checkpoint without args; `settings` and `tokenizer` are given
        where another file says them.
        """
        self._path = path
        files = _files(path)
        tp, pp = 1 + max(tp for tp, _ in files), 1 + max(pp for _, pp in files)
        _check_ranks(path, files, tp, pp)
        found: dict[tuple[int, int, int], dict[str, _Shard]] = {}
        args: Mapping[str, Any] = settings or {}
        for (tp_rank, pp_rank), file in sorted(files.items()):
            content = torch_file.load(file)
            if settings is None:
                args = args or torch_file.arguments(content.get("args") if isinstance(content, dict) else None)
                _check_version(file, content)
            for chunk, tensors in enumerate(_chunks(file, content)):
                found[tp_rank, pp_rank, chunk] = _shards(file, tensors)
        vp = 1 + max(chunk for _, _, chunk in found)
        first = found[0, 0, 0]
        if megatron_names.EMBEDDING not in first:
            raise BadInput(f"{files[0, 0]} has no {megatron_names.EMBEDDING}: it is no checkpoint of a GPT model")
        dtypes = {tensor.dtype for shards in found.values() for s in shards.values() for tensor in s.halves.values()}
        self.card = megatron_card.of(
            path,
            args,
            rows=first[megatron_names.EMBEDDING].whole().shape[0] * tp,
            precision=stored_precision({dtype for dtype in dtypes if dtype.is_floating_point}),
            scalar=any(megatron_names.HEAD in shards for shards in found.values()),
            role=role,
            model=model,
            tokenizer=tokenizer,
        )
        self._tp = tp
        self._specs = {
            spec.name: spec
            for spec in places.specs(self.card.model, self.card.model.vocabulary, scalar=self.card.role != "policy")
        }
        self._shards = self._numbered(found, Layout(tp=tp, pp=pp, vp=vp))

    def read(self, name: str) -> Tensor:
        """One whole tensor, joined over tp, without the rows that pad its vocabulary."""
        spec = self._specs[name]
        shards = [shard.whole() for shard in self._shards[name]]
        if spec.dim is None:
            self._check_copies(name, shards)
        whole = _joined(shards, spec)
        vocabulary = name in megatron_names.VOCABULARY
        whole = whole[: self.card.model.vocabulary] if vocabulary else whole
        if tuple(whole.shape) != spec.shape:
            raise BadInput(f"{self._path}: {name} is {list(whole.shape)}, the model wants {list(spec.shape)}")
        return whole

    def leftover(self) -> list[str]:
        """Tensors of the files that the model does not have."""
        return sorted(name for name in self._shards if name not in self._specs)

    def missing(self) -> list[str]:
        """Tensors of the model that the files do not have, or not of every tp rank."""
        return [name for name in self._specs if len(self._shards.get(name, ())) != self._tp]

    def _numbered(
        self, found: Mapping[tuple[int, int, int], Mapping[str, _Shard]], layout: Layout
    ) -> dict[str, list[_Shard]]:
        """The shards by our names with the layers counted over the whole model, in the order of tp."""
        shards: dict[str, list[_Shard]] = {}
        for (tp_rank, pp_rank, chunk), held in sorted(found.items()):
            start = places.layers(self.card.model.layers, layout, pp_rank, chunk).start
            for name, shard in held.items():
                match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
                whole = f"decoder.layers.{int(match[1]) + start}.{match[2]}" if match else name
                if self._is_copy(whole, pp_rank, chunk, layout, tp_rank, shard, shards):
                    continue
                shards.setdefault(whole, []).append(shard)
        return shards

    def _is_copy(
        self,
        name: str,
        pp_rank: int,
        chunk: int,
        layout: Layout,
        tp_rank: int,
        shard: _Shard,
        shards: Mapping[str, list[_Shard]],
    ) -> bool:
        """Whether it is the last stage's copy of a tied embedding, which must be equal to the first stage's."""
        last = (pp_rank, chunk) == (layout.pp - 1, layout.vp - 1)
        tied = self.card.model.tied and self.card.role == "policy"
        named = name == "word_embeddings_for_head.weight" or name == megatron_names.OUTPUT
        if not (last and tied and named):
            return False
        first = shards.get(megatron_names.EMBEDDING, [])
        if tp_rank >= len(first) or not first[tp_rank].whole().equal(shard.whole()):
            raise BadInput(f"{self._path}: {name} is not the word embedding that it is tied to; give --model FILE.yaml")
        return True

    def _check_copies(self, name: str, shards: list[Tensor]) -> None:
        if any(not shard.equal(shards[0]) for shard in shards[1:]):
            raise BadInput(f"{self._path}: {name} differs between the ranks of tp, which hold copies of it")


def _joined(shards: list[Tensor], spec: places.TensorSpec) -> Tensor:
    """The whole tensor; each of its blocks was cut for itself."""
    if spec.dim is None or len(shards) == 1:
        return shards[0]
    cut = [shard.chunk(spec.blocks, spec.dim) for shard in shards]
    return torch.cat([parts[block] for block in range(spec.blocks) for parts in cut], spec.dim)


def _files(path: Path) -> dict[tuple[int, int], Path]:
    """The file of every (tp, pp) rank below `path`."""
    found: dict[tuple[int, int], Path] = {}
    for name in FILES:
        if (path / name).is_file():
            return {(0, 0): path / name}
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        match = _FOLDER.fullmatch(inner.name)
        if not match or not inner.is_dir():
            continue
        file = next((inner / name for name in FILES if (inner / name).is_file()), None)
        if file is None:
            raise BadInput(f"{inner} holds none of {', '.join(FILES)}; copy it too")
        found[int(match[1]), int(match[2] or 0)] = file
    if not found:
        raise BadInput(
            f"{path} is no Megatron checkpoint: it has neither .metadata (torch_dist) nor mp_rank_00 folders"
        )
    return found


def _check_ranks(path: Path, files: Mapping[tuple[int, int], Path], tp: int, pp: int) -> None:
    for rank in ((tp_rank, pp_rank) for tp_rank in range(tp) for pp_rank in range(pp)):
        if rank not in files:
            raise BadInput(f"{path} has {tp} tp and {pp} pp ranks, and no file of {rank}; copy it too")


def _check_version(file: Path, content: object) -> None:
    version = content.get("checkpoint_version", 0) if isinstance(content, dict) else 0
    if not isinstance(version, int | float) or version < OLDEST:
        raise BadInput(
            f"{file} has checkpoint_version {str(version)[:20]}, before {OLDEST} rows of query, key and value were in "
            "another order; load and save it with a newer Megatron-LM"
        )


def _chunks(file: Path, content: object) -> list[Mapping[str, Any]]:
    """The weights of each virtual stage of a file."""
    if not isinstance(content, dict):
        raise BadInput(f"{file} holds no dict of weights")
    if isinstance(content.get("model"), dict):
        return [content["model"]]
    numbers = sorted(int(key[5:]) for key in content if isinstance(key, str) and re.fullmatch(r"model\d{1,3}", key))
    if numbers:
        if numbers != list(range(len(numbers))) or not all(isinstance(content[f"model{n}"], dict) for n in numbers):
            raise BadInput(f"{file} has the virtual stages {numbers}; copy it again")
        return [content[f"model{number}"] for number in numbers]
    inner = content.get("state_dict", content)
    if not isinstance(inner, dict):
        raise BadInput(f"{file} holds no dict of weights")
    return [{name: value for name, value in inner.items() if name not in _BESIDE}]


def _shards(file: Path, tensors: Mapping[str, Any]) -> dict[str, _Shard]:
    """A chunk's tensors by our names, the layers counted within the chunk."""
    found: dict[str, _Shard] = {}
    flat = dict(_flat(tensors))
    keys = megatron_names.weights(flat)
    names = {key: megatron_names.logical(key) for key in keys}
    separate = Counter(name for name, half in names.values() if half)
    for key, (name, half) in names.items():
        tensor = flat[key]
        if not torch_file.dense(tensor):
            raise BadInput(f"{file}: {key[:120]} is no dense tensor with all its data in the file")
        # an up projection apart from the gate: the gate has the plain name
        half = "w" if not half and separate.get(name) == 1 else half
        halves = found.setdefault(name, _Shard({})).halves
        if half in halves:
            raise BadInput(f"{file}: {name} is there twice")
        halves[half] = tensor
    for name, shard in found.items():
        if set(shard.halves) not in ({""}, {"w", "v"}):
            raise BadInput(f"{file}: of {name} a half is missing")
    return _with_head(found)


def _with_head(found: dict[str, _Shard]) -> dict[str, _Shard]:
    """The tensors with an output layer of one row, which no vocabulary has, under the scalar head's name."""
    output = found.get(megatron_names.OUTPUT)
    if output is None or output.whole().shape[:1] != (1,):
        return found
    return {name.replace("output_layer.", "head.", 1): shard for name, shard in found.items()}


def _flat(value: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if depth > _DEPTH:
        raise BadInput(f"weights lie deeper than {_DEPTH} dicts in each other; no checkpoint's do")
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{name}.", depth + 1)
        elif isinstance(inner, Tensor):
            yield f"{prefix}{name}", inner
