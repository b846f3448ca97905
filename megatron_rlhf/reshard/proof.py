"""The proof that two networks hold the same weights, whatever their layouts: a sum of 64 bits for every logical tensor.

Each number's bits count times an odd pseudo-random factor of its global row and one of its global column, modulo 2^64.
Shards add up to the sum of the whole, so it does not depend on the layout; one flipped bit, a moved row, a transposed
or stale shard changes it. It guards against faults, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.models import names
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives

_CHUNK = 1 << 22
"""Numbers that are looked at together; they are widened to 64 bits."""
_NOTHING = -(1 << 63)
_NAMED = 4
"""Tensors that an error names at most."""
_BITS = {4: torch.int32, 2: torch.int16}
_VOCABULARY = (names.EMBEDDING, "output_layer.weight")


def same(source: Network, target: Network) -> None:
    """Returns where every tensor of `target` has the bits of the tensor of that name in `source`, on every rank.

    Only the vocabulary's rows that both have are compared. Raises RuntimeError naming the first tensors that differ,
    or whose copies do. Collective: world.
    """
    rows = min(source.rows, target.rows)
    theirs, ours = digest(source, rows), digest(target, rows)
    wrong = [name for name in ours if ours[name] != theirs.get(name)]
    if wrong:
        raise RuntimeError(f"{_few(wrong)} did not arrive: the target holds other bits than the source")


@torch.no_grad()
def digest(network: Network, rows: int = 0) -> dict[str, int]:
    """Every logical tensor's sum, from 0 to 2^64 - 1, on every rank; `rows` bounds the vocabulary's, 0 is all of them.

    Raises RuntimeError naming tensors whose copies (replicas, tied layers, replicated over tp) differ, and the ranks.
    Memory beyond the network: a few tens of MiB. Collective: world.
    """
    tp, tp_rank = network.grid.layout.tp, network.grid.tp_rank
    place = {name: number for number, name in enumerate(network.directory)}
    sums = torch.full((len(place), tp), _NOTHING, dtype=torch.int64, device=collectives.device())
    for name, parameter in network.parameters.items():
        split = network.directory[name].split
        limit = rows if name in _VOCABULARY else 0
        sums[place[name], max(0, tp_rank) if split.dim is not None else 0] = _sum(parameter, split, tp, tp_rank, limit)
    # max(~x) is ~min(x): one reduction finds the largest and the smallest of a shard's copies
    found = torch.stack([sums, torch.where(sums == _NOTHING, sums, ~sums)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    held = (found != _NOTHING).any(0)
    apart = ((found[0] != ~found[1]) & held).any(1).nonzero().flatten().tolist()
    if apart:
        _complain([list(place)[number] for number in apart], sums[apart[0]])
    totals = torch.where(held, found[0], 0).sum(1)
    return {name: int(total) % (1 << 64) for name, total in zip(place, totals.tolist(), strict=True)}


def _sum(parameter: Tensor, split: names.Split, tp: int, tp_rank: int, limit: int) -> Tensor:
    """One shard's sum, an int64 scalar; of rows below `limit` alone unless that is 0."""
    shard = parameter.detach()
    whole = (*split.whole_shape(shard.shape, tp), 1)
    factors = []
    for dim, salt in ((0, 1), (1, 2)):
        index = torch.arange(whole[dim], device=shard.device)
        if split.dim == dim:
            index = replace(split, dim=0).part(index, tp, tp_rank)
        factor = _factors(_up(whole[dim]), salt, shard.device)[index]
        factors.append(torch.where(index < limit, factor, 0) if limit and dim == 0 else factor)
    bits = shard.view(_BITS[shard.element_size()]).view(len(factors[0]), len(factors[1]))
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    step = max(1, _CHUNK // bits.shape[1])
    for chunk, factor in zip(bits.split(step), factors[0].split(step), strict=True):
        total += (chunk.to(torch.int64).mul_(factors[1]).sum(1) * factor).sum()
    return total


@cache
def _factors(size: int, salt: int, device: torch.device) -> Tensor:
    """Odd pseudo-random int64 numbers, one an index: SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    mixed = (torch.arange(size, device=device) + salt * (1 << 40)) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _right(mixed, shift)) * factor
    return mixed ^ _right(mixed, 31) | 1


def _right(numbers: Tensor, shift: int) -> Tensor:
    """The bits moved right, zeros from the left."""
    return (numbers >> shift) & ((1 << 64 - shift) - 1)


def _up(size: int) -> int:
    """The next power of two, so that few tables of factors are kept."""
    return 1 << (size - 1).bit_length()


def _complain(wrong: Sequence[str], sums_t: Tensor) -> None:
    """Raises RuntimeError that names the tensors and, for the first, who holds what. Collective: world."""
    everyone = collectives.gather(sums_t).T.tolist()
    for sums in everyone:
        holders: dict[int, list[int]] = {}
        for rank, held in enumerate(sums):
            if held != _NOTHING:
                holders.setdefault(held, []).append(rank)
        if len(holders) > 1:
            break
    ranked = sorted(holders.values(), key=len)
    said = " and ".join(", ".join(map(str, ranks)) for ranks in ranked)
    raise RuntimeError(f"copies of {_few(wrong)} differ: of the first, ranks {said} hold different bits")


def _few(wrong: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    return ", ".join(wrong[:_NAMED]) + more
