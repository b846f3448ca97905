"""Proves what `megatron-rlhf status` says of a run that is running, silent, gone, stopped or finished, of a folder that
is empty, half-written or full of rubbish, and that it does so from files alone, in less than a second, without torch.

Not proved here: that the recipes write those files (tests/recipes/test_stragglers.py, tests/test_quickstart.py).
"""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhf import cli
from megatron_rlhf.checkpoint import lock
from megatron_rlhf.observe.log import Log
from megatron_rlhf.observe.now import Now
from megatron_rlhf.status import look

ROW = {
    **{"tokens_per_second": 1234.5, "kl": 0.25, "score": 1.5, "loss.policy": 0.1, "lr": 1e-5},
    **{"slowest.rank": 3, "slowest.ratio": 1.8, "slowest.phase": "policy"},
    "seconds_by_phase": {"generate": 6.0, "policy": 3.0, "value": 1.0},
}


def run(out: Path, rows: int = 4, holder: dict[str, Any] | None = None, apart: float = 10.0) -> Path:
    """A run of 24 iterations that has written `rows` rows `apart` seconds apart and generates."""
    now = Now(out, {"world": 4})
    now.stage("ppo", 24, rows)
    now.phase("generate")
    start = time.time() - apart * rows
    lines = [{"step": n, "phase": "ppo", "time": start + apart * n, **ROW} for n in range(rows)]
    lines = [{"step": 0, "phase": "reward", "time": start, "kl": 99}, *lines]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alive = {"host": socket.gethostname(), "pid": os.getpid(), "job": "", "since": time.time() - 300}
    (out / "lock.json").write_text(json.dumps(alive if holder is None else {**alive, **holder} if holder else {}))
    return out


