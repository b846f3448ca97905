"""What is nearly right, by chance: bytes, trees of JSON and their text, tar archives."""

from __future__ import annotations

import copy
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 10**400),
)
NAMES = (
    *("", ".", "..", "../escaped", "../../escaped", "/escaped", "a/../../escaped", "..\\escaped", "C:\\escaped"),
    *("a\0b", "a\nb", "\x1b[31m", "é", "\ud800", "\u2028", "x" * 300, "x" * 5000, "${oc.env:HOME}", "???", "null", "~"),
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"": 0},
)


def damaged(data: bytes, chance: random.Random, most: int = 4) -> bytes:
    """The bytes with 1 to `most` changes: flipped, overwritten, cut out, repeated, cut off, moved, or put between."""
    found = bytearray(data)
    for _ in range(chance.randint(1, most)):
        place = chance.randrange(len(found) + 1)
        length = chance.choice((1, 1, 2, 4, 8, 16, 64))
        match chance.randrange(8):
            case 0 if place < len(found):
                found[place] ^= 1 << chance.randrange(8)
            case 1:
                found[place : place + length] = chance.randbytes(length)
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = found[place : place + length] * chance.choice((1, 2, 50))
            case 4:
                del found[place:]
            case 5:
                width = chance.choice((4, 8))
                number = chance.choice(NUMBERS) % (1 << 8 * width)
                found[place : place + width] = number.to_bytes(width, chance.choice(("little", "big")))
            case 6:
                found[place:place] = chance.choice(
                    (b"\0", b"\xff" * 8, b"\n", b"{", b"[", b'"', b"\\", b"9" * 40, b" ")
                )
            case _:
                other = chance.randrange(len(found) + 1)
                found[place : place + length] = found[other : other + length]
    return bytes(found)


def changed(value: Any, chance: random.Random, most: int = 3) -> Any:
    """The tree with 1 to `most` changes: values replaced, taken away, named anew, copied over others, or nested."""
    root = [copy.deepcopy(value)]
    for _ in range(chance.randint(1, most)):
        places = list(_places(root))
        parent, key = chance.choice(places)
        match chance.randrange(7):
            case 3 if parent is not root:
                del parent[key]
            case 4 if isinstance(parent, dict):
                parent[chance.choice((*NAMES, f"{key}x", str(key)[:-1]))] = parent.pop(key)
            case 5:
                other, name = chance.choice(places)
                parent[key] = copy.deepcopy(other[name])
            case 6:
                parent[key] = [parent[key]] if chance.random() < 0.5 else {"a": parent[key]}
            case _:
                parent[key] = _strange(parent[key], chance)
    return root[0]


def json_bytes(value: Any, chance: random.Random) -> bytes:
    """The tree as JSON; now and then with a key twice, too deep, too long a number, in another encoding, or damaged."""
    data = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    match chance.randrange(20):
        case 0 if data[:1] == b"{" and len(data) > 2:
            return data[:-1] + b"," + data[1:]
        case 1:
            return data[:-1] + b',"deep":' + b"[" * 100_000 + b"}"
        case 2:
            return data[:-1] + b',"long":' + b"9" * 5000 + b"}"
        case 3:
            encoding = chance.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1"))
            return data.decode("utf-8", "replace").encode(encoding, "replace")
        case 4 | 5:
            return damaged(data, chance)
    return data


def tar_bytes(files: Mapping[str, bytes], chance: random.Random) -> bytes:
    """An archive of the files, in which 0 to 3 headers are changed and have the sum that makes them count."""
    stream = io.BytesIO()
    form = chance.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if chance.random() < 0.05:
                info.name = chance.choice(NAMES).encode("utf-8", "replace").decode()[:90] or "x"
            if form == tarfile.PAX_FORMAT and chance.random() < 0.1:
                info.pax_headers = {
                    chance.choice(_PAX): str(chance.choice((*NUMBERS, "../escaped", "/escaped", "1.5")))
                }
            archive.addfile(info, io.BytesIO(data))
    found = bytearray(stream.getvalue())
    headers = [at for at in range(0, len(found), 512) if found[at + 257 : at + 262] == b"ustar"]
    for at in chance.sample(headers, min(len(headers), chance.randrange(4))):
        found[at : at + 512] = _other_header(found[at : at + 512], chance)
    return damaged(bytes(found), chance) if chance.random() < 0.2 else bytes(found)


def _other_header(header: bytearray, chance: random.Random) -> bytearray:
    start, width, values = chance.choice(_FIELDS)
    value = chance.choice(values) if chance.random() < 0.7 else chance.randbytes(width)
    header[start : start + width] = value[:width].ljust(width, b"\0")
    if chance.random() < 0.9:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return header


def _places(parent: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(parent) if isinstance(parent, dict) else range(len(parent)):
        yield parent, key
        if isinstance(parent[key], dict | list):
            yield from _places(parent[key])


def _strange(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bool | dict | list | None) or chance.random() < 0.25:
        return copy.deepcopy(chance.choice((*OTHERS, *NUMBERS, *NAMES)))
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, value * 2, float(value % 2**60), str(value), *NUMBERS))
    text = str(value)
    return chance.choice((f"{text}x", text[:-1], text[::-1], text.upper(), *NAMES))


_PAX = ("path", "size", "linkpath", "mtime", "uid", "GNU.sparse.name", "GNU.sparse.major", "GNU.sparse.realsize",
        "GNU.sparse.map")  # fmt: skip
_SIZES = (b"77777777777\0", b"\x80" + b"\0" * 10 + b"\x09", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1", b"0", b"1e3",
          b"00000002000\0", b"\x80\0\0\0\x7f" + b"\xff" * 7)  # fmt: skip
_FIELDS = (
    (0, 100, (b"../escaped", b"/escaped", b"a/../../escaped", b"", b".", b"..", b"x\\y", b"\xff\xfe", b"a//b", b"./a")),
    (124, 12, _SIZES),
    (156, 1, tuple(bytes([kind]) for kind in b"0123456789xgLKSDMNVA\0")),
    (157, 100, (b"../escaped", b"/etc/passwd", b"model_config.yaml", b"")),
    (257, 8, (b"ustar  \0", b"ustar\x0000", b"\0" * 8)),
    (345, 155, (b"..", b"/", b"../..", b"\xff", b"a" * 155)),
    (100, 8, (b"\x80" + b"\xff" * 7, b"9999999\0", b"")),
    (482, 1, (b"\1", b"\0")),
)
"""Start, width and values of name, size, kind, link, magic, prefix, mode and of the sign that a sparse map goes on."""
