"""Proves how ranks are shared out to nodes, and that what SLURM would refuse is refused in a sentence that helps.

Not proved here: that a SLURM takes the rest (tests/slurm).
"""

from __future__ import annotations

import pytest

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Slurm
from megatron_rlhf.submit.place import Place, place


@pytest.mark.parametrize(
    ("slurm", "world", "found"),
    [
        (Slurm(), 1024, Place(128, 8, 8)),
        (Slurm(), 4, Place(1, 4, 4)),
        (Slurm(nodes=2), 4, Place(2, 2, 2)),
        (Slurm(nodes=2, tasks=2, gpus=0), 4, Place(2, 2, 0)),
        (Slurm(tasks=4, gpus=8), 64, Place(16, 4, 8)),
    ],
)
def test_ranks_are_shared_out_evenly(slurm: Slurm, world: int, found: Place) -> None:
    assert place(slurm, world, 8) == found and found.world == world


@pytest.mark.parametrize(
    ("slurm", "world", "sentence"),
    [
        (
            Slurm(tasks=3),
            4,
            "make 4 ranks, which slurm.tasks=3 a node does not divide; write for example slurm.tasks=2",
        ),
        (Slurm(), 12, "make 12 ranks, which cluster.node=8 a node does not divide; write for example slurm.tasks=6"),
        (Slurm(nodes=3), 4, "which slurm.nodes=3 does not divide; write for example slurm.nodes=2"),
        (Slurm(nodes=3, tasks=2), 4, "is 6 ranks, the layouts make 4; write slurm.nodes=2"),
        (Slurm(time="tomorrow"), 4, "slurm.time is 'tomorrow', SLURM wants for example slurm.time=24:00:00"),
        (Slurm(container="docker:x"), 4, "write pyxis:IMAGE or apptainer:IMAGE"),
        (Slurm(container="pyxis:"), 4, "write pyxis:IMAGE or apptainer:IMAGE"),
        (Slurm(mounts="/a b:/c"), 4, "slurm.mounts is '/a b:/c'; blanks separate words"),
        (Slurm(setup="a\nb"), 4, "slurm.setup has a line break"),
        (Slurm(options="exclusive"), 4, "slurm.options has 'exclusive', which is no option"),
    ],
)
def test_what_cannot_run_is_refused_with_what_could(slurm: Slurm, world: int, sentence: str) -> None:
    with pytest.raises(BadInput) as refused:
        place(slurm, world, 8)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("time", ["90", "90:30", "4:00:00", "2-0", "2-12:30", "2-00:00:00"])
def test_walltimes_as_slurm_writes_them(time: str) -> None:
    assert place(Slurm(time=time), 8, 8).nodes == 1
