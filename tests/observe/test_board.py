"""Without tensorboard a run goes on and log.jsonl holds its numbers.

Not proved here: how TensorBoard draws a resumed run; `test_log` reads its events.
"""

import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_rlhf.observe.board import Board
from megatron_rlhf.observe.log import Log


def test_without_tensorboard_only_the_board_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Log(tmp_path, enabled=True) as written:
        written.row("ppo", 1, {"kl": 0.5})
    assert [item.name for item in tmp_path.iterdir()] == ["log.jsonl"]
    board = Board(tmp_path / "tensorboard")
    board.scalars("ppo", 1, {"kl": 0.5})
    board.close()
    assert not (tmp_path / "tensorboard").exists()


def test_closing_the_log_closes_the_events_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[SummaryWriter] = []
    close = SummaryWriter.close

    def recorded(writer: SummaryWriter) -> None:
        closed.append(writer)
        close(writer)

    monkeypatch.setattr(SummaryWriter, "close", recorded)
    with Log(tmp_path, enabled=True) as written:
        written.row("ppo", 1, {"kl": 0.5})
        assert not closed
    assert len(closed) == 1
