"""Proves that a safetensors file is read as the library writes it and written as the library reads it, and that a
header which does not describe its file is refused in one sentence before anything is allocated.

Not proved here: random damage (the fuzzed loaders are a test of their own); big-endian machines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert.safetensors_file import SafetensorsFile, SafetensorsWriter

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file(path: Path, header: Any, data: int = 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def test_the_library_and_this_agree(tmp_path: Path) -> None:
    """Each reads what the other wrote: every dtype, no dimensions, no numbers, non-finite ones."""
    library = pytest.importorskip("safetensors.torch")
    held = {
        "f32": torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]),
        "bf16": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "f16": torch.ones(3).half(),
        "f64": torch.ones(1, 2, 3).double(),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    library.save_file(held, tmp_path / "theirs.safetensors")
    found = SafetensorsFile(tmp_path / "theirs.safetensors")
    for name, tensor in held.items():
        read = found.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert read.view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name
    writer = SafetensorsWriter(tmp_path / "ours", [("a", (2, 2)), ("left out", (9,)), ("b", (0,))], torch.float32)
    writer.add("a", held["f32"])
    writer.add("b", torch.zeros(0))
    writer.close()
    back = library.load_file(tmp_path / "ours")
    assert set(back) == {"a", "b"} and back["a"].view(torch.uint8).equal(held["f32"].view(torch.uint8))


REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "its header is no JSON"),
    "deep": (b"[" * 200_000, "its header is no JSON"),
    "a list": ([], "its header is no JSON object"),
    "twice": (
        b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}",
        "'a' stands there twice",
    ),
    "a key more": ({"a": ONE | {"x": 1}}, "is not dtype, shape and data_offsets"),
    "a dtype": ({"a": ONE | {"dtype": "F8_E4M3"}}, "has dtype 'F8_E4M3', which is not one of"),
    "a long shape": ({"a": ONE | {"shape": [1] * 9}}, "has a shape that is not at most 8"),
    "a negative shape": ({"a": ONE | {"shape": [-2]}}, "has a shape"),
    "a true shape": ({"a": ONE | {"shape": [True, 2]}}, "has a shape"),
    "a huge shape": ({"a": ONE | {"shape": [1 << 40, 1 << 40]}}, r"says F32 \[\d+, \d+\], and 8 bytes"),
    "outside": ({"a": ONE | {"shape": [4], "data_offsets": [0, 16]}}, "outside the 8 bytes of data"),
    "backwards": ({"a": ONE | {"data_offsets": [8, 0]}}, "outside the 8 bytes"),
    "a size": ({"a": ONE | {"shape": [3]}}, r"says F32 \[3\], and 8 bytes"),
    "overlapping": ({"a": ONE, "b": ONE}, "overlaps its neighbour, or leaves a hole"),
    "a hole": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "leaves a hole before it"),
    "bytes behind": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes behind its last"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    """In one sentence that names the file."""
    header, sentence = REFUSED[name]
    with pytest.raises(BadInput, match=sentence) as refused:
        SafetensorsFile(file(tmp_path / "a.safetensors", header))
    assert "\n" not in str(refused.value) and "a.safetensors" in str(refused.value)


@pytest.mark.parametrize("length", [9, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_not_read(length: int, tmp_path: Path) -> None:
    """The length is compared with the file before a byte is read."""
    path = file(tmp_path / "a.safetensors", b"{}", data=0, length=length)
    with pytest.raises(BadInput, match=f"its header would be {length} bytes long, the file has 10"):
        SafetensorsFile(path)
    path.write_bytes(b"\0\0")
    with pytest.raises(BadInput, match="no safetensors file"):
        SafetensorsFile(path)


def test_a_file_that_shrank_is_said(tmp_path: Path) -> None:
    """Between header and tensor."""
    path = file(tmp_path / "a.safetensors", {"a": ONE})
    found = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadInput, match="ends inside a: it was cut short"):
        found.read("a")
