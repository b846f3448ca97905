"""The report of a run: report.json for programs, report.md and pictures for people, with what it does not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.eval import plots
from megatron_rlhf.eval.plots import Row, finite, mapping, number
from megatron_rlhf.observe.log import write_json, write_text

SAMPLES = 5
"""Responses shown side by side."""
_WHO = {"sft": "SFT", "ppo": "PPO-ptx", "human": "human"}
_CAPTIONS = {
    "gold.png": "The components of the gold score",
    "ppo.png": "PPO: scores, frontier, response length, drift",
    "losses.png": "Losses by phase",
    "time.png": "Time by stage and phase",
}
_LIMITS = """## What this does not show

- **The judge is a program.** The gold preference that ranked the comparison data also judges the result. It counts
  sentiment, a question asked back, content words, words taken up from the prompt, offensiveness, repetition, non-words,
  a missing end and very short responses. It reads no meaning: a fluent reply that is wrong, odd or beside the point can
  score well.
- **Asking a question is the easy part of it.** A policy can earn a good share of the gain by ending in a question;
  the table of components says how much of it came that way.
- **A win over the human responses is the judge's blind spot, not quality.** People did not write to please this
  program; a policy trained on its rankings did.
- **Reward hacking shows in the components**, if at all: a gain in one component, a flat or falling rest, or a gold
  score that falls while the reward model's score rises, is over-optimisation.
- **The model is tiny** and knows little English; its text is to be compared with the SFT baseline's, not with that of a
  large model. Nothing here says how the method does at scale.
- **One corpus of chit-chat, one seed.** The interval is over prompts; it holds neither the spread over training seeds
  nor other kinds of prompts, and no alignment tax is measured here.
