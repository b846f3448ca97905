"""Pictures of a sweep: strong and weak scaling, seconds by phase, predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_rlhf.eval.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, mapping, number, unique
from megatron_rlhf.eval.points import Curve, Entry

_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY, "#56B4E9", "#000000")
_HATCHES = ("", "//", "..", "\\\\", "xx", "", "--", "")


def painters(entries: Sequence[Entry], curves: Sequence[Curve]) -> Mapping[str, Callable[[], Figure | None]]:
    """A painter for each picture's name; one without data paints none."""
    return {
        "scaling.png": lambda: scaling(curves),
        "phases.png": lambda: phases(entries),
        "prediction.png": lambda: prediction(entries),
    }


def scaling(curves: Sequence[Curve]) -> Figure | None:
    """Speed-up over ranks on the left (strong), seconds a step on the right (weak), each with its ideal."""
    kinds = [kind for kind in (False, True) if any(curve.weak == kind for curve in curves)]
    if not kinds:
        return None
    figure = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    for axes, weak in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        mine = [curve for curve in curves if curve.weak == weak]
        for curve, colour, marker in zip(mine, _COLOURS * len(mine), "osD^vP*X" * len(mine), strict=False):
            ranks = [entry.world for entry in curve.entries]
            seconds = [entry.seconds for entry in curve.entries]
            values = seconds if weak else [seconds[0] / each for each in seconds]
            ideal = [seconds[0]] * len(ranks) if weak else [each / ranks[0] for each in ranks]
            axes.plot(ranks, values, color=colour, marker=marker, label=curve.label)
            axes.plot(ranks, ideal, color=colour, linestyle="--", linewidth=1)
        _ranks(axes, sorted({entry.world for curve in mine for entry in curve.entries}))
        if weak:
            axes.set_ylim(0, 1.15 * max(entry.seconds for curve in mine for entry in curve.entries))
        else:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set(ylabel="seconds a step" if weak else "speed-up over the fewest ranks")
        axes.set_title(f"{'Weak' if weak else 'Strong'} scaling (dashed: ideal)")
        axes.legend(loc="best")
    return figure


def phases(entries: Sequence[Entry]) -> Figure | None:
    """Seconds of a step by phase as a stacked bar a point; what no phase holds is the rest."""
    shares = [dict(mapping(entry.measured.get("seconds_by_phase"))) for entry in entries]
    names = unique(name for share in shares for name in share)
    if not names:
        return None
    rests = [
        max(0.0, entry.seconds - sum(map(number, share.values()))) for entry, share in zip(entries, shares, strict=True)
    ]
    figure = Figure(figsize=(7.6, 1.6 + 0.42 * len(entries)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(entries)
    for place, name in enumerate([*names, "rest"]):
        widths = rests if name == "rest" else [number(share.get(name)) for share in shares]
        colour, hatch = _COLOURS[place % len(_COLOURS)], _HATCHES[place % len(_HATCHES)]
        bars = range(len(entries))
        axes.barh(bars, widths, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.66, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(entries)), [f"{_short(entry)}\n{entry.ranks}" for entry in entries], fontsize=8)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel="seconds a step")
    axes.set_title("Time by phase")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25 - 0.4 / len(entries)), ncol=4)
    return figure


def prediction(entries: Sequence[Entry]) -> Figure | None:
    """Predicted over measured seconds of each point on equal logarithmic axes; the band is 25 %."""
    found = [(entry, entry.predicted) for entry in entries if entry.predicted is not None]
    if not found:
        return None
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    for (entry, foreseen), colour, marker in zip(found, _COLOURS * len(found), "osD^vP*X" * len(found), strict=False):
        axes.plot(entry.seconds, foreseen, color=colour, marker=marker, linestyle="", label=_short(entry))
    values = [value for entry, foreseen in found for value in (entry.seconds, foreseen)]
    low, high = 0.7 * min(values), 1.4 * max(values)
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    axes.fill_between([low, high], [0.75 * low, 0.75 * high], [1.25 * low, 1.25 * high], color=GREY, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.set(xlabel="measured seconds a step", ylabel="predicted seconds a step")
    axes.set_title("Predicted against measured (band: 25 %)")
    axes.legend(loc="best", fontsize=8)
    return figure


def _ranks(axes: Axes, ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(each) for each in ranks])
    axes.minorticks_off()
    axes.set(xlabel="ranks")


def _short(entry: Entry) -> str:
    """The point's own words, without the keys of those that speak for themselves."""
    return entry.changed.replace("scaling=", "") or entry.name
