"""A verb whose ranks say what they are doing: the program itself, with a line in a file where a place begins or ends.

python -m tools.resume.announced FILE FAULT VERB key=value ...; FAULT is a name of chain.FAULTS or -. A line is
`<seconds of the monotonic clock> <event>`, and an event "begins PLACE", "ends PLACE", "saved STATE", "resumed STATE"
or "anew STAGE", with a state written as in "ppo 1.score": stage, steps done, phase inside the next one. Rank 0 alone
writes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from megatron_rlhf import cli, launch
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.checkpoint.resume import Saved
from megatron_rlhf.checkpoint.snapshot import Snapshot
from megatron_rlhf.config import env
from megatron_rlhf.recipes import ppo
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.reshard.switch import Bridge
from megatron_rlhf.train.engine import Engine
from tools.resume import points
from tools.resume.faults import PLANT
from tools.resume.process import SOUND

RANKS = 4

Tell = Callable[[str], None]


def main(words: Sequence[str]) -> NoReturn:
    """Ends with the exit code of the verb; started outside a world, this process starts the ranks."""
    if not env.launched():
        sys.exit(launch.run(RANKS, words, module="tools.resume.announced"))
    file, fault, *verb = words
    observe(teller(Path(file)) if env.rank() == 0 else lambda event: None)
    if fault != SOUND:
        PLANT[fault]()
    cli.run(verb)


def teller(file: Path) -> Tell:
    """Appends events to `file`, each whole."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return lambda event: os.write(descriptor, f"{time.monotonic():.6f} {event}\n".encode()) and None


def observe(tell: Tell) -> None:
    """From here on this process tells where it is."""
    for owner, name, place in (
        *((ppo, "sample", "generation"), (Bridge, "load", "reshard"), (ppo, "score", "scoring")),
        *((ppo, "annotate", "annotation"), (Engine, "accumulate", "backward"), (Engine, "update", "update")),
        *((Session, "saved", "taking up"), (Session, "save", "saving"), (weights, "save", "publishing")),
        (Snapshot, "write", points.WRITING),
    ):
        _around(owner, name, place, tell)
    _after(Session, "save", lambda result, run, stage, step, *rest: tell(f"saved {_state(stage, step, *rest[2:3])}"))
    _after(Session, "saved", lambda found, run, stage: tell(_taken_up(stage, found)))


def _around(owner: Any, name: str, place: str, tell: Tell) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def told(*arguments: Any, **named: Any) -> Any:
        with _place(place, tell):
            return function(*arguments, **named)

    setattr(owner, name, told)


@contextmanager
def _place(place: str, tell: Tell) -> Iterator[None]:
    tell(f"begins {place}")
    try:
        yield
    finally:
        tell(f"ends {place}")


def _after(owner: Any, name: str, then: Callable[..., None]) -> None:
    function = getattr(owner, name)

    @wraps(function)
    def told(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        then(result, *arguments)
        return result

    setattr(owner, name, told)


def _taken_up(stage: str, found: Saved | None) -> str:
    return f"anew {stage}" if found is None else f"resumed {_state(stage, found.step, found.phase)}"


def _state(stage: str, step: int, phase: str = "") -> str:
    return f"{stage} {step}.{phase}" if phase else f"{stage} {step}"


if __name__ == "__main__":
    main(sys.argv[1:])
