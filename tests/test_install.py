"""Proves that the package installs, as a wheel and editable, on a machine with g++ and nvcc, with g++ alone and with no
compiler: what was built and why not the rest is said, what was installed runs from any folder, and nothing else comes
along. Proves too what `pip install .` does, where pip builds apart from the environment that it installs into.

A machine is a folder of programs that is the whole path. An environment is a virtual one without any package, given
links to those of the interpreter that runs the tests, so that nothing large is fetched; only in the test of a build
apart does pip ask its index, for setuptools.

Not proved here: that pip can get torch and the other dependencies (`make` does, before any test runs), other compilers
than g++, and anything on a GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from megatron_rlhf.ops import library
from tests.helpers.checkout import ROOT, copied

PACKAGES = Path(sysconfig.get_path("purelib"))
TORCH = ("torch", "torchgen", "functorch")
NO_COMPILER = "the slower Python references (no C++ compiler: g++ was not found)"
NO_TORCH = "the slower Python references (torch >= 2.10 was not there yet: install this package again)"
MACHINES = {
    "g++ and nvcc": (("g++", "as", "ld", "nvcc"), ["CPU", "CUDA"], "CPU and CUDA"),
    "g++ alone": (("g++", "as", "ld"), ["CPU"], "CPU (CUDA: nvcc was not found)"),
    "no compiler": ((), [], NO_COMPILER),
}
"""Its programs, the devices it builds kernels for, and what the doctor says."""
QUICK = {("no compiler", "wheel")}
CASES = [
    pytest.param(machine, kind, id=f"{machine}, {kind}", marks=[] if (machine, kind) in QUICK else pytest.mark.slow)
    for machine in MACHINES
    for kind in ("wheel", "editable")
]


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment on a machine."""

    folder: Path
    machine: dict[str, str]
    """The environment variables."""

    def run(self, program: str, *words: str | Path, cwd: Path | None = None) -> str:
        """What one of the environment's programs prints; it succeeds."""
        command = [str(self.folder / "bin" / program), *map(str, words)]
        done = subprocess.run(command, cwd=cwd or self.folder, env=self.machine, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *words: str | Path) -> str:
        """What pip prints."""
        return self.run("python", "-m", "pip", "--disable-pip-version-check", *words)

    def doctor(self) -> str:
        """What the doctor says of the kernels."""
        said = self.run("python", "-m", "megatron_rlhf", "doctor")
        return next(line for line in said.splitlines() if line.startswith("kernels ")).partition(" ")[2].strip()

    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def link(self, *, torch: bool) -> None:
        """Gives it the packages of this interpreter, either torch's alone or all the others: never ours."""
        for entry in PACKAGES.iterdir():
            name = re.split(r"[-.]", entry.name)[0].lower()
            ours = name.startswith(("megatron_rlhf", "__editable__", "_editable_impl_")) or name == "__pycache__"
            if not ours and (name in TORCH) == torch and not (self.packages() / entry.name).exists():
                (self.packages() / entry.name).symlink_to(entry)


