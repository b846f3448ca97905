"""Kills SFT, reward and PPO-ptx runs with SIGKILL, resumes them and compares them with the run that nobody killed.

    python tools/verify_resume.py [--kills 20] [--out DIR] [--stages sft,reward,ppo] [--seed N] [--json FILE]
    python tools/verify_resume.py --background [--kills 20] ...
    python tools/verify_resume.py --fault rng|cursor|average|shared-step

A quickstart whose stages take seconds (4 gloo ranks, roles under tp2 pp2, generation under tp2 dp2) runs once
undisturbed. Then each verb runs again, is killed with all its ranks, goes on by the same command, is killed again, ...
until it is done. Half of the kills come when a state has been saved, of 20 at every phase boundary of a PPO iteration
and at a step of each other stage; the others by chance within places: generation, reshard, backward, update, scoring,
annotation, taking up a state, saving one and publishing the weights, while states are written beside the run, of PPO at
every phase in one run and of whole iterations in the next. Every log row that any launch wrote must be the undisturbed
run's, but for what tells of the machine (tools/resume/record.py), and so must the sha256 of the final weights' files.

One line a kill: where it was, what the next launch went on from, and whether all was equal. Exit code 0 when all are
equal, 1 when one is not, 2 for bad input. With --out the undisturbed run is kept for the next time. --fault plants what
a careless resume would forget behind one kill in the middle of a stage; the exit code is then 1, or the verifier is no
good. --background kills only while a state is written beside the run, and holds the next launch to the newest state
that the kill left whole.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import result
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import write_json
from tools.resume import chain, points, process, record
from tools.resume.chain import Reference, Verb
from tools.resume.process import SOUND, Ended, Point

TOGETHER = 4
"""Kills by chance of one run."""
SHARES = ("ppo", "sft", "ppo", "reward", "ppo")
"""Whose turn it is to be killed by chance."""


@dataclass(frozen=True, slots=True)
class Task:
    """One run of a verb from its start to its end, with the points at which its launches are killed."""

    verb: Verb
    points: tuple[Point, ...]
    saves: str = "every phase"
    held: bool = False
    """Whether a launch must go on from the newest state that is whole on disk."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: of what, where, which state the next launch went on from, and what differed then; "" for nothing."""

    verb: str
    where: str
    saves: str
    resumed_from: str
    difference: str


def main() -> int:
    """Runs what was asked for, prints a line a kill and a summary; the exit code."""
    asked = _options()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="verify_resume") as made:
            return _verify(asked, asked.out or Path(made))
    except BadInput as error:
        sys.stderr.write(f"verify_resume: {error}\n")
        return 2


def _verify(asked: argparse.Namespace, folder: Path) -> int:
    stages = _stages(asked)
    reference = chain.reference(folder, asked.seed)
    print(f"undisturbed: {len(record.rows(reference.out, stages))} rows of {', '.join(stages)}", flush=True)
    kills: list[Kill] = []
    for task in _tasks(asked, stages, reference):
        for kill in _run(task, reference, folder / "killed", asked.seed, asked.fault or SOUND):
            kills.append(kill)
            print(_line(len(kills), kill), flush=True)
    unequal = sum(bool(kill.difference) for kill in kills)
    print(f"{len(kills)} kills, {len(kills) - unequal} of them equal" + (f", {unequal} NOT" if unequal else ""))
    if asked.json:
        write_json(asked.json, {**_here(), "seed": asked.seed, "kills": [asdict(kill) for kill in kills]})
    return 1 if unequal or not kills else 0


def _stages(asked: argparse.Namespace) -> tuple[str, ...]:
    if asked.fault:
        return (chain.FAULTS[asked.fault],)
    chosen = asked.stages.split(",")
    if unknown := [name for name in chosen if name not in chain.VERBS]:
        raise BadInput(f"--stages names '{unknown[0]}'; write some of {','.join(chain.VERBS)}, for example ppo")
    if asked.kills < len(chosen):
        raise BadInput(f"--kills {asked.kills} leaves a stage without one; write for example --kills {len(chosen)}")
    return tuple(chosen)


