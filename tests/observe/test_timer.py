"""Seconds add up by name, nested and failing blocks included, and a take empties the timer.

Not proved here: anything about a device's clock.
"""

import time

import pytest

from megatron_rlhf.observe.timer import Timer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the timer believes in."""
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_name_entered_again_adds_and_names_nest(clock: list[float]) -> None:
    timer = Timer()
    with timer("ppo"):
        for seconds in (1.0, 2.0):
            with timer("ppo.generate"):
                clock[0] += seconds
        clock[0] += 4.0
    assert timer.seconds == {"ppo.generate": 3.0, "ppo": 7.0}


def test_a_name_inside_itself_counts_once(clock: list[float]) -> None:
    timer = Timer()
    with timer("save"):
        clock[0] += 1.0
        with timer("save"):
            clock[0] += 2.0
        clock[0] += 4.0
    assert timer.seconds == {"save": 7.0}


def test_a_block_that_raises_counts(clock: list[float]) -> None:
    timer = Timer()
    with pytest.raises(RuntimeError, match="dead"), timer("train"):
        clock[0] += 3.0
        raise RuntimeError("dead")
    with timer("train"):
        clock[0] += 1.0
    assert timer.seconds == {"train": 4.0}


def test_take_returns_and_resets(clock: list[float]) -> None:
    timer = Timer()
    with timer("a"):
        clock[0] += 1.0
    assert timer.take() == {"a": 1.0}
    assert timer.take() == {} == timer.seconds
    with timer("a"):
        clock[0] += 2.0
    assert timer.take() == {"a": 2.0}


def test_the_real_clock_is_wall_time() -> None:
    timer = Timer()
    with timer("sleep"):
        time.sleep(0.02)
    assert 0.02 <= timer.seconds["sleep"] < 5.0


def test_own_seconds_are_those_not_spent_waiting_and_a_name_is_told_once(clock: list[float]) -> None:
    waited, told = [7.0], []
    timer = Timer(lambda: waited[0], told.append)
    for alone, held in ((1.0, 2.0), (0.5, 0.0)):
        with timer("policy"), timer("policy"):
            clock[0] += alone + held
            waited[0] += held
    clock[0] += 9.0
    waited[0] += 9.0
    assert told == ["policy", "policy"]
    assert (timer.take(), timer.take_own()) == ({"policy": 3.5}, {"policy": 1.5})
    assert (timer.take(), timer.take_own()) == ({}, {})
