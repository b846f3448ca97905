"""The reshard part of a plan: what the switch between the policy's two layouts moves, and its time. Pure, no torch."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import check
from megatron_rlhf.config.schema import Cluster, Config
from megatron_rlhf.config.world import ranks
from megatron_rlhf.reshard.bound import Summary
from megatron_rlhf.reshard.grouping import grouped
from megatron_rlhf.reshard.layout import specs
from megatron_rlhf.reshard.plan import plan

_ROWS = 128
"""What the rows of the vocabulary are padded to a multiple of on GPUs, besides every tp."""


@dataclass(frozen=True, slots=True)
class Report:
    """One reshard: its layouts, the machines, and the plan in numbers."""

    policy: Layout
    generate: Layout
    cluster: Cluster
    summary: Summary

    def as_json(self) -> str:
        """The numbers under their names, and the two layouts."""
        numbers = asdict(self.summary)
        words = {"policy": str(self.policy), "generate": str(self.generate), "cluster": asdict(self.cluster)}
        return json.dumps({**words, **numbers}, indent=2) + "\n"

    def as_text(self) -> str:
        """The same for people."""
        found = self.summary
        rows = [
            ("needed", _bytes(found.need_bytes_max), f"of which at least {_bytes(found.kept_bytes_min)} are there"),
            ("received", _bytes(found.recv_bytes_max), f"at least {_bytes(found.recv_bound_max)}"),
            ("sent", _bytes(found.send_bytes_max), f"on average {_bytes(found.send_bytes_mean)}"),
            ("staging", _bytes(found.peak_extra_bytes), "" if found.peak_extra_bytes else "whole shards travel"),
            ("between nodes", _milliseconds(found.node_time_s), f"at least {_milliseconds(found.node_bound_s)}"),
            ("inside nodes", _milliseconds(found.nvlink_time_s), ""),
            ("planned in", _milliseconds(found.plan_seconds), f"sha256 {found.plan_sha256[:16]}"),
        ]
        head = f"reshard {self.policy} -> {self.generate}, {self.cluster.node} GPUs a node; bytes of the busiest GPU"
        return "\n".join([head, *(f"  {name:<14}{value:>11}  {more}".rstrip() for name, value, more in rows)]) + "\n"


def reshard(config: Config) -> Report:
    """The plan of the policy's switch from its layout to `layout.generate`, in the dealing that keeps most.

    Only these two layouts count. Raises BadInput when they do not fit the ranks, the model or each other.
    """
    begun = time.process_time()
    world = max(ranks(config.layout.policy), ranks(config.layout.generate))
    check(config, world, "plan")
    source, wanted = (Layout.parse(words, world) for words in (config.layout.policy, config.layout.generate))
    multiple = math.lcm(source.tp, wanted.tp, _ROWS)
    tensors = specs(config.model, -(-config.model.vocabulary // multiple) * multiple)
    target = grouped(source, wanted, tensors, tensors)
    summary = plan(tensors, source, tensors, target, config.cluster).summary()
    return Report(source, target, config.cluster, replace(summary, plan_seconds=time.process_time() - begun))


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
