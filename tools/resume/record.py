"""What a run leaves to be compared: the rows of its log and the digests of its final weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint import states
from tools.resume.chain import Verb

SLOWEST = {"slowest.rank", "slowest.ratio", "slowest.phase"}
CHANGING = {"time", "seconds_by_phase", "reshard.seconds", "tokens_per_second", "memory_bytes", "seal"} | SLOWEST
"""What a row and a manifest say of the machine and not of the run, and the digest of a manifest with that in it."""

Rows = Mapping[tuple[str, int], Mapping[str, Any]]


def rows(out: Path, stages: Sequence[str]) -> Rows:
    """The rows of the stages by stage and step, without what changes; a line that a kill cut short is none."""
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    found = [json.loads(line) for line in lines]
    return {(row["phase"], row["step"]): _lasting(row) for row in found if row["phase"] in stages}


def digests(out: Path, stages: Sequence[str]) -> dict[str, str]:
    """sha256 of every file of the stages' final weights, of manifests without what changes."""
    found = {}
    for stage in stages:
        for path in sorted((out / stage / "weights").rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                if path.name == "manifest.json":
                    data = json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
                found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def row_difference(found: Rows, expected: Rows) -> str:
    """The first row, and number in it, that is not as expected; "" where all are."""
    for key, row in found.items():
        stage, step = key
        if key not in expected:
            return f"{stage} row {step} is one too many"
        for name in sorted({*row, *expected[key]}):
            ours, theirs = row.get(name), expected[key].get(name)
            if ours != theirs:
                return f"{stage} row {step}: {name} is {ours}, undisturbed {theirs}"
    return ""


def end_difference(out: Path, expected: Path, stages: Sequence[str]) -> str:
    """The first difference of two finished runs, in rows or in weights; "" where there is none."""
    mine, theirs = rows(out, stages), rows(expected, stages)
    if difference := row_difference(mine, theirs):
        return difference
    if missing := [key for key in theirs if key not in mine]:
        return f"{missing[0][0]} row {missing[0][1]} is missing"
    here, there = digests(out, stages), digests(expected, stages)
    if not there:
        return f"the undisturbed run has no weights of {', '.join(stages)}"
    # Manifests hold the digests of the other files: a tensor's file is named first.
    for name in sorted({*here, *there}, key=lambda name: (name.endswith(".json"), name)):
        if here.get(name) != there.get(name):
            return f"sha256 of {name} is {here.get(name, 'none')[:12]}, undisturbed {there.get(name, 'none')[:12]}"
    return ""


def unfinished(verb: Verb, out: Path) -> str:
    """In words, the states whose writing a kill cut short; "" for none."""
    found = [f"{stage} {name}" for stage in verb.stages for name in states.unfinished(out / stage / "state")]
    return f", cutting short {', '.join(found)}" if found else ""


def newest(verb: Verb, out: Path) -> str:
    """What the next launch must go on from: the newest whole state of the first stage without weights, or its start."""
    stage = next((stage for stage in verb.stages if not (out / stage / "weights").exists()), "")
    whole = [state.name for state in states.listed(out / stage / "state") if not state.fault] if stage else []
    return f"{stage} {whole[0].removeprefix('step_')}" if whole else f"anew {stage}" if stage else "nothing yet"


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lasting(item) for name, item in value.items() if name not in CHANGING}
    return value
