"""Where the ranks of a world meet before they can communicate: who does not come is named after a while."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import DistError, DistStoreError, PrefixStore, Store, TCPStore

from megatron_rlhf.config import env
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.watchdog import Absent

_GRACE = 60.0
"""Seconds that the others give rank 0 beyond its own patience."""
_MOST = 16
"""Ranks that are named; of more their number is said."""


def meet(seconds: float) -> Store:
    """A store that every rank of the environment's world has reached, kept by rank 0 (or torchrun's agent).

    Raises Absent, on every rank that came, with the ranks that have not after `seconds` and the machines of those that
    have; BadInput where two processes say that they are the same rank, which no other start would cure.

    Collective: world.
    """
    rank, world = env.rank(), env.world_size()
    store = _reach(rank, seconds)
    if store.add(f"came/{rank}", 1) > 1:
        raise BadInput(
            f"two processes say that they are rank {rank} of {world}, one of them on {socket.gethostname()}; "
            "let one launcher alone, srun or torchrun, start the ranks"
        )
    store.set(f"host/{rank}", socket.gethostname())
    if rank == 0:
        missing = _missing(store, world, seconds)
        store.set("absent", missing)
    else:
        missing = _told(store, seconds)
    if missing:
        raise Absent(missing)
    return store


def _reach(rank: int, seconds: float) -> Store:
    """The store of this start of the world; one that torchrun keeps is older than its ranks."""
    kept, start = env.kept_store()
    where = env.master_address(), env.master_port()
    try:
        store = TCPStore(
            *where, is_master=rank == 0 and not kept, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except DistError as error:
        if rank == 0:
            raise
        raise Absent(
            f"rank 0 does not answer at {where[0]}:{where[1]} after {seconds:g} s ({_first(error)})"
        ) from error
    return PrefixStore(f"start{start}", store)


def _missing(store: Store, world: int, seconds: float) -> str:
    """Who has not come after `seconds`, "" when all are there."""
    try:
        store.wait([f"host/{rank}" for rank in range(world)], timedelta(seconds=seconds))
    except DistStoreError:
        came = {rank for rank in range(world) if store.check([f"host/{rank}"])}
        absent = [str(rank) for rank in range(world) if rank not in came]
        names = ", ".join(absent[:_MOST]) + (f" and {len(absent) - _MOST} more" if len(absent) > _MOST else "")
        hosts = sorted({store.get(f"host/{rank}").decode() for rank in came})
        return (
            f"of {world} ranks {len(absent)} did not come within {seconds:g} s: {names}; those that did are on "
            f"{', '.join(hosts[:_MOST])}; look at the other machines, or raise watchdog.start"
        )
    return ""


def _told(store: Store, seconds: float) -> str:
    """What rank 0 found."""
    try:
        store.wait(["absent"], timedelta(seconds=seconds + _GRACE))
        return store.get("absent").decode()
    except DistError as error:
        return f"rank 0 came and says no more ({_first(error)})"


def _first(error: DistError) -> str:
    """Its sentence; what follows is a stack of C++."""
    return str(error).partition("\n")[0]
