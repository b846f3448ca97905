"""Proves that the library as it was built, against this torch, loads and computes on the CPU under CUDA builds of other
versions of torch, with the same signatures, and that it can be built against theirs.

Each version is 3 to 4 GB from the package index and 5 to 7 GB on the disk, removed at the end; so versions are fetched
only when they are named: `make torches`, or `pytest tests/csrc/test_other_torch.py --torch 2.12.0`.

Not proved here: what the library computes on a GPU under them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlhf.ops import library
from tests.helpers import try_ops
from tests.helpers.checkout import copied


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test once a version."""
    metafunc.parametrize("version", metafunc.config.getoption("--torch") or [""], scope="module")


@pytest.fixture(scope="module")
def python(version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment that has torch of that version and nothing else; removed afterwards."""
    if not version:
        pytest.skip("no version of torch was named, and each is gigabytes to fetch: --torch 2.12.0")
    folder = tmp_path_factory.mktemp("torch") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    try:
        subprocess.run([folder / "bin/pip", "install", "-q", "--no-compile", f"torch=={version}"], check=True)
        yield folder / "bin/python"
    finally:
        shutil.rmtree(folder)


def _try_ops(python: Path, **environment: str) -> dict[str, Any]:
    """What the package says and computes there; it is no other than the one asked for."""
    env = {**os.environ, "PYTHONPATH": "", **environment}
    done = subprocess.run([python, try_ops.__file__], cwd=python.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["cuda"], f"{found['torch']} is no CUDA build"
    assert found["why_not"] == ""
    assert found["difference"] <= 1e-5
    return found


def test_one_build_serves_other_versions(version: str, python: Path) -> None:
    """This environment's library there."""
    if not library.loaded():
        pytest.skip(library.WHY_NOT)
    here = library.PATH.parents[2]
    found = _try_ops(python, PYTHONPATH=str(here))
    assert Path(found["file"]).is_relative_to(here)
    assert found["torch"].partition("+")[0] == version != torch.__version__.partition("+")[0]
    assert found["kernels"] == try_ops.kernels() != []
    assert found["schemas"] == try_ops.schemas()


def test_other_versions_headers_build_it(python: Path, tmp_path: Path) -> None:
    """pip builds apart, and finds that environment's torch."""
    if not shutil.which("g++"):
        pytest.skip("g++ was not found")
    env = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0a"}
    source = copied(tmp_path / "source")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", source], env=env, check=True)
    found = _try_ops(python)
    assert Path(found["file"]).is_relative_to(python.parents[1])
    assert "CPU" in found["kernels"]
