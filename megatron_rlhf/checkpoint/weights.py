"""A network's weights on disk, readable under any layout.

Replica 0 writes one file a (tp, pp) coordinate, each with its slices by global name, beside a manifest of all logical
tensors and the files' digests; a reader checks the files, maps them and takes the slices it needs. The folder appears
whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.checkpoint import digest
from megatron_rlhf.checkpoint import manifest as facts
from megatron_rlhf.checkpoint.manifest import HEAD, check
from megatron_rlhf.checkpoint.pieces import VOCABULARY, with_rows
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.models.names import Split
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.pulse import beat
from megatron_rlhf.parallel import collectives


def save(network: Network, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write the weights into `folder`, replacing what was there; `extra` joins the manifest.

    Raises OSError on every rank where one could not write; what was there stays. Collective: world.
    """
    beside = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    dist.barrier()
    written, error = _write(network, beside)
    everyone = collectives.gather_objects((written, error))
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
    if dist.get_rank() == 0 and not errors:
        digests = {name: fact for each, _ in everyone for name, fact in each.items()}
        errors = _publish(beside, folder, {**_contents(network), "digests": digests, **(extra or {})})
    if errors := collectives.gather_objects(errors)[0]:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{folder} could not be written ({'; '.join(errors)}); what was there before stays")


@torch.no_grad()
def load(network: Network, folder: Path, *, fresh: tuple[str, ...] = (), digests: bool = True) -> dict[str, Any]:
    """Fill the network from `folder`, whatever layout wrote it; the manifest.

    Tensors named in `fresh` keep their initial weights; without `digests` the files' lengths alone are checked. Raises
    BadInput for files that are not as they were written, another vocabulary, no head where the network has one, and
    tensors that the folder lacks or holds in another shape. Collective: world.
    """
    found = facts.readable(folder)
    check(found, folder, vocabulary=network.model.vocabulary, head=network.scalar and HEAD not in fresh)
    missing = [name for name in network.directory if name not in found["tensors"] and name not in fresh]
    if missing:
        raise BadInput(f"{folder} has no tensor {', '.join(missing)}: it was written by another kind of model")
    _verify(folder, found["digests"], digests=digests)
    error = ""
    try:
        _fill(network, folder, found["tensors"], fresh)
    except BadInput as refused:
        error = str(refused)
    if errors := [each for each in collectives.gather_objects(error) if each]:
        raise BadInput(errors[0])
    return found


def _fill(network: Network, folder: Path, entries: Mapping[str, Any], fresh: tuple[str, ...]) -> None:
    """Put this rank's slices in place. Raises BadInput for a tensor that is not there as the manifest says."""
    files: dict[str, dict[str, Tensor]] = {}
    for name, parameter in network.parameters.items():
        beat()
        if name in fresh:
            continue
        entry = entries[name]
        try:
            for file in entry["files"]:
                if file not in files:
                    files[file] = torch.load(folder / file, map_location="cpu", mmap=True, weights_only=True)
            full = Split(entry["dim"], entry.get("blocks") or 1).join([files[file][name] for file in entry["files"]])
            full = with_rows(full, network.rows) if name in VOCABULARY else full
            part = network.directory[name].split.part(full, network.grid.layout.tp, network.grid.tp_rank)
        except (LookupError, RuntimeError, ValueError, TypeError, OSError, UnpicklingError) as error:
            raise BadInput(f"{name} in {folder} is not split over files as its {facts.FILE} says") from error
        if part.shape != parameter.shape:
            raise BadInput(f"{name} in {folder} is {tuple(part.shape)}, the model wants {tuple(parameter.shape)}")
        parameter.copy_(part)


def _verify(folder: Path, files: Mapping[str, Mapping[str, Any]], *, digests: bool) -> None:
    """Each rank reads its share of the files. Raises BadInput naming what is damaged. Collective: world."""
    mine = {name: files[name] for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]}
    faults = collectives.gather_objects(digest.faults(folder, mine, digests=digests))
    if any(faults):
        listed = "; ".join(fault for each in faults for fault in each)
        raise BadInput(f"{folder} is damaged: {listed}; write these weights again, or name another folder")


def _write(network: Network, folder: Path) -> tuple[digest.Digests, str]:
    """This rank's file in `folder`, where it has one, and why it could not be written."""
    grid = network.grid
    if not grid.inside or grid.dp_rank != 0:
        return {}, ""
    shards = {name: parameter.detach().cpu().clone() for name, parameter in network.parameters.items()}
    name = _file(grid.layout.rank(grid.tp_rank, grid.pp_rank, 0))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = {name: digest.write(folder / name, lambda out: torch.save(shards, out))}  # type: ignore[arg-type]
        digest.sync_folder(folder)
    except OSError as error:
        return {}, error.strerror or str(error)
    return written, ""


def _publish(beside: Path, folder: Path, contents: Mapping[str, Any]) -> list[str]:
    """The files beside are the folder; why not, where they are not."""
    try:
        facts.write(beside, contents)
        digest.sync_folder(beside)
        old = folder.with_name(folder.name + ".removed")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(beside, folder)
        digest.sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        return [error.strerror or str(error)]
    return []


def _contents(network: Network) -> dict[str, Any]:
    """What the manifest says of the tensors and the model."""
    tensors = {
        name: {
            **asdict(entry.split),
            "files": [_file(rank) for rank in entry.owners],
            "shard": list(entry.shard_shape),
        }
        for name, entry in network.directory.items()
    }
    return {
        "tensors": tensors,
        "layout": str(network.grid.layout),
        "vocabulary": network.model.vocabulary,
        "model": asdict(network.model),
        "role": "reward" if network.scalar else "policy",
    }


def _file(rank: int) -> str:
    return f"rank_{rank}.pt"
