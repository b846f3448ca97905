"""Proves that the CUDA kernels compute what their equations say, by running their very source on the CPU, each thread
a fiber (csrc/testing/cuda_on_cpu.h), under the address and undefined-behaviour sanitizers, against loops in double;
and that these checks notice a kernel with a fault.

Not proved here: anything on a GPU. Nothing ran on CUDA: neither its memory model, nor races that no order of whole
stretches between barriers reveals, nor nvcc's own roundings (test_cuda_build.py compiles with it), nor speed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_rlhf.ops import noise
from megatron_rlhf.parallel import random

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O0", "-g1"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
STRICT = [*SANITIZERS, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
NARROW, WIDE = ["1", "3", "31", "1003"], ["6288", "50304"]

# fault: kernel that shows it, file, text, what stands in its place
FAULTS = {
    "missing barrier": ("sample", "device/reduce.cuh", "  __syncthreads();\n", ""),
    "dropped shuffle step": ("sample", "device/reduce.cuh", "distance = kWarp / 2", "distance = kWarp / 4"),
    "wrong stride": ("sample", "sample/sample.cuh", "row * slice.stride", "row * slice.width"),
    "off by one": ("sample", "device/row.cuh", "column(vectors) + thread", "column(vectors) + thread + 1"),
    "wrong constant": ("sample", "sample/sample.cuh", "0x846CA68B", "0x846CA68D"),
}
MORE_FAULTS = {
    "wrong stride of the reference": ("logprob", "logprob/logprob.cuh", "row * reference_stride", "row * slice.stride"),
    "wrong stride of the logits": ("logprob", "logprob/logprob.cuh", "row * slice.stride", "row * slice.width"),
    "wrong stride of the gradient": ("logprob", "logprob/logprob.cuh", "row * out_stride", "row * slice.stride"),
    "a vector too many": ("logprob", "device/row.cuh", "if (i >= cut.vectors)", "if (i > cut.vectors)"),
    "a vector too few": ("logprob", "device/row.cuh", "if (i >= cut.vectors)", "if (i + 1 >= cut.vectors)"),
    "an offset of 32 bits": ("logprob", "logprob/logprob.cuh", "row * slice.stride", "int(row * slice.stride)"),
    "a reference's offset of 32 bits": (
        "logprob",
        "logprob/logprob.cuh",
        "row * reference_stride",
        "int(row * reference_stride)",
    ),
    "a gradient's offset of 32 bits": ("logprob", "logprob/logprob.cuh", "row * out_stride", "int(row * out_stride)"),
    "a draw's offset of 32 bits": ("sample", "sample/sample.cuh", "row * slice.stride", "int(row * slice.stride)"),
    "head forgotten": ("logprob", "device/row.cuh", "if (thread < head) visit(thread);", ""),
    "alignment off by one": ("logprob", "device/row.cuh", "kWidth - past) %", "kWidth - past + 1) %"),
    "alignment of the gradient ignored": ("logprob", "logprob/logprob.cuh", "aligned(out + cut.head)", "true"),
    "alignment of the reference ignored": ("logprob", "logprob/logprob.cuh", "whole = aligned(y", "whole = y || (y"),
    "divergent barrier": (
        "logprob",
        "device/reduce.cuh",
        "of_warp[warp] = state;\n  __syncthreads();",
        "of_warp[warp] = state, __syncthreads();",
    ),
    "divergent shuffle": ("logprob", "device/reduce.cuh", "if (warp > 0)", "if (threadIdx.x > 15)"),
    "stale shared memory": ("logprob", "device/reduce.cuh", "lane * kWarp <", "lane <"),
    "one side of a merge not rescaled": ("logprob", "logprob/logprob.cuh", "    other.raise(to, base_2);\n", ""),
    "wrong ln 2": ("logprob", "device/cuda.cuh", "0.693147181f", "0.6931f"),
    "wrong log2(e)": ("logprob", "device/cuda.cuh", "1.44269504f", "1.4427f"),
    "wrong scale": ("logprob", "device/mass.cuh", "1.4426950408889634", "1.4427"),
    "inf - inf": ("logprob", "device/mass.cuh", "largest == -INFINITY ? 0 : largest", "largest"),
    "0 * inf in Z": ("logprob", "logprob/logprob.cuh", "fmaxf(d, -256.0f)", "d"),
    "0 * inf in D": ("logprob", "logprob/logprob.cuh", "product(few.policy.weigh(d), ", "few.policy.weigh(d) * ("),
    "0 * inf in the gradient": ("logprob", "logprob/logprob.cuh", "p == 0 ? 0 : ", ""),
    "ignored rows read": ("logprob", "logprob/logprob.cuh", "if (targets[row] < 0) return clear", "if (false) clear"),
    "padding not cleared": ("logprob", "logprob/logprob.cuh", "  clear(out + slice.columns", "  if (false) clear(out"),
    "target off by one": ("logprob", "logprob/logprob.cuh", "column == target ?", "column == target + 1 ?"),
    "entropy's slope of the wrong sign": ("logprob", "logprob/logprob.cuh", "d - mean, grad", "d + mean, grad"),
    "a gradient without its S": ("logprob", "logprob/logprob.cuh", "kLog2E) * per_s", "kLog2E)"),
    "KL's slope not centred": ("logprob", "logprob/logprob.cuh", "reference_d - mean_apart", "reference_d"),
    "temperature forgotten": ("logprob", "logprob/logprob.cuh", "-scale.inverse * p", "-p"),
    "shift of the hash": ("sample", "sample/sample.cuh", "(bits ^ (bits >> 15))", "(bits ^ (bits >> 16))"),
    "one key twice": ("sample", "sample/sample.cuh", "keys[slice.rows + row]", "keys[row]"),
    "noise by the local column": ("sample", "sample/sample.cuh", "vocab_start + column)", "column)"),
    "endless noise": ("sample", "sample/sample.cuh", "1 - 0x1p-24f", "1.0f"),
    "the last of equals": ("sample", "sample/sample.cuh", "other_column < column", "other_column > column"),
    "dropped step of the scan": ("gae", "gae/gae.cuh", "distance < kWarp;", "distance < kWarp / 2;"),
    "scan beyond the warp": ("gae", "gae/gae.cuh", "lane + distance < kWarp", "lane + distance <= kWarp"),
    "wrong lane handed on": ("gae", "gae/gae.cuh", "value, 0);\n  }", "value, 1);\n  }"),
    "NaN across the mask": ("gae", "gae/gae.cuh", "if (outer.factor == 0) return outer;", ""),
    "mask ignored": ("gae", "gae/gae.cuh", "t < width && mask[place] != 0", "t < width"),
    "rows beyond the last": ("gae", "gae/gae.cuh", "if (row >= rows) return;", ""),
}


@pytest.fixture(scope="session")
def compiler() -> str:
    """g++ with its sanitizers; without them these tests are skipped."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("g++ was not found")
    probe = [found, *SANITIZERS, "-x", "c++", "-", "-o", "/dev/null"]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode:
        pytest.skip("g++ has no address or undefined-behaviour sanitizer (libasan, libubsan)")
    return found