def state(out: Path, name: str, age: float) -> None:
    folder = out / "ppo" / "state" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    os.utime(folder / "manifest.json", (time.time() - age, time.time() - age))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_a_running_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(tmp_path)
    for name, seconds in (("step_2", 50.0), ("step_3.score", 20.0), ("step_4.partial", 1.0)):
        state(out, name, seconds)
    found = look(out)
    assert (found.state, found.stage, found.step, found.steps, found.phase) == ("running", "ppo", 4, 24, "generate")
    assert found.since == pytest.approx(300, abs=5)
    assert found.numbers == {"tokens_per_second": 1234.5, "kl": 0.25, "score": 1.5, "loss.policy": 0.1}
    assert found.seconds_a_step == pytest.approx(10) and found.seconds_left == pytest.approx(200)
    assert found.saved is not None and (found.saved.stage, found.saved.name) == ("ppo", "step_3.score")
    assert found.saved.age == pytest.approx(20, abs=5)
    assert (found.slow_phase, found.slow_share) == ("generate", 0.6)
    assert (found.slow_rank, found.slow_ratio, found.slow_rank_phase) == (3, 1.8, "policy")
    assert not found.faults
    assert cli.main(["status", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{out}: ppo, step 4 of 24, in generate\n")
    for text in (
        *(f"running for 5 min 0 s, process {os.getpid()} on ", "1,234 tokens/s, 10 s a step", "kl 0.25, score 1.5"),
        *("ppo/state/step_3.score, 2", "3 min 20 s of this stage", "generate takes 60% of a step"),
        "rank 3 takes 1.80 x the median rank's own seconds, most of it in policy",
    ):
        assert text in shown, shown
    assert cli.main(["status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slow_rank"] == 3


def test_a_heartbeat_that_stopped_is_silence_since_the_last_sign(tmp_path: Path) -> None:
    """On another machine, whose processes cannot be asked."""
    out = run(tmp_path, holder={"host": "elsewhere", "job": "17"})
    assert look(out).state == "running"
    for name in ("lock.json", "now.json", "log.jsonl"):
        age(out / name, lock.SILENT + 40)
    found = look(out)
    assert (found.state, found.since) == ("silent", pytest.approx(lock.SILENT + 40, abs=5))
    assert found.holder == f"process {os.getpid()} on elsewhere (job 17)"
    assert found.seconds_left == pytest.approx(200)


def test_a_process_that_is_gone_is_silent_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    found = look(run(tmp_path, holder={"pid": gone.pid}))
    assert found.state == "silent" and found.holder.endswith(", which is gone")


def test_a_released_lock_is_a_stop_or_the_end(tmp_path: Path) -> None:
    out = run(tmp_path, holder={})
    found = look(out)
    assert (found.state, found.seconds_left) == ("stopped", None)
    now = Now(out)
    now.stage("ppo", 24, 24)
    now.end()
    assert look(out).state == "finished"


def test_an_older_run_without_now_json_is_read_from_its_rows(tmp_path: Path) -> None:
    out = run(tmp_path)
    (out / "now.json").unlink()
    found = look(out)
    assert (found.stage, found.step, found.steps, found.seconds_left) == ("ppo", 4, None, None)
    assert found.numbers["kl"] == 0.25


def test_a_real_lock_and_log(tmp_path: Path) -> None:
    held = lock.take(tmp_path, lambda text: None)
    with Log(tmp_path, True, lambda directory: []) as log:
        log.row("sft", 0, {"loss.language": 2.0})
    found = look(tmp_path)
    assert (found.state, found.stage, found.numbers) == ("running", "sft", {"loss.language": 2.0})
    held.release()
    assert look(tmp_path).state == "stopped"


def test_an_empty_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: nothing of a run is here\n"


@pytest.mark.parametrize("words", [[], ["a", "b"], ["--fast"], ["/nowhere/at/all"]])
def test_no_folder_is_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", *words]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "write for example megatron-rlhf status runs/quickstart" in shown


def test_a_half_written_log_and_damaged_files_are_said(tmp_path: Path) -> None:
    out = run(tmp_path)
    with (out / "log.jsonl").open("ab") as file:
        file.write(b'\x00\xff{"step"\n[1]\n{"step": 9, "pha')
    (out / "lock.json").write_text('{"host": ')
    (out / "now.json").write_text("")
    found = look(out)
    assert found.faults == ("lock.json is damaged", "2 of the last 7 lines of log.jsonl cannot be read")
    assert (found.stage, found.step, found.numbers["kl"]) == ("ppo", 4, 0.25)
    assert "lock.json is damaged; 2 of the last 7" in found.as_text()


def test_any_bytes_and_any_types_give_a_status(tmp_path: Path) -> None:
    """Every file of a run with values of other types, cut anywhere or flipped: never an exception."""
    chance = random.Random(3)
    values = [None, True, -1, 1e308, "x", [], {}, {"generate": "x"}, {"a": -1.0}, [[1]], float("inf")]
    for _ in range(150):
        out = run(tmp_path / "run", rows=3)
        for name in ("now.json", "lock.json", "log.jsonl"):
            text = (out / name).read_text()
            lines = [json.loads(line) for line in (text.splitlines() if name == "log.jsonl" else [text])]
            for line in lines:
                for key in chance.sample(sorted(line), min(3, len(line))):
                    line[key] = chance.choice(values)
            data = bytearray("".join(json.dumps(line) + "\n" for line in lines).encode())
            if chance.random() < 0.3:
                data[chance.randrange(len(data))] = chance.randrange(256)
            (out / name).write_bytes(data[: chance.randrange(len(data)) if chance.random() < 0.3 else None])
        found = look(out)
        assert found.as_text() and json.loads(found.as_json())


def test_it_takes_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    """Of CPU time, so that a busy machine does not decide; with a log of 30 MB."""
    out = run(tmp_path)
    row = json.dumps({"step": 0, "phase": "sft", "time": 1.0, **ROW}) + "\n"
    (out / "log.jsonl").write_text(row * (30_000_000 // len(row)) + (out / "log.jsonl").read_text())
    code = (
        "import sys; from megatron_rlhf import cli; code = cli.main(['status', sys.argv[1]]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'megatron', 'numpy', 'matplotlib')))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "ppo, step 4 of 24" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
