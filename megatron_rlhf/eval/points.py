"""The points of a sweep as their files tell, and the curves of those that differ in their ranks alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlhf.eval.plots import Row, mapping, number

SWEEP, PLAN, MEASUREMENT = "sweep.json", "plan.json", "measurement.json"
WORK = {
    **{"ppo": "ppo.episodes", "pretrain": "pretrain.batch", "reward": "reward.batch"},
    **{"sft": "sft.batch", "rl_start": "rl_start.batch"},
}
"""The setting that says how much a step does, by the phase of its rows."""
_FREE = ("layout.", "cluster.", "checkpoint.", "reshard.", "observe.", "seed", "slurm.", "watchdog.")


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured point with its plan."""

    name: str
    changed: str
    """Its words that not all points share."""
    world: int
    measured: Row
    plan: Row

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return number(self.measured.get("seconds"))

    @property
    def work(self) -> float:
        """Episodes or rows of a step."""
        return number(self.settings.get(WORK.get(str(self.measured.get("phase")), "")))

    @property
    def ranks(self) -> str:
        """How many ranks it has, in words."""
        return f"{self.world} rank{'s' if self.world != 1 else ''}"

    @property
    def settings(self) -> Row:
        """Every setting of the run by its key."""
        return mapping(self.plan.get("settings"))

    @property
    def predicted(self) -> float | None:
        """Seconds of a step as foreseen, None where no machine was chosen to foresee them for."""
        value = self.plan.get("seconds")
        return float(value) if isinstance(value, int | float) and value > 0 else None

    @property
    def mfu(self) -> float | None:
        """Operations of the model over what the machines are rated at, None where no machine was chosen."""
        rated = number(self.plan.get("rated_flops")) * self.world * self.seconds
        return number(self.plan.get("flops")) / rated if rated and self.plan.get("flops") else None

    @property
    def gpu_seconds(self) -> float:
        """Seconds of all ranks together for one episode or row."""
        return self.seconds * self.world / self.work if self.work else 0.0

    @property
    def price(self) -> float | None:
        """What an episode or row costs, None where the cluster has no price."""
        each = number(mapping(self.plan.get("cluster")).get("price"))
        return self.gpu_seconds / 3600 * each if each else None

    def as_run(self, verb: str) -> dict[str, Any]:
        """The run as `megatron-rlhf plan calibrate` reads it."""
        clocks = {name: s for name, s in mapping(self.measured.get("seconds_by_phase")).items() if number(s) > 0}
        seconds = clocks if verb == "ppo" else self.seconds
        return {"name": self.name, "settings": self.measured.get("words"), "recipe": verb, "seconds": seconds}

    def alike(self, *, weak: bool) -> tuple[Any, ...]:
        """What points of one curve share: all that a step computes, or that for each rank."""
        work = {*WORK.values(), "ppo.minibatches"}
        rest = {key: str(v) for key, v in self.settings.items() if not key.startswith(_FREE) and key not in work}
        return (self.work / self.world if weak else self.work, *sorted(rest.items()))


@dataclass(frozen=True, slots=True)
class Curve:
    """Points that differ in their ranks alone, the fastest of each number of ranks, fewest ranks first."""

    weak: bool
    entries: tuple[Entry, ...]

    @property
    def label(self) -> str:
        """What stays equal along it."""
        first = self.entries[0]
        amount = first.work / first.world if self.weak else first.work
        unit = "episodes" if first.measured.get("phase") == "ppo" else "rows"
        return f"{amount:g} {unit} {'a rank' if self.weak else 'a step'}"

    def efficiency(self, entry: Entry) -> float:
        """1 where time falls with the ranks (strong) or stands (weak), measured from the first point."""
        first = self.entries[0]
        if self.weak:
            return first.seconds / entry.seconds
        return first.seconds * first.world / (entry.seconds * entry.world)


def gathered(folder: Path, points: Sequence[Row]) -> tuple[list[Entry], list[str]]:
    """The measured points, fewest ranks first, and a sentence for each that is missing."""
    shared = set.intersection(*(set(map(str, point.get("words", []))) for point in points))
    entries, missing = [], []
    for point in points:
        name, words = str(point.get("name")), [str(word) for word in point.get("words", [])]
        changed = " ".join(word for word in words if word not in shared)
        measured, plan = read(folder / name / MEASUREMENT), read(folder / name / PLAN)
        if number(measured.get("seconds")) > 0:
            entries.append(Entry(name, changed, int(number(point.get("world"))), measured, plan))
        else:
            why = "its measurement is damaged" if (folder / name / MEASUREMENT).exists() else "not measured"
            missing.append(f"{name} ({changed or 'the only point'}): {why}")
    return sorted(entries, key=lambda entry: (entry.world, entry.name)), missing


def found(entries: Sequence[Entry], *, weak: bool) -> list[Curve]:
    """The curves of at least two numbers of ranks."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        if entry.work:
            groups.setdefault(entry.alike(weak=weak), []).append(entry)
    curves = []
    for group in groups.values():
        fastest = {}
        for entry in sorted(group, key=lambda entry: -entry.seconds):
            fastest[entry.world] = entry
        if len(fastest) > 1:
            curves.append(Curve(weak, tuple(fastest[world] for world in sorted(fastest))))
    return curves


def read(path: Path) -> Mapping[str, Any]:
    """The object in a file, an empty one where there is none."""
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
