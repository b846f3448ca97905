"""Proves that a run never goes on from a damaged state in silence: every file of the newest one truncated, with a bit
flipped, or removed, in turn, is said by name, and the state before is taken; with no other there is a refusal.

Not proved here: damage of the file system itself; single files and bits at large (test_states).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.checkpoint import manifest, resume, weights
from megatron_rlhf.checkpoint.differences import Terms
from megatron_rlhf.checkpoint.resume import Keeper
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Checkpoint
from megatron_rlhf.parallel import deterministic
from megatron_rlhf.recipes import losses
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


def flip(path: Path) -> None:
    """One bit in the middle of the file is another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES: tuple[Callable[[Path], object], ...] = (Path.unlink, flip, lambda path: os.truncate(path, 100))


def keeper(folder: Path, said: list[str]) -> Keeper:
    """The states in `folder`."""
    return Keeper(folder, Checkpoint(), Terms({}, {}, 4), said.append)


def damage(path: Path, how: Callable[[Path], object]) -> None:
    """Damage a file once, and let all ranks see it. Collective: world."""
    if dist.get_rank() == 0:
        how(path)
    dist.barrier()


@on_grid(4)
def test_the_last_good_state_is_taken_and_the_damaged_file_named(tmp_path: Path) -> None:
    """Each file of the newest state in turn; the next save removes what is damaged, and the run's next state counts."""
    files = (resume.COMMON, "rank_0.pt", "rank_3.pt", manifest.FILE)
    for number, (file, how) in enumerate((file, how) for file in files for how in DAMAGES):
        folder, said = tmp_path / str(number), list[str]()
        first = keeper(folder, said)
        for step in (1, 2):
            first.save(step, {"step": step}, {}, wait=True)
        damage(folder / "step_2" / file, how)
        again = keeper(folder, said)
        found = again.load()
        assert found is not None and (found.step, found.common) == (1, {"step": 1})
        assert len(said) == 1 and "step_2 is damaged" in said[0] and file in said[0] and "taking step_1" in said[0]
        again.save(2, {"step": 2}, {}, wait=True)
        again.save(3, {"step": 3}, {}, wait=True)
        found = keeper(folder, said).load()
        assert found is not None and found.step == 3 and len(said) == 1


@on_grid(4)
def test_without_a_good_state_the_run_is_refused(tmp_path: Path) -> None:
    """All damaged is a refusal that names each; a save cut short is said, and where it was the first the run starts."""
    said = list[str]()
    damage(tmp_path, lambda folder: (folder / "step_1.partial").mkdir())
    assert keeper(tmp_path, said).load() is None
    assert said == [f"{tmp_path}: step_1.partial was not finished; starting anew"]
    for step in (1, 2):
        keeper(tmp_path, said).save(step, {}, {}, wait=True)
    damage(tmp_path / "step_2" / "rank_1.pt", Path.unlink)
    with pytest.raises(BadInput, match=r"step_2 is damaged \(rank_1\.pt is missing\); write checkpoint\.resume=never"):
        keeper(tmp_path, said).load()


@on_grid(4)
def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    """Each file of a stage's weights in turn, on every rank, before a weight is written."""
    saved, target = tiny.network("tp2 pp2", seed=1), tiny.network("dp4", seed=2)
    before = tiny.weights(target)
    for number, (file, how) in enumerate((file, how) for file in ("rank_2.pt", manifest.FILE) for how in DAMAGES):
        folder = tmp_path / str(number)
        weights.save(saved, folder)
        damage(folder / file, how)
        with pytest.raises(BadInput, match="no weights at" if file == manifest.FILE and how is Path.unlink else file):
            weights.load(target, folder)
        assert tiny.equal(tiny.weights(target), before)
    weights.save(saved, folder)
    weights.load(target, folder)
    assert tiny.equal(tiny.weights(target), tiny.weights(saved))


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", pytest.param("tp2 dp2 sp", marks=pytest.mark.slow)])
def test_a_deterministic_run_is_bit_equal(words: str) -> None:
    """`compute.deterministic` holds torch to deterministic algorithms, and two runs have the same bits."""
    try:
        deterministic.install()
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
        runs = []
        for _ in range(2):
            role = tiny.engine(words, dropout=0.1, rate=0.01)
            for seed in range(3):
                role.accumulate(tiny.rows(seed=seed), losses.language)
                role.update()
            runs.append(tiny.main_weights(role))
        assert tiny.equal(*runs)
    finally:
        torch.use_deterministic_algorithms(False)
