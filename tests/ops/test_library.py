"""Proves that the kernels are found or their absence explained, that torch.compile accepts the ops, and that setup.py
builds what it can and says why not the rest, with no compiler at all too.

Not proved here: whole installations (test_install.py), and loading under other versions of torch
(csrc/test_other_torch.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_rlhf import doctor
from megatron_rlhf.ops import library, logprob, sample

ROOT = Path(__file__).resolve().parents[2]


def test_why_not_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing built, a build without a compiler, and a file that is no library."""
    monkeypatch.setattr(library, "PATH", tmp_path / "_kernels.so")
    monkeypatch.setattr(library, "REPORT", tmp_path / "kernels.json")
    assert library._load() == "the kernels were not built"
    library.REPORT.write_text('{"built": [], "why": "no C++ compiler: g++ was not found"}')
    assert library._load() == "no C++ compiler: g++ was not found"
    library.PATH.write_text("no library")
    assert "_kernels.so" in library._load() and "\n" not in library._load()


def test_doctor_says_what_was_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "ops" / "kernels.json"
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert doctor._kernels() == ""
    report.parent.mkdir()
    for built, why, wanted in (
        (["cpu", "cuda"], "", "CPU and CUDA"),
        (["cpu"], "CUDA: nvcc was not found", "CPU (CUDA: nvcc was not found)"),
        ([], "MRLHF_BUILD=none", "the slower Python references (MRLHF_BUILD=none)"),
    ):
        report.write_text(json.dumps({"built": built, "why": why}))
        assert doctor._kernels() == wanted


def test_references_are_used_inside_only(kernels: None, device: str) -> None:
    x = torch.zeros(2, 3, device=device)
    assert library.serves(x) and not library.serves(x.int()) and not library.serves(x.t().contiguous().t())
    with library.references():
        assert not library.serves(x)
    assert library.serves(x)


def test_torch_compile_takes_the_ops_whole(kernels: None, device: str) -> None:
    """Traced without a break, with the fakes for shapes; the same numbers."""

    def numbers(x: torch.Tensor, targets: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = logprob.stats(x * 2, targets, vocab_start=0, columns=33, temperature=1.0)
        return found + 1, sample.best(x, keys, vocab_start=0, columns=33, temperature=1.0)

    torch._dynamo.reset()
    source = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 1 << 32, (2, 4), generator=source)
    given = [x.to(device) for x in (torch.randn(4, 33, generator=source), torch.arange(4), keys)]
    compiled = torch.compile(numbers, backend="aot_eager", fullgraph=True)(*given)
    assert all(torch.equal(ours, plain) for ours, plain in zip(compiled, numbers(*given), strict=True))


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """setup.py as a module that sets nothing up."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    spec = importlib.util.spec_from_file_location("recipe_of_the_build", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    source = (ROOT / "setup.py").read_text(encoding="utf-8").rpartition("\nsetup(")[0]
    module.__dict__["__file__"] = str(ROOT / "setup.py")
    exec(compile(source, "setup.py", "exec"), module.__dict__)
    return module


def test_architectures_are_read_as_torch_reads_them(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert [word.rpartition("sm_")[2] for word in recipe.architectures()] == ["80", "90a", "100"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0+PTX")
    assert [word.rpartition("code=")[2] for word in recipe.architectures()] == ["sm_86", "sm_90", "compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(recipe.Impossible, match="Hopper"):
        recipe.architectures()


Builder = Callable[..., tuple[subprocess.CompletedProcess[str], Path]]


@pytest.fixture
def build(recipe: ModuleType, tmp_path: Path) -> Builder:
    """Runs setup.py build_ext into a folder of its own; returns how it ended and where the result lies."""

    def run(**environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
        command += ["--build-temp", str(tmp_path / "temp")]
        env = {**os.environ, **environment}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        return done, tmp_path / "lib" / "megatron_rlhf" / "ops"

    return run


def test_without_a_compiler_nothing_fails(build: Builder, tmp_path: Path) -> None:
    """auto says why; cpu, which was asked for, ends with a sentence."""
    done, folder = build(PATH=str(tmp_path), MRLHF_BUILD="auto", CXX="", CUDA_HOME="")
    assert done.returncode == 0, done.stderr
    why = "no C++ compiler: g++ was not found"
    assert f"kernels built: none ({why})" in done.stderr
    assert json.loads((folder / "kernels.json").read_text()) == {"built": [], "why": why}
    assert not (folder / "_kernels.so").exists()
    done, _ = build(PATH=str(tmp_path), MRLHF_BUILD="cpu", CXX="", CUDA_HOME="")
    assert done.returncode != 0 and f"MRLHF_BUILD=cpu: {why}" in done.stderr
    done, _ = build(MRLHF_BUILD="some")
    assert done.returncode != 0 and "it is none, cpu, cuda or auto" in done.stderr


def test_a_compiler_that_fails_is_quoted(build: Builder, tmp_path: Path) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    done, folder = build(CXX=str(broken), MRLHF_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "kernels.json").read_text())["why"].endswith("error: no such thing")


@pytest.mark.slow
def test_the_cpu_is_built_within_a_minute(recipe: ModuleType, build: Builder) -> None:
    """And loads in a fresh process, with nvcc out of sight."""
    try:
        recipe.compiler(), recipe.torch_folder()
    except recipe.Impossible as reason:
        pytest.skip(str(reason))
    done, folder = build(MRLHF_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    code = f"import torch; torch.ops.load_library({str(folder / '_kernels.so')!r}); torch.ops.megatron_rlhf.gae"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
