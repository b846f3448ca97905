"""A bar on a terminal, at most one line every ten seconds elsewhere, nothing on the other ranks.

Not proved here: how the bar looks.
"""

import io
import time

import pytest
from rich.console import Console

from megatron_rlhf.observe.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the progress believes in."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def plain() -> Console:
    """A console that is no terminal."""
    return Console(file=io.StringIO(), force_terminal=False, markup=False, highlight=False)


def shown(console: Console) -> str:
    """What the console received."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_come_ten_seconds_apart_and_at_the_end(clock: list[float]) -> None:
    console = plain()
    with Progress(True, 8, "ppo", console=console) as progress:
        for step in range(8):
            progress.advance(f"[kl] {step}")
            clock[0] += 4.0
    assert shown(console) == "ppo 1/8 [kl] 0\nppo 4/8 [kl] 3\nppo 7/8 [kl] 6\nppo 8/8 [kl] 7\n"


def test_a_resumed_phase_counts_on(clock: list[float]) -> None:
    console = plain()
    with Progress(True, 500, "ppo", done=200, console=console) as progress:
        progress.advance("")
    assert shown(console) == "ppo 201/500\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_disabled_shows_nothing(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with Progress(False, 1, "ppo", console=console) as progress:
        progress.advance("kl 0")
    assert shown(console) == ""


def test_a_terminal_has_a_bar_that_counts() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
    with Progress(True, 3, "reward", done=1, console=console) as progress:
        progress.advance("loss [b] 0.5")
    text = shown(console)
    assert "reward" in text and "2/3" in text and "loss [b] 0.5" in text
    assert "━" in text


def test_the_default_console_is_the_one_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, 1, "sft") as progress:
        progress.advance("loss 2")
    captured = capsys.readouterr()
    assert captured.err == "sft 1/1 loss 2\n" and captured.out == ""
