"""Proves that ranks which do not come, or come twice, are named after the time that was given, on every rank that did
come, and that a store which torchrun keeps serves every start of a world anew.

The ranks are threads of this process on one machine. Not proved here: several machines, and what a run does with it
(tests/test_cli.py has the exit code).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import Store, TCPStore

from megatron_rlhf.config import env
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.watchdog import Absent
from megatron_rlhf.parallel import meeting

HOST = socket.gethostname()


class Ranks:
    """Starts the given ranks of a world of three."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_thread = threading.local()
        self.kept: tuple[bool, int] = (False, 0)
        port = env.free_port()
        monkeypatch.setattr(env, "rank", lambda: self.of_thread.rank)
        monkeypatch.setattr(env, "world_size", lambda: 3)
        monkeypatch.setattr(env, "master_address", lambda: "127.0.0.1")
        monkeypatch.setattr(env, "master_port", lambda: port)
        monkeypatch.setattr(env, "kept_store", lambda: self.kept)

    def meet(self, ranks: Sequence[int], seconds: float) -> list[Future[Store]]:
        def come(rank: int) -> Store:
            self.of_thread.rank = rank
            return meeting.meet(seconds)

        with ThreadPoolExecutor(len(ranks)) as pool:
            return [pool.submit(come, rank) for rank in ranks]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def _said(outcome: Future[Store], kind: type[Exception] = Absent) -> str:
    error = outcome.exception()
    assert isinstance(error, kind), error
    return str(error)


def test_all_who_come_share_a_store(world: Ranks) -> None:
    stores = [outcome.result() for outcome in world.meet([2, 0, 1], 30)]
    stores[0].set("word", "heard")
    assert [store.get("word") for store in stores] == [b"heard"] * 3


@pytest.mark.parametrize("came", [[0, 1], [0]])
def test_who_does_not_come_is_named_by_all(world: Ranks, came: list[int]) -> None:
    outcomes = world.meet(came, 1.5)
    absent = [str(rank) for rank in range(3) if rank not in came]
    for outcome in outcomes:
        said = _said(outcome)
        assert said.startswith(f"of 3 ranks {len(absent)} did not come within 1.5 s: {', '.join(absent)}; "), said
        assert f"those that did are on {HOST};" in said and "watchdog.start" in said


def test_without_rank_0_the_others_say_where_they_looked(world: Ranks) -> None:
    for outcome in world.meet([1, 2], 1.5):
        said = _said(outcome)
        assert said.startswith(f"rank 0 does not answer at 127.0.0.1:{env.master_port()} after 1.5 s"), said
        assert "\n" not in said


def test_a_rank_that_comes_twice_is_told_at_once(world: Ranks) -> None:
    """One of the two; it does not wait for the third rank, which never comes."""
    outcomes = world.meet([0, 1, 1], 3)
    twice = [outcome for outcome in outcomes if isinstance(outcome.exception(), BadInput)]
    assert len(twice) == 1
    assert _said(twice[0], BadInput).startswith("two processes say that they are rank 1 of 3")
    assert sum("1 did not come within 3 s: 2;" in _said(outcome) for outcome in outcomes if outcome not in twice) == 2


def test_a_store_that_torchrun_keeps_serves_every_start(world: Ranks) -> None:
    """What the first start left in it is not taken for the second's; without its rank 2 that one fails."""
    agent = TCPStore("127.0.0.1", env.master_port(), is_master=True, timeout=timedelta(seconds=30))
    for start in (0, 1):
        world.kept = (True, start)
        stores = [outcome.result() for outcome in world.meet([0, 1, 2], 30)]
        assert stores[0].add("count", 1) == 1
    world.kept = (True, 2)
    assert "did not come within 1.5 s: 2;" in _said(world.meet([0, 1], 1.5)[0])
    del agent
