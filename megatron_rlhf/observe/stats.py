"""Addable statistics: nobody averages averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Stats:
    """Named pairs of a sum and the weight that divides it; two Stats add name by name.

    Values are floats or scalar tensors, so a loss can return them from inside a pipeline stage and micro-batches,
    replicas and minibatches only ever add.
    """

    sums: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **pairs: tuple[Any, Any]) -> Stats:
        """Stats from `name=(sum, weight)` pairs; write `loss__policy` for the name `loss.policy`."""
        named = {name.replace("__", "."): pair for name, pair in pairs.items()}
        return cls({name: pair[0] for name, pair in named.items()}, {name: pair[1] for name, pair in named.items()})

    def __add__(self, other: Stats) -> Stats:
        """The Stats of both, added name by name."""
        return Stats(_added(self.sums, other.sums), _added(self.weights, other.weights))

    def __getitem__(self, name: str) -> float:
        """The mean of `name`: its sum over its weight, 0 where nothing was counted."""
        weight = float(self.weights[name])
        return float(self.sums[name]) / weight if weight else 0.0

    def __contains__(self, name: str) -> bool:
        """Whether `name` was recorded."""
        return name in self.sums

    def means(self) -> dict[str, float]:
        """Every mean, in the order of the names."""
        return {name: self[name] for name in sorted(self.sums)}


def _added(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: left[name] + right[name] if name in left and name in right else left.get(name, right.get(name))
        for name in [*left, *(name for name in right if name not in left)]
    }
