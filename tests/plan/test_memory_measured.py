"""Proves the bytes of a plan against live tensors, on every rank of 4: a role that learns, over models, layouts,
recompute choices and micro-batches. Weights, gradients, average and the buffer of sequence parallelism are exact.

A hook on every operation counts the storages alive. Not proved here: what a GPU's allocator adds, which is the plan's
stated allowance, and Transformer Engine's layers (plan/activations.py says why they keep the same).
"""

from __future__ import annotations

import pytest

from tests.helpers import measured_memory
from tests.helpers.grid import on_grid
from tests.helpers.measured_memory import CASES, QUICK, Case

EXACT = ("weights", "gradients", "average", "gather buffer")
WHOLE = ("weights", "gradients", "average", "optimizer", "gather buffer")


def holds(case: Case) -> None:
    """The measured and the planned bytes agree on this rank."""
    measured, planned = measured_memory.of_role(case)
    for cause in EXACT:
        assert measured[cause] == planned[cause], f"{case}, {cause}: {measured[cause]} and {planned[cause]} planned"
    # Adam counts the steps of each tensor in four bytes
    assert planned["optimizer"] == pytest.approx(measured["optimizer"], rel=0.005), case
    assert planned["activations"] == pytest.approx(measured["activations"], rel=0.1), case
    for moment, within in (("activations", 0.1), ("reading", 0.1)):
        causes = (*WHOLE, moment)
        ours, theirs = (sum(found[cause] for cause in causes) for found in (planned, measured))
        assert ours == pytest.approx(theirs, rel=within), f"{case}, all of {moment}"
    # gloo's threads hold what they sum a little longer or shorter
    assert planned["reading"] == pytest.approx(measured["reading"], rel=0.25), case


@on_grid(4)
def test_a_role_holds_what_is_planned() -> None:
    """A policy, a llama's policy, a value model: one case of each recompute choice."""
    assert [case.recompute for case in QUICK] == ["none", "full", "selective"]
    for case in QUICK:
        holds(case)


@pytest.mark.slow
@on_grid(4)
def test_every_role_layout_and_recompute() -> None:
    assert len(CASES) >= 12
    for case in CASES:
        holds(case)
