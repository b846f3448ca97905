"""What a cluster reaches of its rated speeds, fitted to measured runs, and how wrong it is on others. No torch.

A run is an entry of a JSON list, `{"settings": ["experiment=quickstart"], "recipe": "ppo", "seconds": {"score": 1}}`,
or the log.jsonl of a run whose settings are given beside it. Seconds go by the names of log.jsonl, or are one number.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Cluster, Config, Factors
from megatron_rlhf.config.world import needed
from megatron_rlhf.plan import times
from megatron_rlhf.plan.reshard import reshard

Seconds = Mapping[str, float]

CLOCKS = {
    "generate": ("reshard", "prefill", "decode"),
    "score": ("score",),
    "annotate": ("reference", "old log-probs", "values"),
    "value": ("train value", "update value"),
    "policy": ("train policy", "update policy"),
    "pretraining": ("train pretraining mix",),
}
"""The clocks of log.jsonl's seconds_by_phase, and the phases of a plan that each of them times."""
FITTED = ("gemm", "memory", "nvlink", "nic", "launch", "latency")
"""The factors that are fitted; waiting for the slowest GPU cannot be told from slower GPUs."""
_SHARES = ("gemm", "memory", "nvlink", "nic")
# How strongly a factor is held where the runs say nothing about it: a hundredth is as much as one run's error of 1 %.
_HELD = 0.02
_RECIPES = ("ppo", "pretrain", "sft", "rl_start", "reward")
_FIRST = 1
"""Rows of a log that are left out: the first one warms up."""


@dataclass(frozen=True)
class Measured:
    """A run: what was measured, by clock, and what a cluster is predicted to take for the same clocks."""

    name: str
    seconds: Seconds
    predict: Callable[[Cluster], Seconds]

    def logs(self, cluster: Cluster) -> list[float]:
        """Logarithm of predicted over measured, one a clock."""
        found = self.predict(cluster)
        return [math.log(found[clock] / taken) for clock, taken in self.seconds.items()]

    def error(self, cluster: Cluster) -> float:
        """The prediction of all clocks together, over what was measured, less 1."""
        found = self.predict(cluster)
        return math.fsum(found[clock] for clock in self.seconds) / math.fsum(self.seconds.values()) - 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """The factors, the runs they were fitted to with their errors, and the errors on the others."""

    factors: Factors
    fitted: Mapping[str, float]
    held_out: Mapping[str, float]

    def as_text(self) -> str:
        """The factors as the lines of a cluster file, then the errors."""
        lines = ["factors:", *(f"  {name}: {value:.4g}" for name, value in asdict(self.factors).items())]
        others = "not fitted to, so this wrong on other runs:"
        for words, errors in (("fitted to:", self.fitted), (others, self.held_out)):
            lines += ["", words] + [f"  {name:<40} {100 * error:+6.1f} %" for name, error in errors.items()]
            if errors:
                sizes = [abs(error) for error in errors.values()]
                lines.append(f"  {'median, largest':<40} {_percent(statistics.median(sizes))}, {_percent(max(sizes))}")
        return "\n".join(lines) + "\n"

    def as_json(self) -> str:
        """The same under names."""
        return json.dumps(asdict(self), indent=2) + "\n"


def calibrated(runs: Sequence[Measured], cluster: Cluster) -> Calibration:
    """The factors that fit every third run best, and the errors on the others. Raises BadInput for fewer than 3 runs.

    Least squares of the logarithms of predicted over measured; a factor that no run tells about stays where it is.
    """
    if len(runs) < 3:
        raise BadInput(f"{len(runs)} runs are too few to fit and to hold some out; give at least 3")
    taken = runs[::3]
    factors = fit(taken, cluster)
    found = replace(cluster, factors=factors)
    return Calibration(
        factors,
        {run.name: run.error(found) for run in taken},
        {run.name: run.error(found) for number, run in enumerate(runs) if number % 3},
    )


