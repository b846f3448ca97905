"""Proves that runs killed with SIGKILL end as the one that nobody killed, and that the verifier sees a careless resume.

Few kills: `python tools/verify_resume.py --kills 20` is the whole proof, and --fault has three faults more.
Not proved here: a machine that loses power, with what its disk had not written.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_rlhf.checkpoint import states  # noqa: E402
from tools.resume import chain, points, record  # noqa: E402
from tools.resume.process import Event  # noqa: E402


def verify(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/verify_resume.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.mark.slow
def test_killed_runs_end_as_the_undisturbed_one(folder: Path, tmp_path: Path) -> None:
    done = verify("--kills", "4", "--stages", "reward,ppo", "--out", str(folder), "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills, 4 of them equal" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"machine", "versions", "commit", "seed", "kills"} == set(report)
    assert all(kill["resumed_from"] and not kill["difference"] for kill in report["kills"])
    left = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or ())]
    assert not left


@pytest.mark.slow
def test_a_state_that_is_written_beside_the_run_may_be_cut_short(folder: Path, tmp_path: Path) -> None:
    """Killed while ranks write: the state before stands, the next launch takes it, and the end is the undisturbed's."""
    words = (
        "--background",
        "--kills",
        "3",
        "--stages",
        "ppo",
        "--out",
        str(folder),
        "--json",
        str(tmp_path / "r.json"),
    )
    done = verify(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = json.loads((tmp_path / "r.json").read_text())["kills"]
    assert len(kills) == 3 and all("beside the run" in kill["saves"] for kill in kills)
    assert any("cutting short ppo step_" in kill["where"] for kill in kills), kills


@pytest.mark.slow
def test_a_fault_of_the_resume_is_seen(folder: Path) -> None:
    done = verify("--fault", "average", "--out", str(folder))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "sha256 of ppo/weights/rank_" in done.stdout and "1 kills, 0 of them equal, 1 NOT" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(("--stages", "sft,rank"), "--stages names 'rank'; write some of sft,reward,ppo"), (("--kills", "2"), "a stage")],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    done = verify(*words)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


EVENTS = [
    Event(number / 10, text)
    for number, text in enumerate(
        [
            *("anew sft", "begins backward", "ends backward", "saved sft 1", "anew ppo", "begins generation"),
            *("ends generation", "saved ppo 0.generate", "saved ppo 1", "begins generation", "ends generation"),
            *("saved ppo 1.generate", "saved ppo 2"),
        ]
    )
]


def test_every_stage_and_phase_is_killed_once_in_its_order() -> None:
    for seed in range(8):
        chosen = [point.event for point in points.boundaries(EVENTS, 9, random.Random(seed))]
        names = [re.sub(r"\d", "", event) for event in chosen]
        assert sorted(names) == ["saved ppo ", "saved ppo .generate", "saved sft "]
        states = [event.text for event in EVENTS]
        assert chosen == sorted(chosen, key=states.index)
        two = {point.event.split(" ")[1] for point in points.boundaries(EVENTS, 2, random.Random(seed))}
        assert two == {"sft", "ppo"}, "no stage is left out"
    assert [event.text for event in points.of(EVENTS, ["sft"])] == [event.text for event in EVENTS[:4]]
    (moment,) = points.moments(points.of(EVENTS, ["ppo"]), 1, random.Random(1))
    assert moment.event == "begins generation" and moment.count in (1, 2) and 0 <= moment.delay <= 0.1


def test_the_newest_whole_state_is_what_the_next_launch_must_take(tmp_path: Path) -> None:
    """Of the first stage that is not done; what was cut short is named and does not count."""
    verb = chain.VERBS["sft"]
    assert (record.newest(verb, tmp_path), record.unfinished(verb, tmp_path)) == ("anew sft", "")
    for stage, name in (("sft", "step_1"), ("rl_start", "step_2"), ("rl_start", "step_2.generate")):
        folder = tmp_path / stage / "state"
        known = {"step": 2, "phase": "", "serial": len(name), "files": {}, "roles": {}, "settings": {}, "layout": {}}
        states.begin(folder, name)
        states.commit(folder, name, known)
    assert record.newest(verb, tmp_path) == "sft 1"
    (tmp_path / "sft" / "weights").mkdir()
    (tmp_path / "rl_start" / "state" / "step_3.partial").mkdir()
    assert record.newest(verb, tmp_path) == "rl_start 2.generate"
    assert record.unfinished(verb, tmp_path) == ", cutting short rl_start step_3.partial"
    (tmp_path / "rl_start" / "weights").mkdir()
    assert record.newest(verb, tmp_path) == "nothing yet"
    moments = points.writing(3, random.Random(1))
    assert {moment.event for moment in moments} == {"begins writing"} and all(m.delay <= 0.05 for m in moments)


def written(out: Path, *, kl: float = 0.5, tensor: bytes = b"abc", seconds: float = 1.0) -> Path:
    """A finished run of one row."""
    (out / "ppo" / "weights").mkdir(parents=True)
    row = {"step": 0, "phase": "ppo", "time": seconds, "kl": kl, "seconds_by_phase": {"score": seconds}}
    (out / "log.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 1, "pha')
    (out / "ppo" / "weights" / "rank_0.pt").write_bytes(tensor)
    manifest = {"last": {"kl": kl}, "reshard": {"reshard.seconds": seconds, "reshard.bytes": 7}}
    (out / "ppo" / "weights" / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_one_bit_is_a_difference_and_a_second_is_none(tmp_path: Path) -> None:
    expected = written(tmp_path / "undisturbed")
    assert record.end_difference(written(tmp_path / "slow", seconds=2.0), expected, ["ppo"]) == ""
    other = written(tmp_path / "kl", kl=0.5000000000000001)
    assert "ppo row 0: kl is 0.5000000000000001, undisturbed 0.5" in record.end_difference(other, expected, ["ppo"])
    other = written(tmp_path / "weights", tensor=b"abd")
    assert "sha256 of ppo/weights/rank_0.pt" in record.end_difference(other, expected, ["ppo"])
    other = written(tmp_path / "rows")
    (other / "log.jsonl").write_text("")
    assert record.end_difference(other, expected, ["ppo"]) == "ppo row 0 is missing"
    assert record.row_difference(record.rows(expected, ["ppo"]), {}) == "ppo row 0 is one too many"
