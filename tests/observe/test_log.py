"""Files are whole or absent, rows survive a kill and a resume, and a disabled log leaves nothing behind.

Not proved here: that the recipes write the names that the design lists.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rlhf.observe import log
from megatron_rlhf.observe.log import Log, write_bytes, write_json, write_text


def rows(directory: Path) -> list[dict[str, object]]:
    """The rows of `directory/log.jsonl`, read strictly: NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (directory / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n") if line]


def test_a_written_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "erste\n")
    write_text(path, "zweite Zeile é\n")
    assert path.read_text(encoding="utf-8") == "zweite Zeile é\n"
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_the_text_is_on_disk_before_the_name_points_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "a.txt", []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size))
        synced(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append(("replace", source.parent == target.parent))
        replaced(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(path, "four")
    assert calls == [("fsync", 4), ("replace", True)]


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1.5, math.nan, (math.inf, "ü")], "y": {"z": -math.inf}})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"x": [1.5, None, [None, "ü"]], "y": {"z": None}}
    assert "ü" in text and text.endswith("}\n")


def test_rows_start_with_step_phase_time_and_are_flushed_at_once(tmp_path: Path) -> None:
    with Log(tmp_path, enabled=True) as written:
        written.row("ppo", 3, {"kl": 0.5, "note": "a\u2028b", "bad": math.nan, "tokens": 7})
        (row,) = rows(tmp_path)
    assert list(row) == ["step", "phase", "time", "kl", "note", "bad", "tokens"]
    assert isinstance(row.pop("time"), float)
    assert row == {"step": 3, "phase": "ppo", "kl": 0.5, "note": "a\u2028b", "bad": None, "tokens": 7}


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    with Log(tmp_path, enabled=True) as written:
        for step in (1, 2):
            written.row("reward", step, {"accuracy": step / 4, "note": "text", "bad": math.inf})
        written.row("ppo", 1, {"kl": 0.25})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["ppo/kl", "reward/accuracy"]
    assert [(item.step, item.value) for item in events.Scalars("reward/accuracy")] == [(1, 0.25), (2, 0.5)]


def test_a_row_may_not_name_the_logs_own_fields(tmp_path: Path) -> None:
    with Log(tmp_path, enabled=True) as written, pytest.raises(ValueError, match="a row's time is the log's own"):
        written.row("sft", 1, {"time": 1.0})


def test_a_line_cut_by_a_kill_is_dropped_before_the_next_row(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "phase": "sft"}\n{"step": 2, "pha', encoding="utf-8")
    with Log(tmp_path, enabled=True) as written:
        written.row("sft", 2, {})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_resumed_phase_drops_its_later_rows_only(tmp_path: Path) -> None:
    with Log(tmp_path, enabled=True) as written:
        for step in (1, 2, 3):
            written.row("sft", step, {"note": "a\u2028b"})
            written.row("ppo", step, {})
        with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 4, "pha')
        written.truncate_after("ppo", 1)
        written.row("ppo", 2, {"again": 1})
    assert [(row["phase"], row["step"]) for row in rows(tmp_path)] == [
        ("sft", 1),
        ("ppo", 1),
        ("sft", 2),
        ("sft", 3),
        ("ppo", 2),
    ]
    assert rows(tmp_path)[0]["note"] == "a\u2028b" and rows(tmp_path)[-1]["again"] == 1


def test_truncating_before_the_first_row_is_fine(tmp_path: Path) -> None:
    with Log(tmp_path, enabled=True) as written:
        written.truncate_after("ppo", 0)
    assert not list(tmp_path.iterdir())


def test_say_prints_one_plain_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Log(None, enabled=True).say("[red]tp2 pp2[/red] is 4 ranks " + "x" * 200)
    captured = capsys.readouterr()
    assert captured.err == "[red]tp2 pp2[/red] is 4 ranks " + "x" * 200 + "\n"
    assert captured.out == ""


def test_without_directory_it_only_says(capsys: pytest.CaptureFixture[str]) -> None:
    with Log(None, enabled=True) as written:
        written.row("ppo", 1, {"kl": 0.0})
        written.truncate_after("ppo", 0)
        written.say("hello")
    assert capsys.readouterr().err == "hello\n"


def test_disabled_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 9, "phase": "ppo"}\n')
    with Log(tmp_path, enabled=False) as written:
        written.row("ppo", 1, {"kl": 0.0})
        written.truncate_after("ppo", 0)
        written.say("hello")
    assert capsys.readouterr().err == ""
    assert [item.name for item in tmp_path.iterdir()] == ["log.jsonl"]
    assert len(rows(tmp_path)) == 1


def test_it_imports_no_torch() -> None:
    assert log.CONSOLE.stderr
    code = "import sys, megatron_rlhf.observe.log, megatron_rlhf.observe.progress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
