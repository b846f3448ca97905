"""Proves that a rank's pulse beats between micro-batches, drawn tokens, tensors read and blocks written, so that the
watchdog takes no long phase for a hang; and that a run's clock tells it the phases.

Not proved here: what the watchdog does with it (observe/test_watchdog.py), how long a beat takes on real hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rlhf.checkpoint import digest, weights
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.observe import pulse
from megatron_rlhf.observe.pulse import PULSE
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.recipes import losses
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


def beats(work: Callable[[], object]) -> int:
    """The beats while `work` was done."""
    before = PULSE.beats
    work()
    return PULSE.beats - before


@on_grid(4)
def test_every_rank_beats_with_each_micro_batch_and_token(tmp_path: Path) -> None:
    """12 rows on one replica in micro-batches of 2, and of 4 without a gradient; 6 tokens a response."""
    role = tiny.engine("tp2 pp2", micro_batch=2)
    assert beats(lambda: role.forward(tiny.rows(12))) == 3
    assert beats(lambda: role.accumulate(tiny.rows(12), losses.language)) == 6
    generator = Generator(role.network, end=-1, rows=8, groups=1)
    assert beats(lambda: generator.sample(tiny.prompts(8), Draw(1.0, seed=1), 6)) == 6
    saved = beats(lambda: weights.save(role.network, tmp_path / "weights"))
    assert saved >= 1
    assert beats(lambda: weights.load(role.network, tmp_path / "weights")) >= len(role.network.parameters)


def test_files_beat_with_each_block_written_and_read(tmp_path: Path) -> None:
    def fill(file: digest.Hashing) -> None:
        for _ in range(5):
            file.write(b"block")

    assert beats(lambda: digest.write(tmp_path / "file", fill)) == 5
    assert beats(lambda: digest.of(tmp_path / "file")) == 1


def test_a_clock_tells_the_phase() -> None:
    clock, phases = Timer(entered=pulse.enter), PULSE.phases
    with clock("generate"), clock("score"):
        assert (PULSE.phase, PULSE.phases) == ("score", phases + 2)
