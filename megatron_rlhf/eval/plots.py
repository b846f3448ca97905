"""Pictures of a run, from its log rows and its report: PNGs in colours that colour-blind readers can tell apart.

A figure whose rows are missing is not drawn. Figures are made without pyplot, so that no window or global state exists.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_rlhf.observe.log import write_bytes

Row = Mapping[str, Any]
_T = TypeVar("_T")

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#767676"
"""Okabe and Ito's palette; each line also has its own marker or dash."""
_SECONDS = "seconds_by_phase."
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}
_WINS = {
    "ppo_vs_sft": ("PPO-ptx over SFT", BLUE),
    "ppo_vs_human": ("PPO-ptx over human", GREY),
    "sft_vs_human": ("SFT over human", GREY),
}
_WHO = {"human": ("human", GREY, "D"), "sft": ("SFT", ORANGE, "s"), "ppo": ("PPO-ptx", BLUE, "o")}


def draw(folder: Path, report: Row, rows: Sequence[Row]) -> list[str]:
    """Writes every picture there is data for into `folder` and returns their names."""
    evaluation = mapping(report.get("evaluation"))
    painters: dict[str, Callable[[], Figure | None]] = {
        "win_rate.png": lambda: win_rates(mapping(evaluation.get("win_rate"))),
        "gold.png": lambda: components(mapping(evaluation.get("gold"))),
        "ppo.png": lambda: ppo(rows),
        "losses.png": lambda: losses(rows),
        "time.png": lambda: seconds(mapping(report.get("seconds")), rows),
    }
    return painted(folder, painters)


def painted(folder: Path, painters: Mapping[str, Callable[[], Figure | None]]) -> list[str]:
    """Writes the figures that there are into `folder` as PNG, in the package's style, and returns their names."""
    drawn = []
    with matplotlib.rc_context(_STYLE):
        for name, painter in painters.items():
            figure = painter()
            if figure is not None:
                picture = io.BytesIO()
                figure.savefig(picture, format="png")
                write_bytes(folder / name, picture.getvalue())
                drawn.append(name)
    return drawn


def win_rates(rates: Row) -> Figure | None:
    """Win rates with their 95 % intervals as horizontal bars, and the line where both are equally good."""
    found = [(label, colour, rates[name]) for name, (label, colour) in _WINS.items() if mapping(rates.get(name))]
    if not found:
        return None
    figure = Figure(figsize=(7.2, 0.9 + 0.62 * len(found)))
    axes = figure.subplots()
    for place, (_label, colour, rate) in enumerate(found):
        mean, low, high = (100 * number(rate.get(key)) for key in ("mean", "low", "high"))
        axes.barh(place, mean, height=0.58, color=colour, alpha=0.9 if colour == BLUE else 0.55)
        errors = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.errorbar(mean, place, xerr=errors, color="black", capsize=5, linewidth=1.6)
        text = f"{mean:.1f} % [{low:.1f}, {high:.1f}]"
        axes.text(102, place, text, va="center", fontweight="bold" if colour == BLUE else "normal")
    axes.axvline(50, color="black", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 100), xlabel="win rate by the gold preference, %; bars: 95 % interval; dashed: no difference")
    axes.set_yticks(range(len(found)), [label for label, _colour, _rate in found])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    n = found[0][2].get("n")
    axes.set_title("Win rate" + (f" on {n} held-out prompts" if n else ""))
    return figure


def components(gold: Row) -> Figure | None:
    """Each component of the gold score for SFT, PPO and human as dots on one line: where the gain comes from."""
    found = {who: values for who in _WHO if (values := mapping(gold.get(who)))}
    names = [name for name in unique(name for values in found.values() for name in values)]
    if not names:
        return None
    figure = Figure(figsize=(7.2, 1.2 + 0.36 * len(names)))
    axes = figure.subplots()
    for place, name in enumerate(names):
        ends = [number(values.get(name)) for values in found.values()]
        axes.plot([min(ends), max(ends)], [place, place], color="#C8C8C8", linewidth=3, zorder=1)
    for who, values in found.items():
        label, colour, marker = _WHO[who]
        points = [number(values.get(name)) for name in names]
        axes.scatter(points, range(len(names)), color=colour, marker=marker, s=46, label=label, zorder=2)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="mean contribution to the gold score")
    axes.set_title("What the gold score is made of")
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.99), ncol=3, columnspacing=1, handletextpad=0.2)
    return figure


def ppo(rows: Sequence[Row]) -> Figure | None:
    """Four panels of PPO: scores by iteration, the frontier of score against sqrt(KL), response length, drift."""
    found = [row for row in rows if row.get("phase") == "ppo"]
    if not found:
        return None
    figure = Figure(figsize=(10, 7), layout="constrained")
    (scores, frontier), (length, drift) = figure.subplots(2, 2)
    for name, label, colour, marker in _SCORES:
        steps, values = series(found, name)
        scores.plot(steps, values, color=colour, marker=marker, markersize=3.5, label=label) if steps else None
    scores.set(xlabel="iteration", ylabel="mean over the episodes")
    scores.set_title("Score and gold score")
    _frontier(frontier, found)
    steps, values = series(found, "response_length")
    length.plot(steps, values, color=BLUE, marker="o", markersize=3.5)
    length.set(xlabel="iteration", ylabel="tokens, end token included")
    length.set_ylim(0, 1.15 * max([1.0, *values]))
    length.set_title("Response length")
    _drift(drift, found)
    for axes in (scores, frontier):
        _legend(axes)
    return figure


_SCORES = (
    ("gold", "gold score (not seen in training)", ORANGE, "s"),
    ("score", "score of the reward model", BLUE, "o"),
    ("reward", "reward: score minus KL penalty", GREEN, "^"),
)


