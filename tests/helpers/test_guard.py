"""Proves that the guard of the fuzz tests sees a loader that crashes, hangs, takes memory, writes elsewhere or babbles,
and that every case can be made again.

Not proved here: what C code does that neither returns nor looks for signals.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from megatron_rlhf.config.rules import BadInput
from tests.helpers import damage, guard


def taken_for_damage() -> None:
    try:
        bytearray(2 << 30)
    except MemoryError as error:
        raise BadInput("it is damaged") from error


def hung_for_damage() -> None:
    try:
        time.sleep(9)
    except BaseException as error:
        raise BadInput("it is damaged") from error


def refuse(*said: str) -> None:
    raise BadInput(*said)


WRONG = {
    "crash": lambda: {}["a"],
    "memory": lambda: bytearray(2 << 30),
    "memory, as damage": taken_for_damage,
    "hang": lambda: time.sleep(9),
    "hang, as damage": hung_for_damage,
    "nothing said": lambda: refuse(""),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_loader_may_not_do_is_seen(name: str) -> None:
    assert isinstance(guard.outcome(WRONG[name], 0.2), BaseException)


def test_what_it_may_do_is_not() -> None:
    assert guard.outcome(lambda: 1) == ""
    assert guard.outcome(lambda: refuse("a.json is no JSON")) == "a.json is no JSON"
    assert (
        guard.outcome(lambda: refuse("2 settings do not fit:", "a", "b\nc")) == "2 settings do not fit:\n  a\n  b\\nc"
    )


@pytest.mark.parametrize("place", ["../escaped", "../../escaped", "../temporary/escaped"])
def test_files_outside_the_folder_are_seen(place: str, tmp_path: Path) -> None:
    def case(folder: Path, chance: random.Random) -> guard.Load:
        return lambda: (folder / place).write_text("")

    with pytest.raises(AssertionError, match="elsewhere case 0 wrote .*escaped"):
        guard.each("elsewhere", case, range(1), tmp_path)


def test_files_that_are_taken_away_are_seen(tmp_path: Path) -> None:
    def case(folder: Path, chance: random.Random) -> guard.Load:
        (folder / "a").write_text("")
        return (folder / "a").unlink

    with pytest.raises(AssertionError, match="case 0 took away"):
        guard.each("a", case, range(1), tmp_path)


def test_a_case_can_be_made_again() -> None:
    made = [damage.json_bytes(damage.changed({"a": [1, "b"]}, each), each) for each in map(random.Random, [7, 7, 8])]
    assert made[0] == made[1] != made[2]
    archives = [damage.tar_bytes({"a": b"b"}, random.Random(7)) for _ in range(2)]
    assert archives[0] == archives[1]
