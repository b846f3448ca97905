"""Proves what the verb `submit` shows, asks, submits and refuses.

sbatch is a small program made for the test. Not proved here: that a SLURM runs what is submitted (tests/slurm).
"""

from __future__ import annotations

import io
from pathlib import Path
from unittest import mock

import pytest

from megatron_rlhf import cli
from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.recipes import inputs

SBATCH = """#!/usr/bin/env bash
echo "$@" >>{folder}/asked
if grep -q refuse {folder}/mode 2>/dev/null; then echo 'sbatch: error: invalid partition' >&2; exit 1; fi
echo $((40 + $(wc -l <{folder}/asked)))
"""


class Terminal(io.StringIO):
    """A person who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an sbatch; `asked` in it holds what it was called with. No data is asked for."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH.format(folder=program.parent))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(inputs, "check", lambda verb, config, made=(): None)
    return program.parent


def submit(out: Path, *words: str) -> int:
    return cli.main(["submit", "experiment=quickstart", f"out={out}", "slurm=cpu", *words])


def test_a_job_is_shown_then_submitted(sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The plan, the job's number, and how to watch it."""
    out = tmp_path / "run"
    assert submit(out, "ppo", "--yes", "ppo.clip=0.1") == 0
    said = capfd.readouterr().out
    assert "4 ranks on 2 nodes: 2 ranks a node, no GPUs" in said and "policy tp2 pp2 dp1, generate tp2 pp1 dp2" in said
    assert "reshard tp2 pp2 dp1 -> tp2 pp1 dp2" in said
    assert f"job 41: ppo, log {out}/slurm/ppo-41.log" in said and "squeue --jobs 41" in said
    assert (sbatch / "asked").read_text() == f"--parsable {out}/slurm/ppo.sbatch\n"
    script = (out / "slurm" / "ppo.sbatch").read_text()
    assert script.endswith(f"job.sh ppo out={out} experiment=quickstart ppo.clip=0.1\n")


def test_a_run_that_does_not_fit_its_gpus_is_refused(
    sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With what would fit; --anyway takes the plan for wrong, and where it fits the plan is shown."""
    words = ["submit", "ppo", "--yes", f"out={tmp_path / 'run'}", "experiment=instructgpt_6b"]
    assert cli.main([*words, "layout=8gpu"]) == 2
    said = capfd.readouterr()
    assert "the plan of ppo does not fit the GPUs of `cluster`: No change of one setting" in said.err
    assert "Or add --anyway" in said.err and "Traceback" not in said.err and not (sbatch / "asked").exists()
    assert cli.main([*words, "layout=64gpu"]) == 0
    assert "Memory of the busiest GPU" in capfd.readouterr().out
    assert cli.main([*words, "layout=8gpu", "--anyway"]) == 0
    assert "DOES NOT FIT" in capfd.readouterr().out
    assert len((sbatch / "asked").read_text().splitlines()) == 2


def test_a_pipeline_is_three_jobs_each_after_the_one_before(sbatch: Path, tmp_path: Path) -> None:
    assert submit(tmp_path / "run", "pipeline", "--yes") == 0
    folder = tmp_path / "run" / "slurm"
    assert (sbatch / "asked").read_text().splitlines() == [
        f"--parsable {folder}/sft.sbatch",
        f"--parsable --dependency=afterok:41 {folder}/reward.sbatch",
        f"--parsable --dependency=afterok:42 {folder}/ppo.sbatch",
    ]


@pytest.mark.parametrize(("typed", "jobs"), [("y\n", 1), ("n\n", 0), ("\n", 0)])
def test_a_person_is_asked(
    sbatch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    typed: str,
    jobs: int,
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert submit(tmp_path / "run", "sft") == 0
    said = capfd.readouterr().out
    assert "Submit? [y/N]" in said and ("nothing was submitted" in said) == (jobs == 0)
    assert (sbatch / "asked").exists() == bool(jobs)
    assert (tmp_path / "run").exists() == bool(jobs), "nothing is written unless it is submitted"


def test_a_dry_run_prints_the_script_and_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(tmp_path / "run", "pipeline", "--dry-run") == 0
    said = capfd.readouterr().out
    assert said.startswith("#!/usr/bin/env bash\n") and said.count("#SBATCH --job-name=mrlhf-") == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "submit takes one of quickstart, pretrain, sft,"),
        (("train",), "or pipeline, not 'train'; write for example submit ppo experiment=quickstart"),
        (("sft", "ppo"), "not 'sft ppo'"),
        (("ppo", "--now"), "flag '--now' is unknown"),
        (("ppo",), "there is no terminal to ask on; add --yes"),
        (("ppo", "--yes", "slurm.tasks=3"), "write for example slurm.tasks=2"),
        (("ppo", "--yes", "slurm.attempts=0"), "slurm.attempts is 0; it must be at least 1"),
        (("ppo", "--yes", "slurm=none"), "slurm=none is unknown"),
        (("ppo", "--yes", "ppo.episodes=63"), "ppo.episodes=63 is no multiple"),
        (("ppo", "--yes", "out=/tmp/a b"), "sbatch takes no path with blanks"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_submitted(
    sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    assert submit(tmp_path / "run", *words) == 2
    said = capfd.readouterr().err
    assert sentence in said and "Traceback" not in said and said.count("\n") == 1
    assert not (sbatch / "asked").exists()


def test_what_sbatch_says_is_handed_on(sbatch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (sbatch / "mode").write_text("refuse")
    assert submit(tmp_path / "run", "ppo", "--yes") == 2
    assert f"sbatch refused {tmp_path}/run/slurm/ppo.sbatch: sbatch: error: invalid partition" in capfd.readouterr().err


def test_missing_inputs_and_a_missing_sbatch_are_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(tmp_path / "run", "ppo", "--yes") == 2
    assert (
        "there is no sbatch on this machine's PATH; submit where SLURM is, or add --dry-run" in capfd.readouterr().err
    )
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert submit(tmp_path / "run", "ppo", "--yes") == 2
    assert "megatron-rlhf prepare" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_pipeline_looks_for_what_no_job_of_it_makes(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(inputs, "check", lambda verb, config, made=(): asked.append((verb, made)))
    assert submit(tmp_path / "run", "pipeline", "--yes") == 0
    assert asked == [("sft", ()), ("reward", ("sft",)), ("ppo", ("rl_start", "reward"))]


def test_weights_that_an_earlier_job_makes_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "Tokenizer", mock.MagicMock())
    monkeypatch.setattr(inputs, "_rows", lambda path: None)
    config = load("reward", ["experiment=quickstart", f"out={tmp_path}"])
    with pytest.raises(BadInput, match="sft"):
        inputs.check("reward", config)
    inputs.check("reward", config, made=("sft",))


def test_a_file_of_settings_says_what_a_site_is_like(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.yaml").write_text("partition: gpu\naccount: lab\ntasks: 2\n")
    words = ["submit", "sft", "experiment=quickstart", f"slurm={tmp_path}/site.yaml", "slurm.account=mine", "--dry-run"]
    assert cli.main(words) == 0
    said = capfd.readouterr().out
    assert "--partition=gpu" in said and "--account=mine" in said and "--nodes=2" in said
    (tmp_path / "site.yaml").write_text("time: 24:00:00\n")
    assert cli.main(words) == 2
    assert "'slurm.time' is read as 86400, it must be text; write it in quotes" in capfd.readouterr().err
    (tmp_path / "site.yaml").write_text("queue: gpu\n")
    assert cli.main(words) == 2
    assert "setting 'slurm.queue' is unknown" in capfd.readouterr().err
