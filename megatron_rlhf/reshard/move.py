"""Weights from one network into another, whatever the two layouts.

Correct and bounded before it is fast: one logical tensor at a time travels by broadcast of its tp shards, and every
rank keeps the slice it needs. Memory beyond the models: one full tensor.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rlhf.models.names import Entry
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel.collectives import device


@torch.no_grad()
def copy(source: Network, target: Network, *, fresh: tuple[str, ...] = ()) -> int:
    """Fill every tensor of `target` from the tensor of the same name in `source`; the bytes a rank received at most.

    Tensors named in `fresh` (a new head) keep their initial weights. Raises RuntimeError naming the tensors that have
    no source, or whose shape or dtype differs: nothing is ever silently left as it was. Collective: world.
    """
    missing = [name for name in target.directory if name not in source.directory and name not in fresh]
    if missing:
        raise RuntimeError(f"no weights for {', '.join(missing)}: the source has no tensor of that name")
    received = 0
    for name, entry in target.directory.items():
        if name in fresh:
            continue
        origin = source.directory[name]
        _check(name, origin, entry)
        whole = _gathered(source.parameters.get(name), origin)
        received += whole.numel() * whole.element_size()
        parameter = target.parameters.get(name)
        if parameter is not None:
            parameter.copy_(entry.split.part(whole, target.grid.layout.tp, target.grid.tp_rank))
    return received


@torch.no_grad()
def whole(network: Network, name: str) -> torch.Tensor:
    """The full logical tensor `name` on every rank. Collective: world."""
    return _gathered(network.parameters.get(name), network.directory[name])


def _gathered(parameter: torch.nn.Parameter | None, entry: Entry) -> torch.Tensor:
    shards = []
    for owner in entry.owners:
        if dist.get_rank() == owner:
            assert parameter is not None
            shard = parameter.detach().clone().contiguous()
        else:
            shard = torch.empty(entry.shard_shape, dtype=entry.dtype, device=device())
        dist.broadcast(shard, owner)
        shards.append(shard)
    return entry.split.join(shards)


def _check(name: str, origin: Entry, entry: Entry) -> None:
    if _full_shape(origin) != _full_shape(entry) or origin.dtype != entry.dtype:
        raise RuntimeError(
            f"{name} is {_full_shape(origin)} {origin.dtype} in the source and {_full_shape(entry)} {entry.dtype} here"
        )


def _full_shape(entry: Entry) -> tuple[int, ...]:
    return entry.split.whole_shape(entry.shard_shape, len(entry.owners))