"""


def write(out: Path, report: Mapping[str, Any], rows: Sequence[Row], samples: Sequence[Row]) -> None:
    """Writes report.json, plots/*.png and report.md into `out`, each whole or not at all; report.md comes last.

    Keys that `report`, the log's `rows` or the `samples` ({prompt, sft, ppo, human}) lack leave their part out.
    """
    write_json(out / "report.json", dict(report))
    pictures = plots.draw(out / "plots", report, rows)
    write_text(out / "report.md", markdown(report, rows, samples, pictures))


def markdown(report: Row, rows: Sequence[Row], samples: Sequence[Row], pictures: Sequence[str]) -> str:
    """The text of report.md; `pictures` names the files that stand in plots/."""
    evaluation = mapping(report.get("evaluation"))
    top = [f"![Win rates with 95 % intervals](plots/{name})" for name in pictures if name == "win_rate.png"]
    parts = [
        "# PPO-ptx against its SFT baseline",
        headline(evaluation),
        *top,
        _wins(evaluation),
        _gold(evaluation),
        _samples(samples),
        _checks(report),
        _layouts(mapping(report.get("layouts"))),
        *(f"## {text}\n\n![{text}](plots/{name})" for name, text in _CAPTIONS.items() if name in pictures),
        _seconds(mapping(report.get("seconds")), plots.ppo_seconds(rows)),
        _LIMITS.rstrip(),
        _origin(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(evaluation: Row) -> str:
    """The result in a sentence with its interval, which also says when nothing is shown."""
    rate = mapping(mapping(evaluation.get("win_rate")).get("ppo_vs_sft"))
    if not finite(rate, "mean"):
        return "**No win rate of PPO-ptx over SFT was measured.**"
    mean, low, high = (number(rate.get(key)) for key in ("mean", "low", "high"))
    verdict = ""
    if high < 0.5:
        verdict = " The whole interval is below 50 %: PPO-ptx made the responses worse by this judge."
    elif low <= 0.5:
        verdict = " The interval holds 50 %: no difference is shown."
    weights = evaluation.get("weights")
    named = {"average": "the averaged weights", "live": "the live weights"}.get(str(weights), weights)
    return (
        f"**The gold preference prefers PPO-ptx's response to the SFT baseline's on {100 * mean:.1f} % of "
        f"{rate.get('n', '?')} held-out prompts (95 % interval {100 * low:.1f}–{100 * high:.1f} %).**{verdict}"
        + (f" Evaluated: {named}." if weights else "")
    )


def _wins(evaluation: Row) -> str:
    """The three win rates as a table."""
    rates = mapping(evaluation.get("win_rate"))
    lines = [
        [
            name.replace("_vs_", " over ").replace("sft", "SFT").replace("ppo", "PPO-ptx"),
            *(f"{100 * number(mapping(rate).get(key)):.1f} %" for key in ("mean", "low", "high")),
            str(mapping(rate).get("n", "")),
        ]
        for name, rate in rates.items()
    ]
    return _section("Win rates", table(["", "win rate", "low", "high", "prompts"], lines))


def _gold(evaluation: Row) -> str:
    """The gold components of SFT, PPO and human, with what PPO gained in each."""
    gold = {who: mapping(values) for who, values in mapping(evaluation.get("gold")).items()}
    names = plots.unique(name for values in gold.values() for name in values)
    who = [key for key in _WHO if key in gold] + [key for key in gold if key not in _WHO]
    compared = "sft" in gold and "ppo" in gold
    lines = []
    for name in names:
        gain = [f"{number(gold['ppo'].get(name)) - number(gold['sft'].get(name)):+.3f}"] if compared else []
        lines.append([name.replace("_", " "), *(_number(gold[key].get(name)) for key in who), *gain])
    head = ["component", *(_WHO.get(key, key) for key in who), *(["PPO-ptx − SFT"] if compared else [])]
    text = table(head, lines)
    if compared and text:
        text += "\n\n" + _gain(gold["sft"], gold["ppo"])
    return _section("Gold score by component (means)", text)


def _gain(sft: Row, ppo: Row) -> str:
    """Where the gain in gold score comes from, largest part first."""
    gains = {name: number(ppo.get(name)) - number(sft.get(name)) for name in ppo if name != "total"}
    total = number(ppo["total"]) - number(sft.get("total")) if "total" in ppo else sum(gains.values())
    ordered = sorted(gains.items(), key=lambda pair: -abs(pair[1]))
    told = ", ".join(f"{name.replace('_', ' ')} {gain:+.2f}" for name, gain in ordered if abs(gain) >= 0.005)
    return f"Of the change of {total:+.2f} in the mean gold score: {told}." if told else "No component changed."


def _samples(samples: Sequence[Row]) -> str:
    """The first five prompts with their responses side by side."""
    lines = [[cell(sample.get(key, "")) for key in ("prompt", *_WHO)] for sample in samples[:SAMPLES]]
    return _section("Responses side by side", table(["prompt", *_WHO.values()], lines))


def _checks(report: Row) -> str:
    """Every other number of the report, by its dotted name."""
    lines = []
    for room in ("reward", "ppo", "evaluation"):
        leaves = _leaves(room, mapping(report.get(room)))
        lines += [[f"`{name}`", _number(value)] for name, value in leaves if not name.startswith(_SHOWN)]
    return _section("Measured", table(["", "value"], lines))


_SHOWN = ("evaluation.win_rate.", "evaluation.gold.")


def _layouts(layouts: Row) -> str:
    """The layout of each role."""
    return _section("Layouts", table(["role", "layout"], [[role, f"`{words}`"] for role, words in layouts.items()]))


def _seconds(stages: Row, inside: Row) -> str:
    """Seconds by stage, and by phase within PPO."""
    text = table(["stage", "seconds"], [[name, f"{number(value):,.1f}"] for name, value in stages.items()])
    phases = table(["phase of PPO", "seconds"], [[name, f"{number(value):,.1f}"] for name, value in inside.items()])
    return _section("Time", "\n\n".join(part for part in (text, phases) if part))


def _origin(report: Row) -> str:
    """Seed, memory and versions: what the numbers were made with."""
    lines = [["seed", str(report["seed"])]] if "seed" in report else []
    if finite(report, "memory_bytes"):
        lines.append(["peak memory", f"{report['memory_bytes'] / 2**30:.2f} GiB"])
    lines += [[f"`{name}`", str(version)] for name, version in mapping(report.get("versions")).items()]
    return _section("Made with", table(["", ""], lines))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, nothing where there are no lines."""
    if not lines:
        return ""
    rule = "|".join("---" for _ in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def cell(text: object) -> str:
    """Text that stays in its table cell and is shown as it is: Markdown's and HTML's signs are escaped."""
    shown = str(text).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\|*_`[]~":
        shown = shown.replace(sign, f"&#{ord(sign)};")
    return "<br>".join(shown.splitlines())


def _number(value: object) -> str:
    """A number as people read it, other values as they are."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "–" if value is None else str(value)
    if value == 0:
        return "0"
    return f"{value:.3e}" if abs(value) < 1e-3 else f"{value:.8g}" if 0.99 < value < 1.01 else f"{value:.3f}"


def _leaves(name: str, value: object) -> list[tuple[str, Any]]:
    """(dotted name, value) of everything that is no mapping."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]
