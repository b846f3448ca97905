"""Proves that docs/scaling.md is what the planner writes, and that its sums are those of its rows.

Not proved here: that a run of that size takes what the page says; none has been made.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlhf.config.load import load
from megatron_rlhf.plan import scaling

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its names."""
    lines = page.partition(f"## {heading}")[2].partition("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@pytest.mark.slow
def test_the_page_is_what_the_planner_writes() -> None:
    """Write it anew with `megatron-rlhf plan scaling > docs/scaling.md`."""
    assert scaling.page() == PAGE.read_text(encoding="utf-8")


def test_the_largest_of_the_page_is_what_the_planner_finds() -> None:
    """So is all that needs no search: rates, published runs, the paper's compute."""
    page = PAGE.read_text(encoding="utf-8")
    best, config = scaling.searched(1024).plans[0], load("plan", ["cluster=h100"])
    assert [row[5] for row in rows(page, "Seconds, phase by phase")] == [
        *(f"{phase.seconds.total:.2f}" for phase in best.phases),
        f"{best.bill.seconds:.2f}",
    ]
    assert [row[3] for row in rows(page, "Memory, phase by phase")] == [f"{p.total / 1e9:.1f}" for p in best.memory]
    for part in (scaling.formulas(config), scaling.published(), scaling.compute(config)):
        assert "\n".join(part) in page


def test_phases_add_up() -> None:
    """To the last digit that is printed, on each of the three sizes."""
    *phases, together = rows(PAGE.read_text(encoding="utf-8"), "Seconds, phase by phase")
    assert len(phases) == 12
    for column in (3, 4, 5):
        assert abs(sum(float(row[column]) for row in phases) - float(together[column])) < 0.07


def test_every_phase_names_a_formula() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = {row[1].strip("()") for row in rows(page, "Seconds, phase by phase")[:-1]}
    assert named <= {line.partition(".")[0] for line in page.splitlines() if line[:2].strip(".").isdigit()}
    assert named == {"1", "2", "3", "4", "5", "6"}


def test_the_papers_compute_is_on_the_page() -> None:
    found = rows(PAGE.read_text(encoding="utf-8"), "The paper's compute")
    assert [row[0] for row in found] == ["pretraining", "sft", "ppo"]
    assert all(abs(float(row[3].split()[0])) <= 4 for row in found)


def test_published_runs_are_on_the_page() -> None:
    """19 within 9 %, and those of another engine with their error."""
    found = rows(PAGE.read_text(encoding="utf-8"), "Against what others measured")
    errors = {row[0]: abs(float(row[4].split()[0])) for row in found}
    assert len(errors) == 22
    assert sum(error <= 9 for error in errors.values()) == 19
