"""Writes GGUF files, honest and damaged, from the format's definition; what quantised blocks stand for, in float64."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "BF16": 30}
_SIZES = {"F32": 4, "F16": 2, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "BF16": 2}


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(found: Any) -> tuple[int, bytes]:
    """The type's number and the bytes of a bool, a whole number (u32), a float (f32), a string or a list."""
    if isinstance(found, bool):
        return 7, struct.pack("<B", found)
    if isinstance(found, int):
        return 4, struct.pack("<I", found)
    if isinstance(found, float):
        return 6, struct.pack("<f", found)
    if isinstance(found, str):
        return 8, string(found)
    kinds = [value(one) for one in found]
    return 9, struct.pack("<IQ", kinds[0][0] if kinds else 4, len(kinds)) + b"".join(data for _, data in kinds)


def header(metadata: dict[str, Any], rows: list[bytes], version: int = 3) -> bytes:
    keys = b"".join(
        string(key) + struct.pack("<I", kind) + data for key, (kind, data) in
        ((key, value(found)) for key, found in metadata.items())
    )  # fmt: skip
    return b"GGUF" + struct.pack("<IQQ", version, len(rows), len(metadata)) + keys + b"".join(rows)


def row(name: str, shape: tuple[int, ...], number: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", number, offset)


def write(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...], bytes]], version: int = 3
) -> Path:
    """The file of tensors (kind, shape, data), each at a multiple of 32."""
    rows, data = [], b""
    for name, (kind, shape, found) in tensors.items():
        assert len(found) == np.prod(shape) // (1 if _SIZES[kind] < 5 else 32) * _SIZES[kind]
        rows.append(row(name, shape, NUMBERS[kind], len(data)))
        data += found + bytes(-len(found) % 32)
    head = header(metadata, rows, version)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def plain(numbers: NDArray[Any], kind: str = "F32") -> tuple[str, tuple[int, ...], bytes]:
    """A tensor in F32, F16 or BF16 (whose low 16 bits must be 0)."""
    if kind == "BF16":
        data = (np.ascontiguousarray(numbers, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = np.ascontiguousarray(numbers, {"F32": "<f4", "F16": "<f2"}[kind]).tobytes()
    return kind, tuple(numbers.shape), data


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> tuple[tuple[str, tuple[int, ...], bytes], NDArray[Any]]:
    """A random tensor in blocks of 32, and its numbers in float64, one by one by the definition."""
    chance = np.random.default_rng(seed)
    count = int(np.prod(shape)) // 32
    data, found = b"", []
    for _ in range(count):
        scale, lowest = (np.float16(x) for x in chance.uniform(-0.1, 0.1, 2))
        tail = struct.pack("<e", scale) + (struct.pack("<e", lowest) if kind.endswith("1") else b"")
        d, m = float(scale), float(lowest) if kind.endswith("1") else 0.0
        if kind == "Q8_0":
            whole = [int(x) for x in chance.integers(-128, 128, 32)]
            data += tail + struct.pack("<32b", *whole)
        else:
            bits = int(kind[1])
            raw = [int(x) for x in chance.integers(0, 1 << bits, 32)]
            fifth = sum((number >> 4) << place for place, number in enumerate(raw))
            nibbles = bytes((raw[place] & 15) | (raw[place + 16] & 15) << 4 for place in range(16))
            data += tail + (struct.pack("<I", fifth) if bits == 5 else b"") + nibbles
            whole = raw if kind.endswith("1") else [number - (1 << bits - 1) for number in raw]
        found += [d * number + m for number in whole]
    return (kind, shape, data), np.array(found).reshape(shape)
