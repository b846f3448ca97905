"""Proves that nvcc compiles the kernels, without spills and within their registers, into 16-byte loads and stores.

Not proved here: anything on a GPU. Nothing ran on CUDA, so neither results (test_cuda_on_cpu.py looks at those on the
CPU) nor speed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LIMITS = {"logprob": 64, "sample": 56, "gae": 32}
"""Registers a thread: with 64 a block of 1,024 fits a multiprocessor."""
KERNELS = {"logprob": 12, "sample": 3, "gae": 1}
"""Entry points: each kernel for each dtype."""


@pytest.fixture(scope="session")
def nvcc() -> str:
    """nvcc; without it these tests are skipped."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return found or pytest.skip("nvcc was not found on the path nor in /usr/local/cuda")


def _folders(nvcc: str) -> Iterator[Path]:
    """Where a disassembler may lie beside nvcc: in Triton's wheel or in those that NVIDIA publishes."""
    yield Path(nvcc).resolve().parent
    for package, pattern in (("triton", "backends/nvidia/bin"), ("nvidia", "*/bin")):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            yield from Path(place).glob(pattern)


@pytest.fixture(scope="session")
def disassembler(nvcc: str) -> list[str]:
    """The command that prints a cubin's instructions; without one the tests that read them are skipped."""
    # cuobjdump calls nvdisasm, which needs nobody
    for tool, flag in (("nvdisasm", "-c"), ("cuobjdump", "-sass")):
        found = shutil.which(tool)
        for folder in _folders(nvcc):
            found = found or shutil.which(tool, path=str(folder))
        if found:
            return [found, flag]
    pytest.skip("neither nvdisasm nor cuobjdump was found: nvidia-cuda-nvdisasm, of the extra dev, brings one")


def _compiled(nvcc: str, kernel: str, architecture: str, cubin: Path) -> str:
    """What ptxas says of the kernel's functions."""
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin)]
    done = subprocess.run([*command, str(CSRC / kernel / f"{kernel}.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("kernel", ["logprob", "sample", "gae"])
@pytest.mark.parametrize(
    "architecture", ["90a", pytest.param("80", marks=pytest.mark.slow), pytest.param("100", marks=pytest.mark.slow)]
)
def test_registers_and_spills(kernel: str, architecture: str, nvcc: str, tmp_path: Path) -> None:
    """No function spills or has a stack frame, none uses more registers than its limit."""
    said = _compiled(nvcc, kernel, architecture, tmp_path / "cubin")
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(stacks) == len(registers) == KERNELS[kernel]
    assert set(stacks) == {("0", "0", "0")}
    assert max(registers) <= LIMITS[kernel]


@pytest.mark.parametrize("kernel", ["sample", pytest.param("logprob", marks=pytest.mark.slow)])
def test_rows_are_read_and_written_16_bytes_at_a_time(
    kernel: str, nvcc: str, disassembler: list[str], tmp_path: Path
) -> None:
    """Every function asks for at least two vectors before it needs one; the gradient stores vectors too."""
    _compiled(nvcc, kernel, "90a", tmp_path / "cubin")
    done = subprocess.run([*disassembler, tmp_path / "cubin"], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*(?:Function : |\.section\s+\.text\.)(\w+).*$", done.stdout, flags=re.MULTILINE)
    functions = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert len(functions) == KERNELS[kernel]
    for name, code in functions.items():
        vectors = re.findall(r"\b(?:LDG\.E\.128|MUFU\.\w+)", code)
        together = "".join("v" if "LDG" in instruction else "." for instruction in vectors)
        assert "vv" in together, f"{name} loads one vector at a time, or none"
        if "backward" in name:
            assert len(re.findall(r"\bSTG\.E\.128", code)) >= 3, f"{name} does not store its vectors whole"
