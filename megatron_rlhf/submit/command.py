"""The verb `submit`: what will run is shown and asked about, then the jobs are in SLURM's queue."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Protocol

from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput, check
from megatron_rlhf.config.schema import Config
from megatron_rlhf.config.world import needed
from megatron_rlhf.observe.log import write_text
from megatron_rlhf.plan import reshard
from megatron_rlhf.submit.place import Place, place
from megatron_rlhf.submit.script import render

VERBS = ("quickstart", "pretrain", "sft", "rank", "reward", "ppo", "sample", "evaluate")
PIPELINE: dict[str, tuple[str, ...]] = {"sft": (), "reward": ("sft",), "ppo": ("rl_start", "reward")}
"""The verbs of `pipeline`, each after the one before has ended well, with the stages of those before that it reads."""
FLAGS = ("--yes", "--dry-run")
_SWITCHING = ("ppo", "quickstart")
"""Verbs whose policy switches between two layouts."""


class Ready(Protocol):
    """Looks at what a verb will read."""

    def __call__(self, verb: str, config: Config, *, made: tuple[str, ...] = ()) -> None:
        """Raises BadInput for what is not there and is not among the stages in `made`."""


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for: the verbs in their order, their words, and what these say."""

    verbs: tuple[str, ...]
    words: tuple[str, ...]
    config: Config
    place: Place
    out: Path

    def scripts(self) -> list[tuple[str, str]]:
        """Each verb with its batch script."""
        return [(verb, render(verb, self.words, self.config.slurm, self.place, self.out)) for verb in self.verbs]


def submit(names: Sequence[str], settings: Sequence[str], flags: Sequence[str], ready: Ready) -> str:
    """Submit the verb or `pipeline` that `names` holds, with `settings`; what to tell the person.

    With --dry-run it is the script and nothing is submitted. Raises BadInput, with nothing submitted, for what would
    not run.
    """
    order = ordered(names, settings)
    if "--dry-run" in flags:
        return "\n".join(text for _, text in order.scripts())
    if shutil.which("sbatch") is None:
        raise BadInput("there is no sbatch on this machine's PATH; submit where SLURM is, or add --dry-run")
    for verb in order.verbs:
        ready(verb, order.config, made=PIPELINE[verb] if len(order.verbs) > 1 else ())
    sys.stdout.write(overview(order))
    sys.stdout.flush()
    if "--yes" not in flags and not _agreed():
        return "nothing was submitted\n"
    return _queued(order)


def ordered(names: Sequence[str], settings: Sequence[str]) -> Order:
    """What the words ask for, checked. Raises BadInput."""
    if len(names) != 1 or names[0] not in (*VERBS, "pipeline"):
        given = f"'{' '.join(names)}'" if names else "nothing"
        raise BadInput(
            f"submit takes one of {', '.join(VERBS)} or pipeline, not {given}; write for example "
            "submit ppo experiment=quickstart"
        )
    verbs = tuple(PIPELINE) if names[0] == "pipeline" else (names[0],)
    config = load(verbs[-1], settings)
    world = needed(config.layout)
    for verb in verbs:
        check(config, world, verb)
    out = Path(config.out).absolute()
    if len(str(out).split()) > 1:
        raise BadInput(f"out is '{out}'; sbatch takes no path with blanks, write for example out=runs/mine")
    words = tuple(word for word in settings if not word.startswith(("slurm.", "slurm=", "out=")))
    return Order(verbs, words, config, place(config.slurm, world, config.cluster.node), out)


def overview(order: Order) -> str:
    """What will run, where and for how long, for people."""
    config, where = order.config, order.place
    names = ("policy", "generate", "reference", "value", "reward", "pretrain")
    layouts = ", ".join(f"{name} {words}" for name, words in zip(names, astuple(config.layout), strict=True))
    gpus = f" and {where.gpus} GPUs" if where.gpus else ", no GPUs"
    lines = [
        f"{' -> '.join(order.verbs)} in {order.out}",
        f"  {where.world} ranks on {where.nodes} nodes: {where.tasks} ranks{gpus} a node",
        f"  layouts: {layouts}",
        f"  walltime {config.slurm.time} a job; saved and queued again {config.slurm.signal} s before it ends",
    ]
    return "\n".join(lines) + "\n" + _plan(order)


def _plan(order: Order) -> str:
    """The planner's word on the run."""
    if not any(verb in _SWITCHING for verb in order.verbs):
        return ""
    return reshard.reshard(order.config).as_text()


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise BadInput("submit asks before it submits, and there is no terminal to ask on; add --yes")
    sys.stdout.write("Submit? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _queued(order: Order) -> str:
    """The jobs are in the queue; their numbers and how to watch them."""
    folder = order.out / "slurm"
    said: list[str] = []
    jobs: list[str] = []
    for verb, text in order.scripts():
        path = folder / f"{verb}.sbatch"
        try:
            write_text(path, text)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}; give another folder, as out=runs/1") from error
        after = [f"--dependency=afterok:{jobs[-1]}"] if jobs else []
        done = subprocess.run(["sbatch", "--parsable", *after, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            held = f"; {', '.join(jobs)} before it are in the queue" if jobs else ""
            raise BadInput(f"sbatch refused {path}: {' '.join(done.stderr.split())}{held}")
        jobs.append(done.stdout.strip().partition(";")[0])
        said.append(f"job {jobs[-1]}: {verb}, log {folder / f'{verb}-{jobs[-1]}.log'}")
    return "\n".join([*said, *_watch(jobs, order)]) + "\n"


def _watch(jobs: Sequence[str], order: Order) -> list[str]:
    return [
        "watch them:",
        f"  squeue --jobs {','.join(jobs)}",
        f"  tail -F {order.out / 'slurm' / f'{order.verbs[0]}-{jobs[0]}.log'}",
        f"  tail -F {order.out / 'log.jsonl'}",
        f"save now and go on later: scancel --batch --signal=USR1 {jobs[0]}; every rank's stack: "
        f"scancel --signal=USR2 {jobs[0]}, then {order.out / 'watchdog'}; for good: scancel {' '.join(jobs)}",
    ]
