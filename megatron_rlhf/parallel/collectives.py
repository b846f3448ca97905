"""Collectives on whole tensors: a batch gathered by row number, broadcasts, agreement and stage-to-stage sends.

Ranks are world ranks. Tensors travel on the GPU where there is one and come back on the device they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
"""A group of ranks; None is the world."""


@dataclass(frozen=True, slots=True)
class Sending:
    """A send or a broadcast under way; it keeps the tensor alive until `wait` returns."""

    work: dist.Work
    tensor: Tensor

    def wait(self) -> None:
        """Returns when the tensor may be read, changed or freed."""
        self.work.wait()


def device() -> torch.device:
    """Where tensors travel: this process's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def assemble(local: Tensor, index_b: Tensor, total: int, owner: bool) -> Tensor:
    """[total, ...]: row `index_b[i]` is an owner's `local[i]`, on every rank; rows nobody owns are zero.

    An index of -1 drops its row; each row has one owner. A rank that owns nothing passes an empty tensor of the same
    trailing shape and dtype (int64 or a float type). Raises ValueError for bool.

    Collective: world.
    """
    if local.dtype == torch.bool:
        raise ValueError("assemble adds rows and cannot add bool; pass int64")
    whole = torch.zeros((total, *local.shape[1:]), dtype=local.dtype, device=device())
    if owner:
        kept = index_b >= 0
        rows = local.detach()[kept.to(local.device)]
        whole[index_b[kept].to(whole.device)] = rows.to(whole.device)
    dist.all_reduce(whole)
    return whole.to(local.device)


def broadcast(tensor: Tensor, source_rank: int, group: Group = None) -> Tensor:
    """`tensor` with the values it has on `source_rank`, in place. Collective: `group`."""
    travelling = tensor.detach().to(device()).contiguous()
    dist.broadcast(travelling, source_rank, group=group)
    if travelling.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(travelling)
    return tensor


def start_broadcast(tensor: Tensor, source_rank: int, group: Group = None) -> Sending:
    """Starts filling `tensor` with the values it has on `source_rank` and returns at once; read it after `wait`.

    It must be contiguous and lie on `device()`. Collective: `group`.
    """
    work = dist.broadcast(tensor, source_rank, group=group, async_op=True)
    assert work is not None, "this rank is not in the group"
    return Sending(work, tensor)


def agree(value: int) -> None:
    """Returns where every rank holds the same `value`; raises RuntimeError naming the ranks otherwise.

    Collective: world.
    """
    values = [torch.empty(1, dtype=torch.int64, device=device()) for _ in range(dist.get_world_size())]
    dist.all_gather(values, torch.tensor([value], dtype=torch.int64, device=device()))
    ranks: dict[int, list[str]] = {}
    for rank, held in enumerate(torch.cat(values).tolist()):
        ranks.setdefault(held, []).append(str(rank))
    if len(ranks) > 1:
        raise RuntimeError("ranks disagree: " + "; ".join(f"{held} on {', '.join(on)}" for held, on in ranks.items()))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank, the same answer on all. Collective: world."""
    flags = torch.tensor([int(flag)], dtype=torch.int64, device=device())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def send(tensor: Tensor, rank: int, group: Group = None) -> Sending:
    """Starts sending `tensor` to `rank` and returns at once; keep the answer and `wait` on it later.

    Collective: `rank` receives.
    """
    travelling = tensor.detach().to(device()).contiguous()
    work = dist.isend(travelling, rank, group=group)
    assert work is not None, "this rank is not in the group"
    return Sending(work, travelling)


def receive(shape: Sequence[int], dtype: torch.dtype, rank: int, group: Group = None) -> Tensor:
    """The tensor that `rank` sends, of a shape and dtype both sides know. Collective: `rank` sends."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device())
    dist.recv(tensor, rank, group=group)
    return tensor


def gather(tensor: Tensor, group: Group = None) -> Tensor:
    """[ranks of the group, ...]: every rank's `tensor`, in rank order. Collective: `group`."""
    size = dist.get_world_size(group)
    found = torch.empty(size * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    dist.all_gather_into_tensor(found, tensor.detach().contiguous().flatten(), group=group)
    return found.view(size, *tensor.shape)


def gather_objects(value: object) -> list[Any]:
    """Every rank's `value`, in rank order; small and rare things only. Collective: world."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def least(value: int) -> int:
    """The smallest of every rank's `value`. Collective: world."""
    smallest = torch.tensor(value, dtype=torch.int64, device=device())
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def total(value: float) -> float:
    """The sum of every rank's `value`, in double precision. Collective: world."""
    summed = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(summed)
    return float(summed)


def rank() -> int:
    """This process's place in the world."""
    return dist.get_rank()


def world_size() -> int:
    """Processes in the world."""
    return dist.get_world_size()


def wait_for_all() -> None:
    """Returns when every rank has come here. Collective: world."""
    dist.barrier()
