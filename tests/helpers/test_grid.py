"""Proves that a grid test cannot pass or hang silently: a rank that raises, dies or hangs fails it and is named.

Not proved here: that a test's own body asserts the right thing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.grid import GridFailure, on_grid, run


def whoami(offset: int) -> int:
    return dist.get_rank() + offset


def world_and_process() -> tuple[int, int]:
    return dist.get_world_size(), os.getpid()


def one_rank_asserts() -> None:
    print("before the collective")
    assert dist.get_rank() == 0, "only rank zero may pass"
    dist.all_reduce(torch.ones(1))


def one_rank_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def one_rank_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def skips() -> None:
    pytest.skip("not here")


@on_grid(2)
@pytest.mark.parametrize("value", [3, 5])
def test_arguments_and_fixtures_arrive(value: int, tmp_path: Path) -> None:
    """Each rank sees the parameters and the same folder."""
    (tmp_path / str(dist.get_rank())).write_text(str(value))
    dist.barrier()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(value)] * 2


def test_answers_come_back_by_rank() -> None:
    """`run` gives what each rank returned; the processes stay the same from one call to the next."""
    assert run(2, whoami, offset=10) == [10, 11]
    first, second = run(2, world_and_process), run(2, world_and_process)
    assert first == second
    assert len({process for _, process in first}) == 2
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run(2, skips)
    assert run(2, world_and_process) == first


def test_a_failing_rank_is_named_and_the_pool_starts_anew() -> None:
    """The traceback and output of rank 1 come at once though rank 0 hangs in a collective; the next call works."""
    before = run(2, world_and_process)
    start = time.monotonic()
    with pytest.raises(GridFailure, match=r"(?s)rank 1 of 2 failed.*only rank zero may pass.*assert 1 == 0") as failure:
        run(2, one_rank_asserts)
    assert time.monotonic() - start < 30
    assert "before the collective" in str(failure.value)
    assert not {process for _, process in before} & {process for _, process in run(2, world_and_process)}


def test_a_dead_rank_is_named() -> None:
    """A rank that ends without a word fails the test with its exit code."""
    with pytest.raises(GridFailure, match=r"rank 1 of 2 failed.*\n.*exit code 7"):
        run(2, one_rank_dies)


def test_a_hanging_rank_is_named() -> None:
    """After the time limit the silent rank is named with the line it hangs in."""
    run(2, whoami, offset=0)
    with pytest.raises(GridFailure, match=r"(?s)rank 1 of 2 did not answer in 1 s.*one_rank_hangs"):
        run(2, one_rank_hangs, timeout=1.0)


for _test in (
    test_answers_come_back_by_rank,
    test_a_failing_rank_is_named_and_the_pool_starts_anew,
    test_a_dead_rank_is_named,
    test_a_hanging_rank_is_named,
):
    _test.grid_ranks = 2  # type: ignore[attr-defined]