@pytest.fixture(scope="session")
def checkers(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the checks' object files, each compiled once."""
    return tmp_path_factory.mktemp("checkers")


def _compile(compiler: str, source: Path, to: Path, *flags: str) -> None:
    command = [compiler, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _build(compiler: str, kernel: str, csrc: Path, checkers: Path, *flags: str) -> Path:
    """The check of `kernel` in the tree `csrc`, as a program."""
    check = checkers / f"test_{kernel}{'.sanitized' if flags else ''}.o"
    if not check.exists():
        _compile(compiler, ROOT / f"csrc/testing/test_{kernel}.cpp", check, *flags)
    object_file, program = csrc.parent / f"{kernel}.o", csrc.parent / kernel
    _compile(compiler, csrc / f"{kernel}/{kernel}.cu", object_file, *flags)
    subprocess.run([compiler, *flags, str(object_file), str(check), "-o", str(program)], check=True)
    return program


def _run(program: Path, widths: Sequence[str]) -> subprocess.CompletedProcess[str]:
    arguments = [*_bits_of_noise(), ":", *widths] if program.name == "sample" else widths
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, env=environment)


def _bits_of_noise() -> list[str]:
    """Keys, words and the bits that ops/noise.py draws for them."""
    sequences, positions = torch.tensor([0, 5, 2**33 + 1]), torch.tensor([0, 17, 2047])
    keys_23 = random.row_keys(2**40 + 7, 3, sequences, positions)
    words_4 = torch.tensor([0, 1, 50_303, 128_255])
    bits_34 = noise._hash(keys_23[:, :, None], noise.mix(words_4 ^ noise._COLUMNS))
    quadruples = [(*keys_23[:, i], words_4[j], bits_34[i, j]) for i in range(3) for j in range(4)]
    return [str(int(number)) for quadruple in quadruples for number in quadruple]


def _copied(csrc: Path) -> Path:
    shutil.copytree(ROOT / "csrc", csrc)
    return csrc


@pytest.mark.parametrize("kernel", ["logprob", "sample", "gae"])
def test_kernels_are_their_equations(kernel: str, compiler: str, checkers: Path, tmp_path: Path) -> None:
    """Odd widths, strides and alignments, every dtype, three orders of the threads; no sanitizer speaks."""
    program = _build(compiler, kernel, _copied(tmp_path / "csrc"), checkers, *STRICT)
    done = _run(program, ["1", "3", "31", "33", "64", "257"] if kernel == "gae" else NARROW)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["logprob", "sample", "gae"])
def test_kernels_at_real_widths(kernel: str, compiler: str, checkers: Path, tmp_path: Path) -> None:
    """A shard of a vocabulary and a whole one."""
    program = _build(compiler, kernel, _copied(tmp_path / "csrc"), checkers, *STRICT)
    done = _run(program, ["6288"] if kernel == "gae" else WIDE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("fault", [*FAULTS, *(pytest.param(fault, marks=pytest.mark.slow) for fault in MORE_FAULTS)])
def test_faults_are_noticed(fault: str, compiler: str, checkers: Path, tmp_path: Path) -> None:
    """A kernel with the fault fails its check, without a sanitizer's help."""
    kernel, name, text, instead = (FAULTS | MORE_FAULTS)[fault]
    csrc = _copied(tmp_path / "csrc")
    source = (csrc / name).read_text()
    assert text in source, f"{name} no longer has: {text}"
    (csrc / name).write_text(source.replace(text, instead))
    assert _run(_build(compiler, kernel, csrc, checkers), NARROW).returncode != 0
