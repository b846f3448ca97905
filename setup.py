"""Builds the package and its kernels; its metadata stands in pyproject.toml.

The kernels (csrc/) become one library, megatron_rlhf/ops/_kernels.so: the CPU's where a C++17 compiler is, CUDA's too
where nvcc is. It is bound to LibTorch's stable ABI and to no version of Python: one build serves any torch >= 2.10.
Where it cannot be built the package installs all the same and computes in Python. What was built, and why not the rest,
is printed, and written to megatron_rlhf/ops/kernels.json for `megatron-rlhf doctor`. Read from the environment:

MRLHF_BUILD           none, cpu, cuda (both, or fail), auto (the default: what can be built, never failing)
TORCH_CUDA_ARCH_LIST  as torch reads it, for example "9.0a"; the default is "8.0 9.0a 10.0"
CXX, CUDA_HOME        the compiler, and CUDA's folder
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAME = "megatron_rlhf.ops._kernels"
REPORT = "kernels.json"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
# What lets a compiler make vectors of plain arithmetic; infinities and NaN keep their meaning.
MATH = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
X86 = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
}
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
ARCHITECTURES = "8.0 9.0a 10.0"


class Impossible(Exception):
    """Why something cannot be built, in one line."""


def torch_folder() -> Path:
    """The folder of the torch that the package will run with; torch is not imported.

    pip builds in an environment of its own, where torch cannot be imported, with the interpreter it installs for:
    sysconfig still says where that one keeps its packages.
    """
    places = [sysconfig.get_path(name) for name in ("platlib", "purelib")]
    for place in dict.fromkeys([*places, *sys.path]):
        folder = Path(place or ".") / "torch"
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    raise Impossible("torch >= 2.10 was not there yet: install this package again")


def compiler() -> list[str]:
    """The C++ compiler's command."""
    command = os.environ.get("CXX", "").split()
    if command and shutil.which(command[0]):
        return command
    if not command:
        for name in ("g++", "clang++", "c++"):
            if shutil.which(name):
                return [name]
    raise Impossible(f"no C++ compiler: {command[0] if command else 'g++'} was not found")


def cuda_folder() -> Path:
    """CUDA's folder, with nvcc and its static runtime."""
    found = shutil.which("nvcc")
    # nvcc on the path may be a script that stands elsewhere, so its own folder comes last
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", found and str(Path(found).resolve().parents[1])]
    if not found and not os.environ.get("CUDA_HOME"):
        raise Impossible("nvcc was not found")
    for place in filter(None, places):
        if (Path(place) / "bin/nvcc").exists():
            return Path(place)
    raise Impossible("nvcc was found, CUDA's folder was not; set CUDA_HOME")


def architectures() -> list[str]:
    """nvcc's words for TORCH_CUDA_ARCH_LIST."""
    words: list[str] = []
    for name in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES):
        known = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if known is None:
            raise Impossible(f"TORCH_CUDA_ARCH_LIST has '{name}'; it needs numbers such as 9.0a")
        number = known[1] + known[2]
        words.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if known[3]:
            words.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return words


