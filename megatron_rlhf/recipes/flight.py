"""A PPO iteration in flight: what its phases have made so far, to be saved between two of them and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from torch import Tensor

from megatron_rlhf.batch import Annotated, Experience, Rollout
from megatron_rlhf.observe.stats import Stats


@dataclass(frozen=True, slots=True)
class Flight:
    """The nouns that are there after `phase`, the minibatches that were learned from and the statistics so far.

    Nothing before the first phase. `elapsed` are wall seconds since the iteration began, `seconds` those by phase.
    """

    phase: str = ""
    rollout: Rollout | None = None
    scored: Rollout | None = None
    annotated: Annotated | None = None
    experience: Experience | None = None
    minibatches: int = 0
    stats: Stats = field(default_factory=Stats)
    seconds: Mapping[str, float] = field(default_factory=dict)
    elapsed: float = 0.0

    @property
    def drawn(self) -> bool:
        """Whether there are episodes whose drift has not been looked at."""
        return self.rollout is not None and self.experience is None

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and words alone: the newest noun holds those before it."""
        nouns = {"experience": self.experience, "annotated": self.annotated, "scored": self.scored}
        name, newest = next(((n, noun) for n, noun in nouns.items() if noun is not None), ("rollout", self.rollout))
        return {
            "phase": self.phase,
            "noun": name,
            "newest": _plain(newest),
            "minibatches": self.minibatches,
            "sums": {name: float(value) for name, value in self.stats.sums.items()},
            "weights": {name: float(value) for name, value in self.stats.weights.items()},
            "seconds": dict(self.seconds),
            "elapsed": self.elapsed,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Flight:
        """What `state` gave, bit for bit; of the scored rollout on, the rollout is the scored one."""
        newest = {} if state["newest"] is None else {state["noun"]: _noun(_KINDS[state["noun"]], state["newest"])}
        experience = newest.get("experience")
        annotated = experience.annotated if experience else newest.get("annotated")
        scored = annotated.rollout if annotated else newest.get("scored")
        return cls(
            phase=state["phase"],
            rollout=scored or newest.get("rollout"),
            scored=scored,
            annotated=annotated,
            experience=experience,
            minibatches=state["minibatches"],
            stats=Stats(dict(state["sums"]), dict(state["weights"])),
            seconds=dict(state["seconds"]),
            elapsed=state["elapsed"],
        )


_KINDS: dict[str, type] = {"rollout": Rollout, "scored": Rollout, "annotated": Annotated, "experience": Experience}


def _plain(noun: object) -> Any:
    """The noun's tensors by field; a field that holds None stays None."""
    if noun is None or isinstance(noun, Tensor):
        return noun
    assert is_dataclass(noun)
    return {item.name: _plain(getattr(noun, item.name)) for item in fields(noun)}


def _noun(kind: type, plain: Mapping[str, Any]) -> Any:
    """The noun of `kind` that `_plain` took apart."""
    kinds = get_type_hints(kind)
    return kind(**{n: _noun(kinds[n], value) if isinstance(value, dict) else value for n, value in plain.items()})