def _tasks(asked: argparse.Namespace, stages: Sequence[str], reference: Reference) -> Iterator[Task]:
    """Runs with as many kills as were asked for: at boundaries the first half, then by chance."""
    chance = random.Random(asked.seed)
    verbs = [chain.VERBS[name] for name in stages]
    if asked.fault:
        yield Task(verbs[0], (points.middle(points.of(reference.events, stages)),))
        return
    if asked.background:
        yield from _beside(asked.kills, verbs, chance)
        return
    found = points.of(reference.events, [stage for verb in verbs for stage in verb.stages])
    chosen = points.boundaries(found, -(-asked.kills // 2), chance)
    for verb in verbs:
        mine = tuple(point for point in chosen if point.event.split(" ")[1] in verb.stages)
        if mine:
            yield Task(verb, mine)
    turns = [name for name in SHARES if name in stages]
    left = [turns[number % len(turns)] for number in range(asked.kills - len(chosen))]
    for verb in verbs:
        moments = points.moments(points.of(reference.events, verb.stages), left.count(verb.name), chance)
        for number, start in enumerate(range(0, len(moments), TOGETHER)):
            saves = tuple(chain.SAVES)[1 + number % 2]
            yield Task(verb, tuple(moments[start : start + TOGETHER]), saves)


def _beside(kills: int, verbs: Sequence[Verb], chance: random.Random) -> Iterator[Task]:
    """Runs that are killed while states are written beside them, the verbs in turn."""
    for place, verb in enumerate(verbs):
        left = points.writing(len(range(place, kills, len(verbs))), chance)
        for number, start in enumerate(range(0, len(left), TOGETHER)):
            saves = tuple(chain.SAVES)[1 + number % 2]
            yield Task(verb, tuple(left[start : start + TOGETHER]), saves, held=True)


def _run(task: Task, reference: Reference, folder: Path, seed: int, fault: str) -> Iterator[Kill]:
    """The kills of a task; a run that is done before all points were reached is followed by another one."""
    left = list(task.points)
    while left:
        for kill in _life(task, left, reference, folder / task.verb.name, seed, fault):
            yield kill
            if kill.difference:
                return


def _life(task: Task, left: list[Point], reference: Reference, out: Path, seed: int, fault: str) -> Iterator[Kill]:
    """The kills of one run, from its start to its end. Modifies: `left`, which loses its points."""
    chain.prepared(task.verb, reference.out, out)
    words = chain.words(task.verb.name, out, seed, task.saves)
    killed_at: Point | None = None
    cut_short, newest = "", ""
    while True:
        point = left[0] if left else None
        ended = process.launch(words, fault, out.parent, point)
        if killed_at is not None:
            difference = _difference(task.verb, out, reference, ended)
            if task.held and ended.taken_up.partition(", ")[0] != newest:
                difference = difference or f"it went on from {ended.taken_up}, whole was {newest}"
            yield Kill(task.verb.name, f"{killed_at}{cut_short}", task.saves, ended.taken_up, difference)
        elif not ended.killed:
            raise RuntimeError(f"{task.verb.name} ended with {ended.code} before '{point}':\n{ended.said}")
        if not ended.killed:
            return
        killed_at = left.pop(0)
        if task.held:
            cut_short, newest = record.unfinished(task.verb, out), record.newest(task.verb, out)


def _difference(verb: Verb, out: Path, reference: Reference, ended: Ended) -> str:
    """What is not as in the undisturbed run after a launch: in the rows so far, at the end in the weights too."""
    if ended.killed:
        return record.row_difference(record.rows(out, verb.stages), record.rows(reference.out, verb.stages))
    if ended.code:
        return f"the resumed run ended with {ended.code}: {' '.join(ended.said.split()[-40:])}"
    return record.end_difference(out, reference.out, verb.stages)


def _line(number: int, kill: Kill) -> str:
    """A kill for a person."""
    found = f"DIFFERENT: {kill.difference}" if kill.difference else "equal"
    return f"{number:3}  {kill.verb}: killed where it {kill.where}; went on from {kill.resumed_from}: {found}"


def _here() -> dict[str, Any]:
    return {"machine": result.machine(), "versions": result.versions(), "commit": result.commit()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="kills, half of them where a state has been saved")
    parser.add_argument("--out", type=Path, help="a folder that keeps the undisturbed run")
    parser.add_argument("--stages", default=",".join(chain.VERBS), help="the verbs that are killed")
    parser.add_argument("--seed", type=int, default=1, help="of the runs and of where they are killed")
    parser.add_argument("--json", type=Path, help="a file for the report")
    parser.add_argument("--background", action="store_true", help="kill while states are written beside the run")
    parser.add_argument("--fault", choices=chain.FAULTS, help="plant a fault that must be seen")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
