"""The switch between the train and the generate phase: the only thing that moves the policy's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel.collectives import agree
from megatron_rlhf.reshard import move
from megatron_rlhf.train.engine import Engine


@contextmanager
def generating(policy: Engine, network: Network, *, end: int, rows: int, groups: int = 0) -> Iterator[Generator]:
    """A generator that holds the policy's present weights in the layout of `network`; going back moves nothing.

    The optimizer's parameter gather has finished when `update` returns, so the weights read here are those of the last
    step; all ranks agree on its number before a token is drawn. Collective: world.
    """
    agree(policy.updates)
    move.copy(policy.network, network)
    yield Generator(network, end=end, rows=rows, groups=groups)
