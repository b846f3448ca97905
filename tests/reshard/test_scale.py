"""Proves that plans for GPT-3 175B on 1,024 GPUs take less than two seconds of one core, and that their bytes and times
are those that the formulae and an earlier prototype gave.

Not proved here: that every element arrives (test_plan.py), and the speeds of real links.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Model
from megatron_rlhf.reshard.grouping import grouped
from megatron_rlhf.reshard.layout import specs
from megatron_rlhf.reshard.plan import plan
from tests.helpers.reshard import bound

GPT_175B = Model(layers=96, hidden=12288, heads=96, vocabulary=51200, tied=False, precision="bf16")
# (policy, generate, received GB, NIC ms, node bound ms, NVLink ms); "own order" leaves the ranks as they are
TABLE = [
    ("tp8 pp16 dp8", "tp8 pp8", 2.93, 58, 58, 0),
    ("tp8 pp16 dp8", "tp8 pp4", 8.36, 173, 166, 0),
    ("tp8 pp16 dp8", "tp8 pp2", 19.24, 403, 384, 0),
    ("tp8 pp16 dp8", "tp8 pp1", 41.15, 865, 822, 0),
    ("tp8 pp16 dp8", "tp16 pp1", 20.61, 433, 411, 0),
    ("tp8 pp16 dp8", "tp4 pp8", 8.52, 58, 58, 13),
    ("tp8 pp16 dp8", "tp4 pp8 own order", 11.24, 58, 58, 19),
    ("tp8 pp16 dp8", "tp2 pp16", 8.63, 0, 0, 19),
    ("tp8 pp8 dp16", "tp8 pp4", 5.65, 112, 112, 0),
    ("tp8 pp8 dp16", "tp8 pp1", 38.43, 784, 767, 0),
    ("tp8 pp8 dp16", "tp16 pp1", 19.25, 392, 384, 0),
    ("tp8 pp16 vp2 dp8", "tp8 pp4 own order", 10.88, 217, 217, 0),
    ("tp8 pp16 vp2 dp8", "tp8 pp4", 9.72, 200, 194, 0),
]


@pytest.mark.parametrize(("policy", "generate", "received", "nic", "node", "nvlink"), TABLE)
def test_the_table(policy: str, generate: str, received: float, nic: int, node: int, nvlink: int) -> None:
    """GPT-3 175B on 1,024 H100 within 2 %, or half of the last digit that is printed, in less than 2 s of one core."""
    shape = specs(GPT_175B, 51200)
    begun = time.process_time()
    source = Layout.parse(policy, 1024)
    target = Layout.parse(generate.removesuffix(" own order"), 1024)
    if not generate.endswith("own order"):
        target = grouped(source, target, shape, shape)
    made = plan(shape, source, shape, target)
    found = made.summary()
    ranks = [made.rank(rank) for rank in (0, 1023)]
    assert time.process_time() - begun < 2.0
    assert found.recv_bytes_max / 1e9 == pytest.approx(received, rel=0.02)
    assert found.recv_bound_max == found.recv_bytes_max
    assert found.send_bytes_max <= 1.1 * found.send_bytes_mean or "own order" in generate
    for seconds, printed in ((found.node_time_s, nic), (found.node_bound_s, node), (found.nvlink_time_s, nvlink)):
        assert seconds * 1e3 == pytest.approx(printed, rel=0.02, abs=0.5)
    got = np.bincount(made.transfers.target, weights=made.transfers.size, minlength=1024)
    assert np.array_equal(got, bound(made).lack), "every rank receives what it needs and does not hold"
    for mine in ranks:
        for message in mine.rounds[:2]:
            [same] = [
                other for other in made.rank(message.peer).rounds
                if (other.peer, other.relayed) == (mine.rank, message.relayed)
            ]  # fmt: skip
            assert (same.send, same.receive) == (message.receive, message.send)
