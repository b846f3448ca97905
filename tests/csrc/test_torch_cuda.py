"""Proves that torch's CUDA stream is found where a torch with CUDA has loaded its library out of sight of others, as
torch does, and that its absence and its errors are answers and no crash.

Not proved here: a real torch with CUDA, whose library stands in as a few lines of C++.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TORCH = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(100L + device);
  return device == 7;
}"""
PROBE = """
#include "torch_cuda.h"
extern "C" long stream_of(int device) {
  void* stream = nullptr;
  return mrlhf::current_stream(device, &stream) ? reinterpret_cast<long>(stream) : -1;
}"""
ASK = """
import ctypes, sys
for library in sys.argv[2:]:
    ctypes.CDLL(library, mode=ctypes.RTLD_LOCAL)
probe = ctypes.CDLL(sys.argv[1])
print(probe.stream_of(3), probe.stream_of(0), probe.stream_of(7))
"""


def test_the_stream_is_found_where_torch_has_one(tmp_path: Path) -> None:
    """Streams of two devices and an error; without the library no stream."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    libraries = {"torch": tmp_path / "libtorch_cuda.so", "probe": tmp_path / "probe.so"}
    for (name, library), source in zip(libraries.items(), (TORCH, PROBE), strict=True):
        command = [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
        command += [f"-Wl,-soname,{library.name}", "-x", "c++", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=source, text=True, check=True)
        assert library.exists(), name

    def asked(*loaded: Path) -> str:
        command = [sys.executable, "-c", ASK, str(libraries["probe"]), *map(str, loaded)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert asked(libraries["torch"]) == "103 100 -1"
    assert asked() == "-1 -1 -1"