class Build(build_ext):
    """Compiles csrc/ without torch and without setuptools' idea of a Python extension."""

    def run(self) -> None:
        """Builds what MRLHF_BUILD asks for, and writes what became of it."""
        asked = os.environ.get("MRLHF_BUILD", "auto")
        if asked not in ("none", "cpu", "cuda", "auto"):
            raise SystemExit(f"MRLHF_BUILD is '{asked}'; it is none, cpu, cuda or auto")
        target = Path(self.get_ext_fullpath(NAME))
        target.parent.mkdir(parents=True, exist_ok=True)
        report = target.with_name(REPORT)
        for old in (target, report):
            old.unlink(missing_ok=True)
        built: list[str] = []
        why = self._kernels(asked, target, built)
        words = f"kernels built: {', '.join(built) or 'none'}" + (f" ({why})" if why else "")
        print(f"megatron-rlhf: {words}", file=sys.stderr)
        report.write_text(json.dumps({"built": built, "why": why}) + "\n", encoding="utf-8")

    def _kernels(self, asked: str, target: Path, built: list[str]) -> str:
        """Fills `built` and returns why not all of it."""
        if asked == "none":
            return "MRLHF_BUILD=none"
        folder = Path(self.build_temp) / "kernels"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            objects = self._objects(folder)
        except Impossible as reason:
            return self._refused(asked in ("cpu", "cuda"), reason)
        why = "MRLHF_BUILD=cpu" if asked == "cpu" else ""
        if asked != "cpu":
            try:
                self._link(target, [*objects, *self._cuda_objects(folder)], cuda_folder())
                built += ["cpu", "cuda"]
                return ""
            except Impossible as reason:
                why = self._refused(asked == "cuda", Impossible(f"CUDA: {reason}"))
        try:
            self._link(target, [*objects, self._binding(folder, cuda=False)], None)
        except Impossible as reason:
            return self._refused(asked == "cpu", reason)
        built.append("cpu")
        return why

    @staticmethod
    def _refused(wanted: bool, reason: Impossible) -> str:
        if wanted:
            raise SystemExit(f"MRLHF_BUILD={os.environ['MRLHF_BUILD']}: {reason}")
        return str(reason)

    def _objects(self, folder: Path) -> list[Path]:
        """The CPU's kernels, once for each instruction set."""
        torch_folder()
        command, jobs = compiler(), {}
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        common = [*command, *FLAGS, *MATH, *(["-DMRLHF_X86"] if x86 else [])]
        for source in sorted((ROOT / "csrc").rglob("*_cpu.cpp")):
            if '"../rows.h"' not in source.read_text(encoding="utf-8"):
                jobs[folder / f"{source.stem}.o"] = [*common, str(source)]
                continue
            for name, flags in X86.items() if x86 else {"generic": []}.items():
                jobs[folder / f"{source.stem}.{name}.o"] = [*common, *flags, f"-DMRLHF_ISA={name}", str(source)]
        jobs[folder / "cpu.o"] = [*common, str(ROOT / "csrc/cpu.cpp")]
        return _compiled(jobs)

    def _binding(self, folder: Path, cuda: bool) -> Path:
        """The binding, for a library with or without CUDA."""
        headers = ["-isystem", str(torch_folder() / "include")]
        command = [*compiler(), *FLAGS, *TORCH, *headers, *(["-DMRLHF_CUDA"] if cuda else [])]
        return _compiled({folder / f"binding{'_cuda' if cuda else ''}.o": [*command, str(ROOT / "csrc/binding.cpp")]})[
            0
        ]

    def _cuda_objects(self, folder: Path) -> list[Path]:
        """CUDA's kernels and the binding that knows them."""
        sources = sorted((ROOT / "csrc").glob("*/*.cu"))
        if not sources:
            raise Impossible("there are no CUDA sources")
        command = [str(cuda_folder() / "bin/nvcc"), "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += ["-Icsrc", f"-ccbin={compiler()[0]}", *architectures()]
        found = _compiled({folder / f"{source.stem}.cu.o": [*command, str(source)] for source in sources})
        return [*found, self._binding(folder, cuda=True)]

    @staticmethod
    def _link(target: Path, objects: list[Path], cuda: Path | None) -> None:
        libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
        if cuda is not None:
            places = (cuda / "lib64", cuda / "targets/x86_64-linux/lib", cuda / "targets/sbsa-linux/lib")
            runtime = next((path for place in places if (path := place / "libcudart_static.a").exists()), None)
            if runtime is None:
                raise Impossible(f"{cuda} has no libcudart_static.a")
            libraries += [str(runtime), "-ldl", "-lrt", "-lpthread"]
        _run([*compiler(), "-shared", *map(str, objects), *libraries, "-Wl,--as-needed", "-o", str(target)])

    def get_ext_filename(self, fullname: str) -> str:
        """The library's file: it knows no Python, so its name has none of Python's tags."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        """What a wheel takes along."""
        target = Path(self.get_ext_fullpath(NAME))
        return [str(path) for path in (target, target.with_name(REPORT)) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing: an editable install has the library beside the code already."""
        return {}


class Wheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tags."""
        return ("py3", "none", super().get_tag()[2])


def _compiled(jobs: dict[Path, list[str]]) -> list[Path]:
    """The object files of commands that each lack only '-c -o FILE'; as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda job: _run([*job[1], "-c", "-o", str(job[0])]), jobs.items()))
    return list(jobs)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [f"it ended with {done.returncode}"]
        raise Impossible(f"{Path(command[0]).name} failed: {said[0].strip()}")


# configs/ stands beside the package, where people look for it; a wheel carries it as megatron_rlhf/configs, so that it
# never lands in site-packages under a name as common as "configs". config/load.py looks in both places. So it is with
# slurm/ and submit/script.py.
setup(
    packages=[
        *find_packages(include=["megatron_rlhf", "megatron_rlhf.*"]),
        *("megatron_rlhf.configs", "megatron_rlhf.slurm"),
    ],
    package_dir={"megatron_rlhf.configs": "configs", "megatron_rlhf.slurm": "slurm"},
    package_data={"megatron_rlhf.configs": ["**/*.yaml"], "megatron_rlhf.slurm": ["*.sh", "*.sbatch"]},
    ext_modules=[Extension(NAME, sources=[])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
