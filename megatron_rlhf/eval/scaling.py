"""The report of a sweep: a table and pictures of weak and strong scaling, from the files that its points left.

A partial sweep gives the report of the points that are there, and names those that are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.eval import plots, points, scaling_plots
from megatron_rlhf.eval.plots import mapping, number
from megatron_rlhf.eval.points import SWEEP, Curve, Entry
from megatron_rlhf.eval.report import cell, table
from megatron_rlhf.observe.log import CONSOLE, write_json, write_text


def report(folder: Path) -> None:
    """Writes scaling.md, scaling.json, runs.json (for `plan calibrate`) and pictures into the folder of a sweep, each
    whole or not at all.

    Raises BadInput where the folder is of no sweep or holds no measurement.
    """
    facts = points.read(folder / SWEEP)
    planned = facts.get("points") if isinstance(facts.get("points"), list) else []
    if not planned:
        raise BadInput(f"{folder} holds no sweep; megatron-rlhf VERB --multirun out={folder} makes one")
    entries, missing = points.gathered(folder, planned)
    if not entries:
        raise BadInput(f"{folder}: none of the {len(planned)} points has a measurement yet; run the sweep again")
    curves = [*points.found(entries, weak=False), *points.found(entries, weak=True)]
    pictures = plots.painted(folder, scaling_plots.painters(entries, curves))
    write_json(folder / "scaling.json", as_json(entries, curves, missing))
    write_json(folder / "runs.json", [entry.as_run(str(facts.get("verb"))) for entry in entries])
    write_text(folder / "scaling.md", markdown(str(facts.get("verb")), entries, curves, missing, pictures))
    CONSOLE.print(f"{folder / 'scaling.md'}: {len(entries)} of {len(planned)} points")


def as_json(entries: Sequence[Entry], curves: Sequence[Curve], missing: Sequence[str]) -> dict[str, Any]:
    """The numbers of the report."""
    return {
        "points": [
            {
                **{"name": entry.name, "changed": entry.changed, "ranks": entry.world, "work": entry.work},
                **{key: entry.measured.get(key) for key in ("seconds", "seconds_low", "seconds_high", "steps")},
                **{"tokens_per_second": entry.measured.get("tokens_per_second"), "mfu": entry.mfu},
                **{"predicted_seconds": entry.predicted, "gpu_seconds_each": entry.gpu_seconds, "price": entry.price},
                "layouts": entry.plan.get("layouts"),
                "seconds_by_phase": entry.measured.get("seconds_by_phase"),
                "predicted_by_phase": entry.plan.get("seconds_by_phase"),
            }
            for entry in entries
        ],
        "curves": [
            {
                "kind": "weak" if curve.weak else "strong",
                "equal": curve.label,
                "points": [
                    {"ranks": e.world, "seconds": e.seconds, "efficiency": curve.efficiency(e)} for e in curve.entries
                ],
            }
            for curve in curves
        ],
        "missing": list(missing),
        "machine": entries[0].measured.get("machine"),
        "versions": entries[0].measured.get("versions"),
    }


def markdown(
    verb: str, entries: Sequence[Entry], curves: Sequence[Curve], missing: Sequence[str], pictures: Sequence[str]
) -> str:
    """The text of scaling.md; `pictures` lie beside it."""
    captions = {
        "scaling.png": "Strong and weak scaling: measured points, the fastest of each number of ranks, and the ideal",
        "phases.png": "Seconds of a step by phase",
        "prediction.png": "Predicted against measured seconds",
    }
    parts = [
        f"# Scaling of {verb}",
        "" if not missing else "**Missing points.**\n\n" + "\n".join(f"- {cell(text)}" for text in missing),
        _points(entries),
        *(_curve(curve) for curve in curves),
        *(f"![{caption}]({name})\n\n{caption}." for name, caption in captions.items() if name in pictures),
        _notes(entries, curves),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _points(entries: Sequence[Entry]) -> str:
    head = [
        "point",
        "ranks",
        "s a step",
        "tokens/s",
        "a rank",
        "predicted s",
        "off by",
        "MFU",
        "rank-s each",
        "price each",
    ]
    lines = []
    for entry in entries:
        speed = number(entry.measured.get("tokens_per_second"))
        foreseen = entry.predicted
        lines.append(
            [
                cell(entry.changed or entry.name),
                str(entry.world),
                f"{entry.seconds:.3g}",
                f"{speed:,.0f}",
                f"{speed / entry.world:,.0f}",
                "–" if foreseen is None else f"{foreseen:.3g}",
                "–" if foreseen is None else f"{100 * (foreseen / entry.seconds - 1):+.0f} %",
                "–" if entry.mfu is None else f"{100 * entry.mfu:.1f} %",
                f"{entry.gpu_seconds:.3g}" if entry.work else "–",
                "–" if entry.price is None else f"{entry.price:.4g}",
            ]
        )
    # a column in which nothing is known is left out
    told = [place for place in range(len(head)) if any(line[place] != "–" for line in lines)]
    return table([head[place] for place in told], [[line[place] for place in told] for line in lines])


def _curve(curve: Curve) -> str:
    title = f"{'Weak' if curve.weak else 'Strong'} scaling, {curve.label}"
    lines = [
        [str(entry.world), cell(entry.changed), f"{entry.seconds:.3g}", f"{100 * curve.efficiency(entry):.0f} %"]
        for entry in curve.entries
    ]
    return f"## {title}\n\n{table(['ranks', 'fastest point', 's a step', 'efficiency'], lines)}"


def _notes(entries: Sequence[Entry], curves: Sequence[Curve]) -> str:
    steps = sorted({int(number(entry.measured.get("steps"))) for entry in entries})
    machine = mapping(entries[0].measured.get("machine"))
    count = int(number(machine.get("processors")))
    most = max(entry.world for entry in entries)
    notes = [
        f"Medians of {' or '.join(map(str, steps))} steps a point, without the first step; *each*: an episode or row.",
        "Efficiency is measured from the point with the fewest ranks of a curve.",
    ]
    if not curves:
        notes.append("No two points differ in their ranks alone, so there is no curve.")
    if count:
        crowded = f", fewer than the {most} ranks of the largest point" if count < most else ""
        notes.append(f"The machine of the first rank has {count} processors{crowded}.")
    if all(entry.predicted is None for entry in entries):
        notes.append("Nothing is predicted and there is no MFU: the sweep names no `cluster`, whose speeds both need.")
    return "\n".join(f"- {note}" for note in notes)
