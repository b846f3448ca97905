"""How the ranks of a run are shared out to nodes. Pure, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Slurm

_TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}")
"""Minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on, as sbatch reads them."""
CONTAINERS = ("pyxis", "apptainer")


@dataclass(frozen=True, slots=True)
class Place:
    """Nodes, and what each of them gives."""

    nodes: int
    tasks: int
    """Ranks a node."""
    gpus: int
    """GPUs a node."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.tasks


def place(slurm: Slurm, world: int, node: int) -> Place:
    """Where `world` ranks go on machines of `node` GPUs, as `slurm` asks.

    Raises BadInput where they do not share out evenly and for settings that SLURM would refuse.
    """
    _check(slurm)
    if slurm.nodes and not slurm.tasks and world % slurm.nodes:
        raise BadInput(
            f"the layouts make {world} ranks, which slurm.nodes={slurm.nodes} does not divide; write for example "
            f"slurm.nodes={_divisor(world, slurm.nodes)}"
        )
    tasks = slurm.tasks or (world // slurm.nodes if slurm.nodes else min(world, node))
    if world % tasks:
        key = "slurm.tasks" if slurm.tasks else "cluster.node"
        raise BadInput(
            f"the layouts make {world} ranks, which {key}={tasks} a node does not divide; write for example "
            f"slurm.tasks={_divisor(world, tasks)}"
        )
    if slurm.nodes and slurm.nodes * tasks != world:
        raise BadInput(
            f"slurm.nodes={slurm.nodes} with slurm.tasks={tasks} is {slurm.nodes * tasks} ranks, the layouts make "
            f"{world}; write slurm.nodes={world // tasks}"
        )
    return Place(world // tasks, tasks, tasks if slurm.gpus < 0 else slurm.gpus)


def _check(slurm: Slurm) -> None:
    if not _TIME.fullmatch(slurm.time):
        raise BadInput(f"slurm.time is '{slurm.time}', SLURM wants for example slurm.time=24:00:00 or 2-00:00:00")
    kind, _, image = slurm.container.partition(":")
    if slurm.container and (kind not in CONTAINERS or not image):
        raise BadInput(
            f"slurm.container is '{slurm.container}'; write pyxis:IMAGE or apptainer:IMAGE, for example "
            "slurm.container=apptainer:/images/megatron-rlhf.sif"
        )
    for key, text in (("container", slurm.container), ("mounts", slurm.mounts), ("python", slurm.python)):
        if len(text.split()) > 1:
            raise BadInput(f"slurm.{key} is '{text}'; blanks separate words there, so name a path without them")
    for key in ("partition", "account", "qos", "modules", "setup", "options", "time"):
        if "\n" in getattr(slurm, key):
            raise BadInput(f"slurm.{key} has a line break; it is one line, for example slurm.{key}=a")
    for option in options(slurm):
        if not option.startswith("-"):
            raise BadInput(f"slurm.options has '{option}', which is no option; write for example --exclusive; --mem=0")


def options(slurm: Slurm) -> list[str]:
    """The further options of sbatch."""
    return [option.strip() for option in slurm.options.split(";") if option.strip()]


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most`."""
    return next(size for size in range(min(at_most, number), 0, -1) if number % size == 0)
