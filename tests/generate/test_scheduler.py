"""Proves that the stages work at the same time, on different groups, and that no order of theirs can deadlock.

What each stage posts is recorded and played, a forward taking one unit of time: with transfers that happen in the order
of posting, and with transfers that also block whoever posts them. On real ranks the order of the steps is recorded, and
the last stage is made to wait with a token until the first one works on another group.

Not proved here: that tokens are right (`test_engine.py`); that NCCL does what it promises; seconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_rlhf.generate import engine, scheduler
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.generate.group import Group
from megatron_rlhf.generate.sampling import Draw
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

NEVER = -1
"""An end token that is never drawn."""
Order = list[tuple[str, Any]]


class Scripted:
    """A group of one row that is done after a given number of steps."""

    def __init__(self, order: Order, steps: int) -> None:
        self.order, self.left, self.place = order, steps, 0
        self.live_b, self.shape = torch.zeros(1, dtype=torch.int64), (1, 1)

    @property
    def done(self) -> bool:
        return self.left == 0

    def forward(self, hidden: Tensor | None) -> Tensor:
        self.order.append(("works", None))
        return torch.zeros(1, 1, 1)

    def take(self, tokens_b: Tensor, logprobs_b: Tensor) -> None:
        self.left, self.place = self.left - 1, self.place + 1

    def drop(self) -> None:
        pass


@dataclass
class Recorder:
    """Takes the place of the collectives on stage `stage`: the k-th transfer of a pair of ranks is one of a kind."""

    stage: int
    order: Order = field(default_factory=list)
    sent: int = 0
    received: int = 0
    told: int = 0

    def send(self, *_: Any) -> Any:
        return self._posted(("hidden", self.stage, self._count("sent")))

    def receive(self, *_: Any) -> Tensor:
        transfer = ("hidden", self.stage - 1, self._count("received"))
        self._posted(transfer).wait()
        return torch.zeros(1, 1, 1)

    def start_broadcast(self, *_: Any) -> Any:
        return self._posted(("tokens", self._count("told")))

    def _count(self, name: str) -> int:
        setattr(self, name, getattr(self, name) + 1)
        return int(getattr(self, name))

    def _posted(self, transfer: tuple[Any, ...]) -> Any:
        self.order.append(("posts", transfer))
        return SimpleNamespace(wait=lambda: self.order.append(("needs", transfer)))


def orders(stages: int, steps: Sequence[int], together: int) -> list[Order]:
    """What each of `stages` stages does, in its order, with groups of so many steps."""
    found = []
    for stage in range(stages):
        recorder = Recorder(stage)
        layout = SimpleNamespace(pp=stages, rank=lambda tp, pp, dp: pp)
        grid = SimpleNamespace(
            **{"layout": layout, "groups": SimpleNamespace(pp=None), "tp_rank": 0, "pp_rank": stage, "dp_rank": 0},
            **{"first_stage": stage == 0, "last_stage": stage == stages - 1},
        )
        network = SimpleNamespace(grid=grid, config=SimpleNamespace(hidden_size=1, params_dtype=torch.float32))
        drawn = (torch.zeros(1, dtype=torch.int64), torch.zeros(1))
        with (
            mock.patch.multiple(
                scheduler.collectives,
                **{name: getattr(recorder, name) for name in ("send", "receive", "start_broadcast")},
            ),
            mock.patch.object(scheduler, "draw", return_value=drawn),
        ):
            groups = (Scripted(recorder.order, count) for count in steps)
            done = scheduler.run(network, groups, together, Draw())  # type: ignore[arg-type]
        assert len(done) == len(steps)
        found.append(recorder.order)
    return found


def played(found: Sequence[Order], *, strictly: bool) -> int | None:
    """When the last stage is through, a forward taking 1 and a transfer nothing; None where they wait for ever.

    A rank's transfers happen one after the other in the order in which it posted them, each when all its ranks are
    there. `strictly`: whoever posts a transfer waits until it is over.
    """
    if strictly:
        found = [[x for op in order for x in ([op, ("needs", op[1])] if op[0] == "posts" else [op])] for order in found]
    at, now, free = ([0] * len(found) for _ in range(3))
    queues: list[list[tuple[Any, int]]] = [[] for _ in found]
    over: dict[Any, int] = {}
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(found):
            while at[rank] < len(order):
                kind, transfer = order[at[rank]]
                if kind == "posts":
                    queues[rank].append((transfer, now[rank]))
                elif kind == "needs" and transfer not in over:
                    break
                now[rank] = now[rank] + 1 if kind == "works" else max(now[rank], over.get(transfer, 0))
                at[rank], moved = at[rank] + 1, True
            while queues[rank] and _happens(queues[rank][0][0], queues, free, over):
                moved = True
    return max(now) if all(at[rank] == len(order) for rank, order in enumerate(found)) else None


def _happens(
    transfer: tuple[Any, ...], queues: list[list[tuple[Any, int]]], free: list[int], over: dict[Any, int]
) -> bool:
    """Whether all ranks of a transfer have come to it; then it is taken from their queues and is over."""
    ranks = range(len(queues)) if transfer[0] == "tokens" else (transfer[1], transfer[1] + 1)
    if not all(queues[rank] and queues[rank][0][0] == transfer for rank in ranks):
        return False
    over[transfer] = max(max(free[rank], queues[rank].pop(0)[1]) for rank in ranks)
    for rank in ranks:
        free[rank] = over[transfer]
    return True


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_no_order_of_the_stages_deadlocks(stages: int) -> None:
    """Groups of random lengths, fewer, as many or more than stages, new ones in the place of those that are done."""
    choose = random.Random(stages)
    for _ in range(60):
        steps = [choose.randint(1, 7) for _ in range(choose.randint(1, 9))]
        together = choose.randint(1, 7)
        found = orders(stages, steps, together)
        assert played(found, strictly=True) is not None, (steps, together)
        posted = [[transfer for kind, transfer in order if kind == "posts"] for order in found]
        assert all(len(set(transfers)) == len(transfers) for transfers in posted)


def test_the_player_sees_a_deadlock() -> None:
    """Stages that ask for tokens only when they need them meet a last stage that waits to hand them out."""

    def late(stage: Any, step: Any) -> Any:
        stage._slot = max(stage._slot, step.slot + stage._last)
        stage._post(stage._slot + 99)
        for transfer in step.transfers:
            transfer.wait()
        step.group.take(step.tokens_b, step.logprobs_b)
        return step.group

    post = scheduler._Stage._post

    def only_then(stage: Any, time: int) -> None:
        if stage.grid.last_stage or time > 50:
            post(stage, time)

    with mock.patch.multiple(scheduler._Stage, finish=late, _post=only_then):
        found = orders(2, [3, 3, 3], 3)
    assert played(found, strictly=False) is None


@pytest.mark.parametrize("stages", [2, 4])
def test_with_as_many_groups_as_stages_no_stage_waits(stages: int) -> None:
    """Groups of n steps take n forwards each, and the pipeline fills once; one group after the other leaves stages
    idle."""
    n = 10
    for groups in (stages, stages + 2):
        assert played(orders(stages, [n] * groups, groups), strictly=False) == n * groups + stages - 1
    assert played(orders(stages, [n] * stages, 1), strictly=False) == n * stages * stages
    waiting = played(orders(stages, [n] * 3 * stages, stages), strictly=False)
    assert waiting == 3 * n * stages + stages - 1, "a group that is done makes room without draining the pipeline"


@pytest.mark.parametrize(
    ("count", "rows", "groups", "sizes"),
    [
        (40, 16, 1, [16, 16, 8]),
        (5, 16, 1, [5]),
        (5, 16, 4, [2, 1, 1, 1]),
        (3, 16, 4, [1, 1, 1]),
        (17, 16, 4, [4, 4, 4, 4, 1]),
        (7, 7, 3, [2, 2, 2, 1]),
        (0, 16, 4, []),
    ],
)
def test_a_replicas_rows_are_shared_out(count: int, rows: int, groups: int, sizes: list[int]) -> None:
    """At least as many parts as groups where there are rows; as many as are decoded together hold at most `rows`."""
    parts = engine._parts(torch.arange(count), rows, groups)
    assert [len(part) for part in parts] == sizes
    assert [row for part in parts for row in part.tolist()] == list(range(count))


def recorded(words: str, groups: int, tokens: int, before_draw: Callable[..., None] | None = None) -> list[Any]:
    """(group, what, step) in the order in which this rank began its forwards and took tokens. Collective: world."""
    events: list[Any] = []
    numbers: dict[int, int] = {}
    forward, take, draw = Group.forward, Group.take, scheduler.draw

    def forwards(group: Group, hidden: Tensor | None) -> Tensor:
        events.append((numbers.setdefault(id(group), len(numbers)), "begins", group.place))
        return forward(group, hidden)

    def takes(group: Group, *drawn: Tensor) -> None:
        events.append((numbers[id(group)], "has its token", group.place))
        take(group, *drawn)

    def draws(*arguments: Any) -> Any:
        if before_draw:
            before_draw(*events[-1])
        return draw(*arguments)

    generator = Generator(tiny.network(words), end=NEVER, rows=64, groups=groups)
    with (
        mock.patch.multiple(Group, forward=forwards, take=takes),
        mock.patch.object(scheduler, "draw", draws),
    ):
        rollout = generator.sample(tiny.prompts(9), Draw(seed=3), tokens)
    assert rollout.rows.response_lengths_B.tolist() == [tokens] * 9
    return events


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "pp4"])
def test_every_stage_begins_all_groups_before_the_first_has_its_token(words: str) -> None:
    """In every step, on every rank; one group has its token before anything else begins."""
    tokens, groups = 4, int(words[-1])
    events = recorded(words, 0, tokens)
    assert {group for group, _, _ in events} == set(range(groups))
    for step in range(tokens):
        back = events.index((0, "has its token", step))
        for other in range(groups):
            assert events.index((other, "begins", step)) < back, (other, step)
    alone = recorded(words, 1, tokens)
    assert alone == [(0, what, step) for step in range(tokens) for what in ("begins", "has its token")]


@on_grid(4, timeout=120)
@pytest.mark.parametrize("words", ["tp2 pp2", "pp4"])
def test_the_first_stage_is_ahead_of_the_last(words: str, tmp_path: Path) -> None:
    """The last stage does not draw a group's token before the first has begun the groups behind it: this ends only if
    they work at the same time."""
    built, tokens, groups = tiny.network(words), 3, int(words[-1])
    last = groups - 1

    def begun(group: int, step: int) -> Path:
        return tmp_path / f"{group}.{step}.{built.grid.tp_rank}"

    def ahead(group: int, _: str, step: int) -> None:
        deadline = time.monotonic() + 60
        while group == 0 and not begun(last, step).exists():
            assert time.monotonic() < deadline, f"group {last} has not begun step {step}"
            time.sleep(0.01)

    forward = Group.forward
    firsts: list[Group] = []

    def tells(group: Group, hidden: Tensor | None) -> Tensor:
        if group.place == 0:
            firsts.append(group)
        if built.grid.first_stage:
            begun(firsts.index(group), group.place).touch()
        return forward(group, hidden)

    with mock.patch.object(Group, "forward", tells):
        recorded(words, groups, tokens, before_draw=ahead)
