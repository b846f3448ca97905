"""Proves that a watchdog ends ranks that hang, all of them, says which one is behind, and leaves every stack behind;
and that it leaves ranks alone that are slow, finished, or were stopped together for a while.

The ranks are processes without torch that beat or wait. Not proved here: ranks on several machines, a rank in NCCL.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_rlhf.observe import watchdog
from megatron_rlhf.observe.pulse import PULSE, at, beat, enter
from megatron_rlhf.observe.watchdog import HUNG, report, start

SECONDS = 2.0
RANK = """
import ctypes, sys, threading, time
from pathlib import Path
from megatron_rlhf.observe import pulse, watchdog
rank, until, out = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
def holds_the_lock():
    ctypes.PyDLL(None).sleep(40)
pulse.at("ppo", 3)
watchdog.start(out, rank, 3, "one", {seconds})
while len(list((out / "watchdog").glob("rank_?.json"))) < 3:
    pulse.beat()
    time.sleep(0.01)
began = time.monotonic()
def waits_for_the_others():
    threading.Event().wait(20)
while time.monotonic() - began < until:
    pulse.enter("generate")
    time.sleep(0.02)
if until == 1.0:
    holds_the_lock()
if until < 5:
    waits_for_the_others()
"""
ROOT = Path(__file__).resolve().parents[2]


def ranks(out: Path, *until: float) -> list[subprocess.Popen[str]]:
    """Processes that beat for so many seconds each, then wait for good; from 5 seconds on they end, and after exactly
    1 second one keeps Python's lock to itself."""
    program = RANK.format(seconds=SECONDS)
    words = [[sys.executable, "-c", program, str(rank), str(each), str(out)] for rank, each in enumerate(until)]
    return [subprocess.Popen(each, cwd=ROOT, stderr=subprocess.PIPE, text=True) for each in words]


def beats(out: Path, rank: int) -> int:
    try:
        return int(json.loads((out / "watchdog" / f"rank_{rank}.json").read_text())["beats"])
    except (OSError, ValueError):
        return 0


def test_a_hang_ends_every_rank_and_says_who_is_behind(tmp_path: Path) -> None:
    """Rank 1 enters fewer phases than the others before all of them wait."""
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog" / "alarm.earlier").touch()
    world = ranks(tmp_path, 1.5, 0.7, 1.5)
    said = "".join(each.communicate(timeout=30)[1] for each in world)
    assert [each.returncode for each in world] == [HUNG] * 3
    assert said.count("no rank has moved on for 2 s; rank 1 is behind") == 1, said
    assert "rank 1: ppo step 3, generate, " in said and f"(process {world[1].pid})" in said
    assert (tmp_path / "watchdog" / "report.txt").read_text() in said
    for rank in range(3):
        assert "waits_for_the_others" in (tmp_path / "watchdog" / f"rank_{rank}.stacks.txt").read_text()
    assert not (tmp_path / "watchdog" / "alarm.earlier").exists()


