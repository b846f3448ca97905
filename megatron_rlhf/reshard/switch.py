"""The switch between the train and the generate phase: the only thing that moves the policy's weights or offloads them.

A phase: the weights are gathered over replicas, gradients freed, optimizer state parked where asked; weights move and
are proved; all ranks agree on their version, and only then a token may be drawn. Going back moves no weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

import torch

from megatron_rlhf.config import env
from megatron_rlhf.config.schema import Reshard
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.models import decode
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives
from megatron_rlhf.reshard import proof
from megatron_rlhf.reshard.layout import specs
from megatron_rlhf.reshard.message import RankPlan
from megatron_rlhf.reshard.move import Moved, Mover
from megatron_rlhf.reshard.plan import plan
from megatron_rlhf.reshard.topology import Cluster
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import Offload


class State(Enum):
    """What the generate network holds: nothing of use, weights that are still coming, or those of one version."""

    EMPTY = auto()
    LOADING = auto()
    READY = auto()


@dataclass(frozen=True, slots=True)
class Cost:
    """One switch: seconds from when the last rank came until all were ready, bytes received by the rank that receives
    most and the least that any plan needs, and bytes of memory allocated beside the two networks."""

    seconds: float
    bytes: int
    bound: int
    peak_extra: int


class Bridge:
    """The policy, the network that generates for it and what moves weights between them; built once a run.

    `bound` is the least number of bytes a rank must receive. With `proven` every switch ends in a proof that all
    weights have arrived; with `park` the optimizer's state waits on the host meanwhile.
    """

    def __init__(
        self,
        policy: Engine,
        network: Network,
        mover: Mover,
        *,
        bound: int = 0,
        plan: str = "",
        proven: bool = True,
        park: bool = False,
    ) -> None:
        """Nothing is moved yet; `plan` is the plan's digest."""
        self.plan = plan
        self.policy = policy
        self.network = network
        self.state = State.EMPTY
        self.version = -1
        self.cost: Cost | None = None
        self._mover, self._bound, self._proven = mover, bound, proven
        self._offload = Offload(policy, state=park)

    def load(self) -> None:
        """READY: the generate network holds the policy's weights after its last update, and all ranks say so.

        Raises RuntimeError, and moves nothing, where gradients are accumulated or other weights are in the policy's
        place; where ranks have made different numbers of updates, naming them; where weights did not arrive, naming
        them. Collective: world.
        """
        if self.state is not State.EMPTY:
            raise RuntimeError("the policy is generating already; leave the other `with generating(...)` first")
        self.policy.present()
        start = time.perf_counter()
        self._offload.start()
        self.state = State.LOADING
        try:
            moved = self._move()
        except BaseException:
            self.unload()
            raise
        self.state, self.version = State.READY, self.policy.updates
        self.cost = self._counted(moved, time.perf_counter() - start)

    def unload(self) -> None:
        """EMPTY: caches are freed, the policy can learn again. No weights move."""
        self.state, self.version = State.EMPTY, -1
        decode.drop(self.network)
        self._offload.restore()

    def ready(self) -> None:
        """Returns where the policy's present weights are there; raises RuntimeError where they are not."""
        if self.state is not State.READY:
            raise RuntimeError(
                f"the generate network is {self.state.name}: use a generator inside its `with generating(...)` alone"
            )
        if self.version != self.policy.updates:
            raise RuntimeError(
                f"the generate network holds the weights of update {self.version}, the policy has made "
                f"{self.policy.updates}; leave and enter `generating` again"
            )

    def _move(self) -> Moved:
        if self.policy.optimizer is not None:
            self.policy.optimizer.sync()
        moved = self._mover.run()
        self._offload.finish()
        if self._proven:
            proof.same(self.policy.network, self.network)
        collectives.agree(self.policy.updates)
        return moved

    def _counted(self, moved: Moved, seconds: float) -> Cost:
        extra = sum(buffer.nbytes for buffer in self._mover.buffers)
        mine = torch.tensor([-seconds, moved.received, extra], dtype=torch.float64)
        most = collectives.gather(mine.to(collectives.device())).amax(0).tolist()
        return Cost(-most[0], int(most[1]), self._bound, int(most[2]))


def cluster(settings: Reshard) -> Cluster:
    """The machines as the settings, else the launcher, describe them."""
    node = settings.node or env.local_world_size()
    return Cluster(node=node) if node else Cluster()


def build(policy: Engine, network: Network, settings: Reshard) -> Bridge:
    """The bridge between a policy that learns and the network that is to generate for it. Collective: world."""
    ends, rank = (policy.network, network), collectives.rank()
    tensors = [specs(end.model, end.rows, scalar=end.scalar) for end in ends]
    planned = plan(tensors[0], ends[0].grid.layout, tensors[1], ends[1].grid.layout, cluster(settings))
    collectives.agree(int(planned.sha256[:15], 16))
    mine = planned.rank(rank) if rank < planned.world else RankPlan(rank, (), (), (), ())
    half = settings.staging_mb << 19
    mover = Mover(*ends, mine, staging=half, check=settings.check)
    return Bridge(
        policy,
        network,
        mover,
        bound=planned.summary(half).recv_bound_max,
        plan=planned.sha256,
        proven=settings.proof == "always",
        park=settings.park_optimizer,
    )


@contextmanager
def generating(bridge: Bridge, *, end: int, rows: int, groups: int = 0) -> Iterator[Generator]:
    """A generator that holds the policy's present weights, to be used inside; whatever happens inside, the policy can
    learn and the next switch works afterwards. Collective: world."""
    bridge.load()
    try:
        yield Generator(bridge.network, end=end, rows=rows, groups=groups, ready=bridge.ready)
    finally:
        bridge.unload()