def _frontier(axes: Axes, rows: Sequence[Row]) -> None:
    """Score and gold score against the square root of the KL spent, in which Gao et al. 2022 find the law."""
    for name, label, colour, marker in _SCORES[:2]:
        shared = [row for row in rows if finite(row, "kl") and finite(row, name)]
        points = [(math.sqrt(max(0.0, row["kl"])), row[name]) for row in shared]
        if points:
            kls, values = zip(*points, strict=True)
            axes.plot(kls, values, color=colour, linewidth=0.8, alpha=0.45)
            axes.scatter(kls, values, color=colour, marker=marker, s=16, label=label)
    axes.set(xlabel="square root of KL to the reference, nats a response", ylabel="mean over the episodes")
    axes.set_title("Frontier: score gained against KL spent")


def _drift(axes: Axes, rows: Sequence[Row]) -> None:
    """Drift minus 1 by iteration on a logarithmic axis; exact zeros are drawn on its floor."""
    steps, values = series(rows, "drift")
    floor = 1e-9
    axes.plot(steps, [max(floor, value - 1) for value in values], color=VERMILION, marker="o", markersize=3.5)
    axes.axhline(1e-4, color="black", linestyle="--", linewidth=1)
    axes.text(0.99, 1.3e-4, "limit 1.0001", ha="right", va="bottom", fontsize=9, transform=axes.get_yaxis_transform())
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, max([1e-3, *(2 * (value - 1) for value in values)]))
    axes.set(xlabel="iteration", ylabel="mean exp|Δ log-prob| − 1")
    axes.set_title("Drift between generating and training")


def losses(rows: Sequence[Row]) -> Figure | None:
    """One panel a phase and loss: the training loss, its running mean and the validation points."""
    panels = unique(
        (str(row.get("phase")), key.removeprefix("valid."))
        for row in rows
        for key in row
        if key.removeprefix("valid.").startswith("loss.") and finite(row, key)
    )
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (phase, key) in zip(grid, panels, strict=False):
        _loss(axes, [row for row in rows if row.get("phase") == phase], key)
        axes.set_title(f"{phase.replace('_', ' ')}: {key.removeprefix('loss.')} loss")
        axes.set(xlabel="iteration" if phase == "ppo" else "step")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def _loss(axes: Axes, rows: Sequence[Row], key: str) -> None:
    """One loss: thin as logged, thick its exponential mean where there are many rows, points where validated."""
    steps, values = series(rows, key)
    many = len(values) >= 60
    if values:
        width = {"linewidth": 0.8, "alpha": 0.35} if many else {"linewidth": 1.6, "marker": "o", "markersize": 3}
        axes.plot(steps, values, color=BLUE, label=None if many else "training", **width)
    if many:
        axes.plot(steps, smoothed(values), color=BLUE, linewidth=1.8, label="training, running mean")
    steps, values = series(rows, f"valid.{key}")
    if values:
        axes.plot(steps, values, color=VERMILION, linestyle="--", marker="D", markersize=4.5, label="validation")
        _legend(axes)


def seconds(stages: Row, rows: Sequence[Row]) -> Figure | None:
    """Seconds by stage of the run, and by phase within PPO, as bars with their numbers."""
    whole = {name: number(value) for name, value in stages.items() if name != "total" and number(value) > 0}
    inside = ppo_seconds(rows)
    parts = [("Seconds by stage", whole, BLUE), ("Seconds within PPO, by phase", inside, GREEN)]
    parts = [part for part in parts if part[1]]
    if not parts:
        return None
    most = max(len(bars) for _title, bars, _colour in parts)
    figure = Figure(figsize=(5.2 * len(parts), 0.9 + 0.36 * most), layout="constrained")
    for axes, (title, bars, colour) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        drawn = axes.barh(list(bars), list(bars.values()), color=colour, height=0.62)
        total = sum(bars.values())
        axes.bar_label(drawn, [f"{value:,.0f} s  ({value / total:.0%})" for value in bars.values()], padding=4)
        axes.set_xlim(0, 1.35 * max(bars.values()))
        axes.set_ylim(most - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_title(f"{title} ({total:,.0f} s)")
    return figure


def ppo_seconds(rows: Iterable[Row]) -> dict[str, float]:
    """Seconds by phase over all PPO iterations, from `seconds_by_phase` or from its flat `seconds_by_phase.NAME`."""
    found: dict[str, float] = {}
    for row in rows:
        if row.get("phase") == "ppo":
            flat = {key.removeprefix(_SECONDS): row[key] for key in row if key.startswith(_SECONDS)}
            for name, value in {**mapping(row.get("seconds_by_phase")), **flat}.items():
                found[name] = found.get(name, 0.0) + number(value)
    return found


def series(rows: Iterable[Row], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that hold a finite `name`; a row without `step` counts its place among them."""
    found = [row for row in rows if finite(row, name)]
    return [number(row.get("step", place)) for place, row in enumerate(found)], [number(row[name]) for row in found]


def smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """The exponential running mean of `values`, corrected for its start (Adam's bias correction)."""
    mean, found = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = decay * mean + (1 - decay) * value
        found.append(mean / (1 - decay**count))
    return found


def finite(row: Row, name: str) -> bool:
    """Whether `row` holds a finite number under `name`."""
    value = row.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: object) -> float:
    """`value` as a float, 0 where it is missing or not finite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def unique(items: Iterable[_T]) -> list[_T]:
    """The items without repeats, in the order they first came."""
    return list(dict.fromkeys(items))


def mapping(value: object) -> Row:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _legend(axes: Axes) -> None:
    """A legend where the axes have anything to name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