def test_a_stopped_rank_is_named_and_leaves_its_stack_too(tmp_path: Path) -> None:
    world = ranks(tmp_path, 4.9, 2.0, 4.9)
    while not beats(tmp_path, 1):
        time.sleep(0.02)
    world[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    said = "".join(each.communicate(timeout=30)[1] for each in (world[0], world[2]))
    assert time.monotonic() - began > 4.9, "the others still moved on until then"
    world[1].wait(30)
    assert [each.returncode for each in world] == [HUNG] * 3
    assert "rank 1 is behind" in said and "its process does not answer" in said
    assert "File" in (tmp_path / "watchdog" / "rank_1.stacks.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_keeps_pythons_lock_leaves_its_stack_too(tmp_path: Path) -> None:
    """Its own watchdog cannot run until the others' signal has interrupted the call that keeps it."""
    world = ranks(tmp_path, 1.5, 1.0, 1.5)
    try:
        said = "".join(each.communicate(timeout=30)[1] for each in (world[0], world[2]))
        assert "rank 1 is behind" in said and "its process does not answer" in said
        assert "holds_the_lock" in (tmp_path / "watchdog" / "rank_1.stacks.txt").read_text()
    finally:
        world[1].kill()
        world[1].communicate()


@pytest.mark.slow
def test_slow_finished_and_suspended_ranks_are_left_alone(tmp_path: Path) -> None:
    """One rank works on while another waits longer than allowed; all are stopped together; one ends before the
    others."""
    world = ranks(tmp_path, 0.1, 7.0, 8.0)
    while not beats(tmp_path, 2):
        time.sleep(0.02)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for each in world:
            each.send_signal(number)
        time.sleep(2 * SECONDS if number == signal.SIGSTOP else 0)
    assert [each.wait(30) for each in world[1:]] == [0, 0]
    # alone now, it waits for ranks that have ended: a hang
    assert world[0].wait(30) == HUNG
    assert world[0].stderr is not None and "rank 0:" in world[0].stderr.read()


@dataclass
class Clock:
    """Hours that pass as the test says."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[watchdog.Watchdog, Clock, list[str]]]:
    """A lone rank's watchdog that looks when it is told to, its clock, and what it would have done."""
    clock, done = Clock(), []
    found = watchdog.Watchdog(tmp_path, 0, 1, "one", 60.0)
    found._over.set()
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(found, "_raise_alarm", lambda now: done.append("raised"))
    monkeypatch.setattr(found, "_end", lambda: done.append("ended"))
    found._moved = found._looked = clock.now
    yield found, clock, done
    faulthandler.unregister(signal.SIGUSR2)


def test_the_time_that_a_process_was_suspended_is_no_silence(
    looking: tuple[watchdog.Watchdog, Clock, list[str]],
) -> None:
    """From then on it counts anew, and a hang is still found."""
    found, clock, done = looking
    for seconds in (3.0, 3.0, 7200.0, *[3.0] * 19):
        clock.now += seconds
        found._look()
    assert not done, "57 s since it was woken"
    clock.now += 3.0
    found._look()
    assert done == ["raised"]


def test_another_ranks_alarm_is_heard(looking: tuple[watchdog.Watchdog, Clock, list[str]]) -> None:
    found, clock, done = looking
    (found.folder / "alarm.other").touch()
    found._look()
    assert not done
    (found.folder / "alarm.one").touch()
    found._look()
    assert done == ["ended"]


def test_it_takes_no_file_of_another_launch_for_a_rank(tmp_path: Path) -> None:
    """What an earlier launch left is no sign of life, and no alarm."""
    found = start(tmp_path, 0, 2, "now", 60.0)
    assert found is not None
    try:
        (tmp_path / "watchdog" / "rank_1.json").write_text(json.dumps({"run": "before", "beats": 5}))
        assert found._facts(1) == {}
        (tmp_path / "watchdog" / "rank_1.json").write_text("{half")
        assert found._facts(1) == {}
    finally:
        found.stop()
    assert json.loads((tmp_path / "watchdog" / "rank_0.json").read_text())["over"] is True


def test_off_where_seconds_are_0_and_where_nothing_can_be_written(tmp_path: Path) -> None:
    assert start(tmp_path, 0, 1, "one", 0.0) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "watchdog").write_text("a file in its place")
    assert start(tmp_path, 0, 1, "one", 5.0) is None


def test_sigusr2_writes_the_stacks_and_the_rank_goes_on(tmp_path: Path) -> None:
    found = watchdog.Watchdog(tmp_path, 0, 1, "one", 60.0)
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert "test_sigusr2_writes" in (tmp_path / "rank_0.stacks.txt").read_text()
    finally:
        found.stop()


def facts(phases: int, beats: int, answers: bool = True) -> dict[str, object]:
    return {"stage": "", "step": 0, "phase": "", "phases": phases, "beats": beats, "over": False, "answers": answers}


def test_behind_is_who_does_not_answer_else_fewest_phases_else_fewest_beats() -> None:
    place = Path("run/watchdog")
    assert "rank 2 is behind" in report({0: facts(1, 1), 2: facts(9, 9, False)}, 5, place)
    assert "rank 0, 1 are behind" in report({0: facts(3, 9), 1: facts(3, 1), 2: facts(4, 1)}, 5, place)
    assert "rank 1 is behind" in report({0: facts(3, 9), 1: facts(3, 1)}, 5, place)
    assert "no rank is behind" in report({0: facts(3, 9), 1: facts(3, 9)}, 5, place)


def test_the_pulse_only_grows() -> None:
    before = PULSE.beats
    at("sft", 7)
    enter("step")
    beat()
    assert (PULSE.stage, PULSE.step, PULSE.phase, PULSE.beats) == ("sft", 7, "step", before + 3)