def fit(runs: Sequence[Measured], cluster: Cluster) -> Factors:
    """The factors under which `runs` are predicted best."""
    start = np.array([max(getattr(cluster.factors, name), 1e-9) for name in FITTED])

    def at(logs: Any) -> Factors:
        values = {name: float(value) for name, value in zip(FITTED, start * np.exp(logs), strict=True)}
        return replace(cluster.factors, **{n: min(1.0, v) if n in _SHARES else v for n, v in values.items()})

    def residuals(logs: Any) -> list[float]:
        there = replace(cluster, factors=at(logs))
        return [error for run in runs for error in run.logs(there)] + [_HELD * float(value) for value in logs]

    ends = zip(FITTED, start, strict=True)
    highest = [math.log(1 / value) + 1e-9 if name in _SHARES else 7.0 for name, value in ends]
    return at(least_squares(residuals, np.zeros(len(FITTED)), bounds=([-7.0] * len(FITTED), highest)).x)


def read(files: Sequence[str], settings: Sequence[str]) -> list[Measured]:
    """The runs of JSON lists and of log.jsonl files, whose settings are `settings`. Raises BadInput for any other."""
    found = []
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise BadInput(f"'{file}' is no file; name log.jsonl files, or JSON lists of runs")
        runs = _log(path, settings) if path.suffix == ".jsonl" else _list(path, settings)
        found += runs
    return found


def _list(path: Path, settings: Sequence[str]) -> list[Measured]:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        return [_measured(f"{path.name}[{number}]", run, settings) for number, run in enumerate(runs)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{path} is no list of runs ({type(error).__name__}: {error}); write for example "
            '[{"settings": ["layout=128gpu"], "recipe": "ppo", "seconds": {"score": 0.4}}]'
        ) from error


def _log(path: Path, settings: Sequence[str]) -> list[Measured]:
    """The median seconds of each recipe that the log has rows of."""
    taken: dict[str, list[dict[str, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("phase") == "ppo" and "seconds_by_phase" in row:
            clocks = row["seconds_by_phase"]
            taken.setdefault("ppo", []).append({name: clocks[name] for name in CLOCKS if clocks.get(name)})
        elif row.get("phase") in _RECIPES and row.get("tokens_per_second"):
            taken.setdefault(row["phase"], []).append({"step": row["tokens"] / row["tokens_per_second"]})
    if not taken:
        raise BadInput(f"{path} has no row of {', '.join(_RECIPES)} with its seconds; name the log.jsonl of a run")
    found = []
    for recipe, rows in taken.items():
        rows = rows[_FIRST:] or rows
        seconds = {name: statistics.median(row[name] for row in rows if name in row) for name in rows[0]}
        run = {"settings": [], "recipe": recipe, "seconds": seconds}
        found.append(_measured(f"{path.parent.name}/{path.name} {recipe}", run, settings))
    return found


def _measured(name: str, run: Mapping[str, Any], settings: Sequence[str]) -> Measured:
    recipe, seconds = run.get("recipe", "ppo"), run["seconds"]
    if recipe not in _RECIPES:
        raise BadInput(f"{name}: recipe '{recipe}' is unknown; write one of {', '.join(_RECIPES)}")
    config = load("plan", [*settings, *run.get("settings", ())])
    seconds = dict(seconds) if isinstance(seconds, Mapping) else {"step": float(seconds)}
    known = {*CLOCKS, "step"} if recipe == "ppo" else {"step"}
    for clock, value in seconds.items():
        if clock not in known or not value > 0:
            words = ", ".join(sorted(known))
            raise BadInput(f"{name}: '{clock}': {value} is no time of {recipe}; name seconds of {words}")
    return Measured(run.get("name", name), seconds, predictor(config, recipe))


def predictor(config: Config, recipe: str) -> Callable[[Cluster], Seconds]:
    """What a cluster is predicted to take for `config`, by clock; the run's own ranks count, not the cluster's."""
    world = needed(config.layout)
    if recipe != "ppo":
        return lambda cluster: {"step": _total(times.step(replace(config, cluster=cluster), world, recipe))}
    moved = reshard(config).summary

    def predict(cluster: Cluster) -> Seconds:
        at = replace(config, cluster=cluster)
        switch = times.switched(at, world, moved.node_time_s, moved.nvlink_time_s)
        phases = times.iteration(at, world, switch)
        by_clock = {name: _total([p for p in phases if p.name in parts]) for name, parts in CLOCKS.items()}
        return {**by_clock, "step": _total(phases)}

    return predict


def _total(phases: Sequence[times.Phase]) -> float:
    return math.fsum(phase.seconds.total for phase in phases)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
