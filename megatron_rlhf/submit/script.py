"""The batch script of one job: what is asked of SLURM, the site's own lines, and slurm/job.sh, which does the rest."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rlhf.config.schema import Slurm
from megatron_rlhf.submit.place import Place, options


def directory() -> Path:
    """The folder of job.sh and node.sh: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"


def render(verb: str, words: Sequence[str], slurm: Slurm, place: Place, out: Path) -> str:
    """The script that runs `verb` with `words` in the folder `out`, an absolute path."""
    command = " ".join(shlex.quote(word) for word in (str(directory() / "job.sh"), verb, f"out={out}", *words))
    lines = [
        "#!/usr/bin/env bash",
        f"# megatron-rlhf {verb}: {place.world} ranks, written by megatron-rlhf submit.",
        *(f"#SBATCH {option}" for option in _header(verb, slurm, place, out)),
        *_before(slurm),
        *(f"export {name}={shlex.quote(value)}" for name, value in _exports(slurm, place)),
        f"exec bash {command}",
    ]
    return "\n".join(lines) + "\n"


def _header(verb: str, slurm: Slurm, place: Place, out: Path) -> Iterator[str]:
    yield f"--job-name=mrlhf-{verb}"
    yield f"--nodes={place.nodes}"
    yield f"--ntasks-per-node={place.tasks}"
    if place.gpus:
        yield f"--gpus-per-node={place.gpus}"
    if slurm.cpus:
        yield f"--cpus-per-task={slurm.cpus}"
    yield f"--time={slurm.time}"
    for name in ("partition", "account", "qos"):
        if value := getattr(slurm, name):
            yield f"--{name}={value}"
    yield f"--signal=B:USR1@{slurm.signal}"
    yield "--requeue"
    yield "--open-mode=append"
    yield "--kill-on-invalid-dep=yes"
    yield f"--output={str(out).replace('%', '%%')}/slurm/{verb}-%j.log"
    yield from options(slurm)


def _before(slurm: Slurm) -> Iterator[str]:
    if slurm.modules:
        yield f"module load {' '.join(shlex.quote(name) for name in slurm.modules.split())}"
    if slurm.setup:
        yield slurm.setup


def _exports(slurm: Slurm, place: Place) -> Iterator[tuple[str, str]]:
    kind, _, image = slurm.container.partition(":")
    yield "MRLHF_ATTEMPTS", str(slurm.attempts)
    yield "MRLHF_PYTHON", slurm.python or ("python3" if kind else sys.executable)
    if kind == "pyxis":
        mounts = [f"--container-mounts={slurm.mounts}"] if slurm.mounts else []
        yield "MRLHF_SRUN", " ".join([f"--container-image={image}", *mounts])
    if kind == "apptainer":
        gpus, mounts = ["--nv"] if place.gpus else [], ["--bind", slurm.mounts] if slurm.mounts else []
        yield "MRLHF_CONTAINER", " ".join(["apptainer", "exec", *gpus, *mounts, image])
