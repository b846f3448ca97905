"""A plan as a picture: memory by phase and cause, and one iteration in time. The one file of plan/ with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import write_bytes
from megatron_rlhf.plan.plan import Plan

_FORMATS = ("png", "svg", "pdf")
# Bars of many small causes cannot be told apart: what is below this share of the memory is one of them.
_SMALL = 0.015
_COLOURS = (
    *("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#ccb974", "#64b5cd", "#2f4b7c"),
    *("#a05195", "#d45087", "#7f7f7f", "#bcbd22"),
)


def draw(plan: Plan, file: Path) -> None:
    """Write `file`: the memory of the busiest GPU by phase, and the seconds of one iteration by phase and cause.

    Raises BadInput where its ending is none of png, svg and pdf.
    """
    kind = file.suffix.lstrip(".").lower()
    if kind not in _FORMATS:
        raise BadInput(f"--picture {file} ends in none of {', '.join(_FORMATS)}; write for example --picture plan.png")
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    above, below = figure.subplots(2, 1)
    _memory(above, plan)
    _timeline(below, plan)
    layout = plan.config.layout
    figure.suptitle(f"{plan.world} GPUs: policy {layout.policy}, generate {layout.generate}")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=110)
    write_bytes(file, picture.getvalue())


def _memory(axes: Axes, plan: Plan) -> None:
    names = [phase.name for phase in plan.memory]
    shown = [_merged(phase.causes, plan.capacity) for phase in plan.memory]
    left = [0.0] * len(names)
    for number, cause in enumerate(_causes(shown)):
        sizes = [causes.get(cause, 0.0) / 1e9 for causes in shown]
        axes.barh(names, sizes, left=left, label=cause, color=_COLOURS[number % len(_COLOURS)])
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    axes.axvline(plan.capacity / 1e9, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("GB on the busiest GPU; dashed: what there is")
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _timeline(axes: Axes, plan: Plan) -> None:
    names = [phase.name for phase in plan.phases]
    shown = [phase.seconds.by_cause() for phase in plan.phases]
    causes = _causes(shown)
    begun = 0.0
    for row, found in enumerate(shown):
        for number, cause in enumerate(causes):
            if taken := found.get(cause, 0.0):
                axes.barh(row, taken, left=begun, color=_COLOURS[number % len(_COLOURS)])
                begun += taken
    for number, cause in enumerate(causes):
        axes.barh(0, 0, color=_COLOURS[number % len(_COLOURS)], label=cause)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, begun)
    axes.set_xlabel("seconds of one iteration")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _merged(causes: Mapping[str, float], capacity: float) -> dict[str, float]:
    large = {name: size for name, size in causes.items() if size >= _SMALL * capacity}
    return {**large, "other": sum(causes.values()) - sum(large.values())}


def _causes(rows: list[dict[str, float]]) -> list[str]:
    """Every cause once, in the order in which they appear, the rest last."""
    found = dict.fromkeys(cause for row in rows for cause in row)
    return [cause for cause in found if cause != "other"] + (["other"] if "other" in found else [])
