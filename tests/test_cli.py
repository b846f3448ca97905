"""Proves the command line: help without torch, sentences and exit code 2 for bad input, when ranks are started, and
what a rank says when it fails.

Not proved here: the recipes themselves.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlhf import __version__, cli, doctor, launch
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config
from megatron_rlhf.observe.watchdog import HUNG, Absent

ROOT = Path(__file__).resolve().parents[1]
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing launched this process."""
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """What the launcher was asked for; it starts nothing."""
    asked: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(launch, "run", lambda processes, argv: asked.append((processes, argv)) or 0)
    return asked


def recipe(monkeypatch: pytest.MonkeyPatch, run: Callable[[Config], None]) -> None:
    """Every recipe is `run`."""
    loader = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(run=run, check=lambda *_: None))
    monkeypatch.setattr(cli, "importlib", loader)


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["ppo", "--help"]])
def test_help_names_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in [*cli.RECIPES, "plan", "doctor"])
    assert max(len(line) for line in shown.splitlines()) <= 120


def test_help_and_doctor_import_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_rlhf import cli; codes = [cli.main(['--help']), cli.main(['doctor'])]; "
        "sys.exit(codes != [0, 0] or 'torch' in sys.modules or 'megatron' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-rlhf {__version__}\n"


@pytest.mark.parametrize("verb", cli.RECIPES)
def test_every_verb_has_its_recipe(verb: str) -> None:
    assert importlib.util.find_spec(f"megatron_rlhf.recipes.{verb}") is not None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "there is no verb 'train'; write one of quickstart, prepare"),
        (["quickstart", "--out"], "--out names no folder; write for example --out runs/quickstart"),
        (["quickstart", "--fast"], "flag '--fast' is unknown"),
        (["ppo"], "ppo needs an experiment; write ppo experiment=quickstart"),
        (["ppo", "experiment=quickstart", "ppo.klcoef=1"], "the nearest is 'ppo.kl.coef'"),
        (["ppo", "experiment=quickstart", "ppo.minibatches=7"], "ppo.episodes=64 is no multiple of ppo.minibatches=7"),
        (["quickstart", "layout.policy=tp3"], "layout.policy: tp3 pp1 dp1 is 3 ranks, the world has 4"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    launched: list[tuple[int, list[str]]],
) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("megatron-rlhf: ")
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert launched == []


@pytest.mark.parametrize("words", [["--out", "/x y"], ["--out=/x y"], ["out=/x y"]])
def test_several_ranks_are_started_where_none_runs(words: list[str], launched: list[tuple[int, list[str]]]) -> None:
    assert cli.main(["quickstart", *words]) == 0
    assert launched == [(4, ["quickstart", "out=/x y"])]


def test_one_rank_runs_here(monkeypatch: pytest.MonkeyPatch, launched: list[tuple[int, list[str]]]) -> None:
    seen: list[Config] = []
    recipe(monkeypatch, seen.append)
    assert cli.main(["sft", "experiment=quickstart", "layout=cpu1", "--out", "/x"]) == 0
    assert (seen[0].out, seen[0].layout.policy, launched) == ("/x", "tp1", [])


def test_a_launched_rank_runs_and_starts_none(
    monkeypatch: pytest.MonkeyPatch, launched: list[tuple[int, list[str]]]
) -> None:
    seen: list[Config] = []
    recipe(monkeypatch, seen.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["quickstart", "--out", "/x"]) == 0
    assert (len(seen), launched) == (1, [])


def test_a_stop_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(monkeypatch, lambda config: sys.exit(75))
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", "experiment=quickstart", "layout=cpu1"])
    assert stop.value.code == 75


ABORTING = """
import atexit, os, sys, types
from megatron_rlhf import cli
class Bad:
    def __del__(self):
        os.abort()  # what a process group's thread does when the interpreter ends under it
kept = Bad()
def run(config):
    print("ran")
    atexit.register(print, "released")
    sys.exit({code}) if {code} else None
cli.importlib = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(run=run, check=lambda *_: None))
cli.run()
"""


@pytest.mark.parametrize("code", [0, 75])
def test_a_rank_ends_before_the_interpreter_does(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """What was registered for the end has run, what aborts in it has not, and the code is the recipe's."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    words = ["sft", "experiment=quickstart", "layout=cpu1", "out=/x"]
    command = [sys.executable, "-c", ABORTING.format(code=code), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (code, ["ran", "released"]), done.stderr


def test_a_crash_of_a_lone_process_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config) -> None:
        raise ZeroDivisionError("lr")

    recipe(monkeypatch, run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["sft", "experiment=quickstart", "layout=cpu1"])


FAILING = """
import os, signal, sys, time, types
from megatron_rlhf import cli
from megatron_rlhf.config import rules
def run(config):
    rank = os.environ["RANK"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a recipe saves at its next boundary, which never comes
    if {case!r} == "crash" and rank == "2":
        time.sleep(0.5)
        raise ZeroDivisionError("the cause")
    if {case!r} == "crash":
        time.sleep(1.0)
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1")
    if {case!r} == "bad input":
        time.sleep(0.5 if rank == "0" else 0)
        raise rules.BadInput("data.source is wrong")
    if rank == "3":
        raise rules.BadInput("this rank's disk is full")
    time.sleep(60)
cli.importlib = types.SimpleNamespace(import_module=lambda name: types.SimpleNamespace(run=run, check=lambda *_: None))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("case", "code", "first", "never"),
    [
        ("crash", 1, "rank 2 of 4 failed:\nTraceback", "Connection closed"),
        ("bad input", 2, "megatron-rlhf: data.source is wrong\n", "Traceback"),
        ("one rank's bad input", 2, "megatron-rlhf: this rank's disk is full\n", "Traceback"),
    ],
)
def test_the_rank_with_the_cause_speaks_and_only_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    case: str,
    code: int,
    first: str,
    never: str,
) -> None:
    (tmp_path / "failing_rank.py").write_text(FAILING.format(case=case))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    assert launch.run(4, ["quickstart", f"out={tmp_path}"], module="failing_rank") == code
    shown = capfd.readouterr().err
    assert shown.startswith(first)
    assert never not in shown
    assert shown.count("megatron-rlhf: ") == (code == 2)


def test_ranks_that_do_not_come_are_no_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and the watchdog's code, after which a job is queued again."""

    def alone(words: object) -> int:
        raise Absent("of 2 ranks 1 did not come within 600 s: 1")

    monkeypatch.setattr(cli, "_dispatch", alone)
    assert cli.main(["sft"]) == HUNG == 76
    assert capsys.readouterr().err == "megatron-rlhf: of 2 ranks 1 did not come within 600 s: 1\n"


def test_doctor_says_what_is_lost_and_survives_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("half an installation")

    parts = [
        doctor.Part("here", lambda: "2.1+cpu", "nothing", ">=2"),
        doctor.Part("old", lambda: "1.0", "the new", ">=2"),
        doctor.Part("gone", lambda: "", "speed"),
        doctor.Part("broken", broken, "more speed"),
    ]
    monkeypatch.setattr(doctor, "PARTS", parts)
    lines = [" ".join(line.split()) for line in doctor.report().splitlines()]
    assert lines == [
        "here 2.1+cpu",
        "old 1.0 (needs >=2) without the right one: the new",
        "gone missing without it: speed",
        "broken broken (OSError) without it: more speed",
    ]


def test_bad_input_is_a_value_error() -> None:
    assert issubclass(BadInput, ValueError)
