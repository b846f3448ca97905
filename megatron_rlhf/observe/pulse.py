"""What this process is doing and how often it has moved on: the pulse that the watchdog feels. No torch.

A beat is an addition, so there is one between any two micro-batches, drawn tokens and blocks of a file. A process is
one rank and has one pulse.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Pulse:
    """The stage and step under way, the phase inside it, and counts that only grow."""

    stage: str = ""
    step: int = 0
    phase: str = ""
    phases: int = 0
    """Phases entered, the same on all ranks that are equally far."""
    beats: int = 0
    """Signs of life."""


PULSE = Pulse()
"""This process's."""


def beat() -> None:
    """It has moved on."""
    PULSE.beats += 1


def enter(phase: str) -> None:
    """It has come to `phase`."""
    PULSE.phase = phase
    PULSE.phases += 1
    PULSE.beats += 1


def at(stage: str, step: int) -> None:
    """It has come to step `step` of `stage`, counted from 0."""
    PULSE.stage, PULSE.step = stage, step
    PULSE.beats += 1
