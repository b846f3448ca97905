"""A network's weights on disk, readable under any layout.

Replica 0 writes one file a (tp, pp) coordinate, each with its slices by global name, beside a manifest of all logical
tensors; a reader maps the files and takes the slices it needs. The folder appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlhf.checkpoint.manifest import FILE, HEAD, check, manifest
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.models.names import EMBEDDING
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.log import write_json

_VOCABULARY = (EMBEDDING, "output_layer.weight")
"""Tensors of a row a token, padded as the layouts of a run ask."""


def save(network: Network, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write the weights into `folder`, replacing what was there; `extra` joins the manifest. Collective: world."""
    beside = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    grid = network.grid
    if grid.inside and grid.dp_rank == 0:
        shards = {name: parameter.detach().cpu().clone() for name, parameter in network.parameters.items()}
        _write(beside / _file(grid.layout.rank(grid.tp_rank, grid.pp_rank, 0)), shards)
    dist.barrier()
    if dist.get_rank() == 0:
        tensors = {
            name: {"dim": entry.dim, "files": [_file(rank) for rank in entry.owners], "shard": list(entry.shard_shape)}
            for name, entry in network.directory.items()
        }
        facts = {"tensors": tensors, "layout": str(grid.layout), "vocabulary": network.model.vocabulary}
        write_json(beside / FILE, {**facts, **(extra or {})})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    dist.barrier()


@torch.no_grad()
def load(network: Network, folder: Path, *, fresh: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fill the network from `folder`, whatever layout wrote it; the manifest.

    Tensors named in `fresh` keep their initial weights. Raises BadInput for another vocabulary, no head where the
    network has one, and tensors that the folder lacks or holds in another shape.
    """
    found = manifest(folder)
    check(found, folder, vocabulary=network.model.vocabulary, head=network.scalar and HEAD not in fresh)
    missing = [name for name in network.directory if name not in found["tensors"] and name not in fresh]
    if missing:
        raise BadInput(f"{folder} has no tensor {', '.join(missing)}: it was written by another kind of model")
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in network.parameters.items():
        if name in fresh:
            continue
        entry = found["tensors"][name]
        shards = []
        for file in entry["files"]:
            if file not in files:
                files[file] = torch.load(folder / file, map_location="cpu", mmap=True, weights_only=True)
            shards.append(files[file][name])
        full = shards[0] if entry["dim"] is None else torch.cat(shards, entry["dim"])
        full = _with_rows(full, network.rows) if name in _VOCABULARY else full
        mine = network.directory[name]
        part = full if mine.dim is None else full.chunk(network.grid.layout.tp, mine.dim)[network.grid.tp_rank]
        if part.shape != parameter.shape:
            raise BadInput(f"{name} in {folder} is {tuple(part.shape)}, the model wants {tuple(parameter.shape)}")
        parameter.copy_(part)
    return found


def _with_rows(full: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with `rows` rows: those behind the vocabulary are padding, which another run may have had more of."""
    return full if rows == len(full) else torch.nn.functional.pad(full, (0, 0, 0, rows - len(full)))


def _file(rank: int) -> str:
    return f"rank_{rank}.pt"


def _write(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