def environment(folder: Path, programs: tuple[str, ...] = (), *, torch: bool = True) -> Environment:
    """A virtual environment on a machine that has `programs` and no others; skips where this one lacks them."""
    for needed in ("pip", "setuptools"):
        # find_spec("pip") would make setuptools' hack give way to the old distutils in this process
        if not (PACKAGES / needed).is_dir():
            pytest.skip(f"{needed} is not installed in this environment")
    tools = folder / "programs"
    tools.mkdir(parents=True)
    for name in programs:
        found = shutil.which(name) or (name == "nvcc" and shutil.which("/usr/local/cuda/bin/nvcc"))
        if not found:
            pytest.skip(f"{name} was not found")
        (tools / name).write_text(f'#!/bin/sh\nexec "{found}" "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    hidden = ("CXX", "CUDA_HOME", "CUDA_PATH", "MRLHF_BUILD", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    machine = {name: value for name, value in os.environ.items() if name not in hidden}
    # one architecture: the three of the default take three times as long
    machine |= {"PATH": str(tools), "TORCH_CUDA_ARCH_LIST": "9.0a"}
    venv.create(folder / "venv", symlinks=True)
    made = Environment(folder / "venv", machine)
    made.link(torch=False)
    if torch:
        made.link(torch=True)
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout holds, without builds; the cases build in it one after another, each over the last."""
    return copied(tmp_path_factory.mktemp("source") / "megatron-rlhf")


def check(environment: Environment, *, kernels: list[str], says: str, at: Path) -> None:
    """The package at `at`, and no other, runs from another folder: doctor, help, configs, SLURM scripts, every op."""
    assert environment.doctor() == says
    assert "  quickstart " in environment.run("megatron-rlhf", "--help")
    words = ("model=gpt_tiny", "layout.policy=tp2", "layout.generate=tp1", "cluster=h100", "--json")
    planned = json.loads(environment.run("megatron-rlhf", "plan", "--reshard-only", *words))
    assert planned["recv_bytes_max"] > 0
    job = environment.run("megatron-rlhf", "submit", "sft", "experiment=quickstart", "--dry-run").splitlines()[-1]
    assert Path(job.split()[2]).name == "job.sh" and Path(job.split()[2]).is_file()
    found: dict[str, Any] = json.loads(environment.run("python", ROOT / "tests/helpers/try_ops.py"))
    assert Path(found["file"]).parent == at
    assert found["kernels"] == kernels
    assert bool(found["why_not"]) == (not kernels) and (kernels or found["why_not"] in says)
    assert found["difference"] <= 1e-5


def contents(wheel: Path) -> set[str]:
    """The files of a wheel, its metadata apart."""
    return {name for name in ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")}


def expected(*, built: bool) -> set[str]:
    """What a wheel should hold: the package, its configs and SLURM scripts, what the build left, and nothing else."""
    package = {file.relative_to(ROOT).as_posix() for file in (ROOT / "megatron_rlhf").rglob("*.py")}
    configs = {f"megatron_rlhf/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").rglob("*.yaml")}
    left = {"megatron_rlhf/ops/kernels.json"} | ({"megatron_rlhf/ops/_kernels.so"} if built else set())
    scripts = {f"megatron_rlhf/slurm/{file.name}" for file in (ROOT / "slurm").iterdir()}
    return package | configs | scripts | left


@pytest.mark.parametrize(("machine", "kind"), CASES)
def test_installs(machine: str, kind: str, source: Path, tmp_path: Path) -> None:
    """In an environment that has torch, pip builds with it (--no-build-isolation) and asks no index."""
    programs, kernels, says = MACHINES[machine]
    target = environment(tmp_path, programs)
    plain = ("--no-index", "--no-deps", "--no-build-isolation")
    if kind == "editable":
        target.pip("install", *plain, "-e", source)
        check(target, kernels=kernels, says=says, at=source / "megatron_rlhf")
        return
    target.pip("wheel", *plain, "-w", tmp_path / "wheels", source)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert re.fullmatch(r"megatron_rlhf-[\d.]+\w*-py3-none-\w+\.whl", wheel.name)
    assert contents(wheel) == expected(built=bool(kernels))
    target.pip("install", "--no-index", "--no-deps", wheel)
    check(target, kernels=kernels, says=says, at=target.packages() / "megatron_rlhf")


@pytest.mark.slow
def test_pip_builds_apart(source: Path, tmp_path: Path) -> None:
    """Without torch the install works, fetches no torch for its build, and the doctor says what to do: install again.

    With torch, the same command finds its headers from within pip's own environment, and fetches no dependency.
    """
    target = environment(tmp_path, MACHINES["g++ alone"][0], torch=False)
    try:
        target.pip("install", "--no-deps", source)
    except AssertionError as error:
        if "for setuptools" not in str(error):
            raise
        pytest.skip("pip reached no index that has setuptools")
    assert not (target.packages() / "torch").exists()
    assert target.doctor() == NO_TORCH
    target.link(torch=True)
    said = target.pip("install", source)
    assert "Requirement already satisfied: torch" in said
    assert not re.search(r"^\s*(Collecting|Downloading)", said, re.MULTILINE), said
    at = target.packages() / "megatron_rlhf"
    check(target, kernels=["CPU"], says=MACHINES["g++ alone"][2], at=at)


def test_the_tests_run_on_an_installation_with_kernels() -> None:
    """Where setup.py made this environment's package and there is g++, it has kernels: no test skips for them."""
    if not library.REPORT.exists():
        pytest.skip("setup.py built nothing here: this is a checkout that is not installed")
    report = json.loads(library.REPORT.read_text(encoding="utf-8"))
    if "MRLHF_BUILD=none" in report["why"] or not shutil.which("g++"):
        pytest.skip(f"g++ was not there, or not to be used: {report['why']}")
    assert "cpu" in report["built"] and not library.WHY_NOT, (report, library.WHY_NOT)
