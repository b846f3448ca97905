"""JSON Lines: one object a line in UTF-8; unknown fields are kept, errors name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import write_text

LISTS = ("responses", "ranks")
"""Required fields that hold a list; all others hold text."""
MAY_BE_EMPTY = ("response",)


def read(
    path: Path, required: Sequence[str], check: Callable[[dict[str, Any], str], None] | None = None
) -> list[dict[str, Any]]:
    """The objects of `path` in order; blank lines are skipped.

    BadInput names file and line where the file is missing or without a row, a line is no JSON object, or a field of
    `required` is missing, of another type than text (or list, see LISTS), or empty. `check(row, "<file> line
    <number>")` may raise what else is wrong with a row.
    """
    if not path.is_file():
        raise BadInput(f"{path} is missing; write one JSON object a line with {', '.join(required)}")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = _row(line, f"{path} line {number}", required)
            if check:
                check(row, f"{path} line {number}")
            rows.append(row)
    if not rows:
        raise BadInput(f"{path} has no row; write one JSON object a line with {', '.join(required)}")
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`path` holds one line for each of `rows`, or what it held before."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _row(line: bytes, where: str, required: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is no JSON at column {error.colno} ({error.msg}); write one object a line") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} has a number of too many digits, or lists too deep in lists; write it anew") from error
    if b"\\ud" in line.lower() and any(
        0xD800 <= ord(letter) < 0xE000 for letter in json.dumps(row, ensure_ascii=False)
    ):
        raise BadInput(f"{where} has half a character (a lone \\ud800 to \\udfff); write both halves or neither")
    if not isinstance(row, dict):
        raise BadInput(f'{where} is no JSON object; write {{"{required[0]}": ...}}')
    for name in required:
        if name not in row:
            raise BadInput(f'{where} has no "{name}"; it has {", ".join(row) or "no fields"}')
        wanted: type = list if name in LISTS else str
        if not isinstance(row[name], wanted):
            kind = "a list" if wanted is list else "text"
            raise BadInput(f'{where}: "{name}" is {json.dumps(row[name])[:40]}, not {kind}')
        if not row[name] and name not in MAY_BE_EMPTY:
            raise BadInput(f'{where}: "{name}" is empty; drop the line or fill it')
    return row
