"""Groups of sequences take turns in the stages of a pipeline: while one is on stage 1, the next is on stage 0.

A step is one forward of one group through all stages and the draw at the end of it. Every stage handles the steps in
the same order, which follows from the tokens alone: groups in turn, a group that is done leaves, the next waiting one
takes its place. A step leaves stage 0 as soon as the tokens of its group's step before are there; with as many groups
as stages no stage waits for the others.

Why nothing waits for ever. Each step has a slot, a whole number: above that of the step before it, and at least pp - 1
above that of its own group's last step. Every transfer has a time: the hidden states of a step in slot n travel from
stage s to s + 1 at n + s, its tokens from the last stage to all others at n + pp - 1; at equal times tokens go first,
then the later stage. Every stage can compute these times, and posts the transfers it takes part in, tokens and hidden
states alike, in the order of time. So of all transfers not yet over the earliest is the next one of each rank in it:
they all get there, since before it they have only waited for earlier ones. That needs no buffer anywhere and no second
stream: it holds for gloo, for NCCL with a communicator a pair of ranks, for NCCL with one stream for all of a group's
transfers, and even if posting one blocked until its other side posted it, as NCCL's first one of a pair does. What a
stage's shards say to each other inside a step comes between that step's transfers, at the same place on each of them.

Hidden states and tokens are sent without waiting; a group waits for its own when its next turn comes. Then its tokens
are back, so its hidden states have been received long before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from megatron_rlhf.generate.group import Group
from megatron_rlhf.generate.sampling import Draw, draw
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.pulse import beat
from megatron_rlhf.parallel import collectives


@dataclass(slots=True)
class Step:
    """A step of a group that has left this stage: its slot, the tokens drawn at its end, and transfers under way."""

    group: Group
    slot: int
    tokens_b: Tensor
    logprobs_b: Tensor
    transfers: list[collectives.Sending]


def run(network: Network, groups: Iterator[Group], together: int, draw_as: Draw) -> list[Group]:
    """The groups in the order in which they were done; up to `together` of them are in the stages at a time.

    A group is taken from `groups` when its turn comes, so at most `together` caches exist. Collective: tp, pp.
    """
    stage = _Stage(network, draw_as)
    under_way: deque[Step] = deque()
    done: list[Group] = []
    group: Group | None = None
    try:
        for group in islice(groups, together):
            under_way.append(stage.begin(group))
        while under_way:
            group = stage.finish(under_way.popleft())
            if group.done:
                done.append(group)
                group = next(groups, None)
            if group is not None:
                under_way.append(stage.begin(group))
    finally:
        for left in [step.group for step in under_way] + ([group] if group is not None else []):
            left.drop()
    return done


class _Stage:
    """This rank's side of the steps: it receives, computes, sends on or draws."""

    def __init__(self, network: Network, draw_as: Draw) -> None:
        grid = network.grid
        assert grid.groups is not None
        self.network, self.draw_as, self.grid = network, draw_as, grid
        self._pp, self._last = grid.groups.pp, grid.layout.pp - 1
        self._slot = 0
        self._unposted: deque[Step] = deque()

    def begin(self, group: Group) -> Step:
        """A step of the group through this stage; its tokens are still under way. Collective: tp, pp."""
        beat()
        slot, self._slot = self._slot, self._slot + 1
        live_b = group.live_b
        hidden = self._received(group.shape)
        self._post(slot + self.grid.pp_rank)
        output = group.forward(hidden)
        if self.grid.last_stage:
            position_b = torch.full_like(live_b, group.place)
            tokens_b, logprobs_b = draw(self.network, output[:, 0], self.draw_as, live_b, position_b)
            step = Step(group, slot, tokens_b, logprobs_b, [])
        else:
            sending = collectives.send(output, self._rank(self.grid.pp_rank + 1), self._pp)
            undrawn_b = torch.zeros_like(live_b)
            step = Step(group, slot, undrawn_b, undrawn_b.float(), [sending])
        if self._last > 0:
            self._unposted.append(step)
        if self.grid.last_stage:
            self._post(slot + self._last)
        return step

    def finish(self, step: Step) -> Group:
        """The step's group once it has taken its tokens, ready for its next step. Collective: pp."""
        self._slot = max(self._slot, step.slot + self._last)
        self._post(self._slot + max(0, self.grid.pp_rank - 1))
        for transfer in step.transfers:
            transfer.wait()
        step.group.take(step.tokens_b, step.logprobs_b)
        return step.group

    def _post(self, time: int) -> None:
        """Start the broadcasts of tokens up to `time`."""
        while self._unposted and self._unposted[0].slot + self._last <= time:
            step = self._unposted.popleft()
            step.transfers.append(collectives.start_broadcast(step.tokens_b, self._rank(self._last), self._pp))

    def _received(self, shape: tuple[int, int]) -> Tensor | None:
        if self.grid.first_stage:
            return None
        config = self.network.config
        before = self._rank(self.grid.pp_rank - 1)
        return collectives.receive((*shape, config.hidden_size), config.params_dtype, before, self._pp)

    def _rank(self, stage: int) -> int:
        return self.grid.layout.rank(self.grid.tp_rank, stage, self.grid.dp_rank)
