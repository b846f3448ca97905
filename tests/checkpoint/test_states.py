"""Proves that a state on disk is the old one or the new one, whole: under SIGKILL at any moment, on a full disk at any
write, and with any file damaged, which is seen and named; and what retention keeps.

Not proved here: file systems that reorder renames, machines that lose power.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rlhf.checkpoint import digest, manifest, snapshot, states
from megatron_rlhf.checkpoint.snapshot import Snapshot
from megatron_rlhf.checkpoint.states import State
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Checkpoint

KEPT = Checkpoint(keep=2)


def write(folder: Path, step: int, size: int = 40_000, **facts: Any) -> None:
    """A state of three files, as a Keeper writes it, and what retention then removes."""
    name = states.name_of(step, "")
    beside = states.begin(folder, name)
    content = {"common": torch.full((size // 4,), step, dtype=torch.int32)}
    digests = Snapshot({f"{file}.pt": content for file in ("common", "rank_0", "rank_1")}, {}).write(beside)
    known = {"step": step, "phase": "", "serial": step, "files": digests, "roles": {}, "settings": {}, "layout": {}}
    states.commit(folder, name, {**known, **facts})
    states.remove(folder, states.superseded(states.listed(folder), KEPT))


def faults(folder: Path, state: State) -> str:
    """Why a state cannot be used, or nothing."""
    return state.fault or "; ".join(digest.faults(folder / state.name, state.facts["files"], digests=True))


def test_killed_at_any_moment_the_last_state_or_the_new_one_is_whole(tmp_path: Path) -> None:
    """Processes are killed while they save one state after the other, until 15 saves were cut short; each next one
    goes on from what is there."""
    draw, newest, cut_short, began = random.Random(1), 2, 0, time.monotonic()
    write(tmp_path, 1)
    write(tmp_path, 2)
    long = time.monotonic() - began
    for _ in range(400):
        if cut_short >= 15 and newest >= 15:
            break
        child = os.fork()
        if child == 0:
            for step in range(newest + 1, newest + 1000):
                write(tmp_path, step)
            os._exit(0)
        time.sleep(draw.uniform(0, 2 * long))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = states.listed(tmp_path)
        assert not [faults(tmp_path, state) for state in found if faults(tmp_path, state)]
        here = found[0].facts["step"]
        assert here >= newest and len(found) >= 2
        cut_short += len(states.unfinished(tmp_path))
        newest = here
    assert newest >= 15 and cut_short >= 15, "the kills must hit the writing"


def damages() -> Iterator[tuple[str, Callable[[Path], object]]]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[random.Random(path.name).randrange(len(data))] ^= 1 << 3
        path.write_bytes(data)

    yield "removed", Path.unlink
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "cut", lambda path: os.truncate(path, path.stat().st_size - 2)
    yield "flipped", flip
    yield "longer", lambda path: path.write_bytes(path.read_bytes() + b"\n{")


def test_every_damaged_file_is_seen_and_named(tmp_path: Path) -> None:
    """Each file in turn removed, emptied, cut, with one bit flipped, or longer; the state before stays good."""
    for how, damage in damages():
        for file in ("common.pt", "rank_0.pt", "rank_1.pt", manifest.FILE):
            folder = tmp_path / how / file
            write(folder, 1)
            write(folder, 2)
            damage(folder / "step_2" / file)
            newest, before = states.listed(folder)
            assert newest.name == "step_2" and file in faults(folder, newest), (how, file)
            assert before.name == "step_1" and not faults(folder, before)


def test_every_flipped_bit_of_a_manifest_is_seen_or_harmless(tmp_path: Path) -> None:
    """What a manifest says is as it was written wherever it is read at all."""
    write(tmp_path, 7, settings={"ppo.clip": 0.2})
    folder = tmp_path / "step_7"
    right, data = manifest.read(folder), (folder / manifest.FILE).read_bytes()
    seen = 0
    for place in range(0, len(data) * 8, 7):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        (folder / manifest.FILE).write_bytes(flipped)
        try:
            assert manifest.read(folder) == right
        except BadInput:
            seen += 1
    assert seen > len(data) // 2


def test_lengths_alone_miss_a_flipped_bit(tmp_path: Path) -> None:
    """checkpoint.verify=size sees what is cut and not what is changed; digest sees both."""
    write(tmp_path, 1)
    path, files = tmp_path / "step_1" / "rank_0.pt", states.listed(tmp_path)[0].facts["files"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not digest.faults(path.parent, files, digests=False)
    assert digest.faults(path.parent, files, digests=True) == ["rank_0.pt has another content than was written"]


class Full:
    """A file on a disk with room for `room` calls of write."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room[0] -= 1
        if self._room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data))

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_disk_that_is_full_at_any_write_keeps_the_old_state(tmp_path: Path) -> None:
    """Room for 0, 1, 2, ... writes: OSError until there is enough; the old state stays whole meanwhile."""
    write(tmp_path, 1)
    opened, failures = Path.open, 0
    for calls in range(1000):
        room = [calls]

        def opening(path: Path, mode: str = "r", *rest: Any, room: list[int] = room, **named: Any) -> Any:
            file = opened(path, mode, *rest, **named)
            return Full(file, room) if mode == "wb" else file

        with mock.patch.object(Path, "open", opening):
            try:
                write(tmp_path, 2)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                failures += 1
                states.abandon(tmp_path, "step_2")
                assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
                assert not faults(tmp_path, states.listed(tmp_path)[0])
                continue
        break
    assert failures > 10
    assert [state.name for state in states.listed(tmp_path)] == ["step_2", "step_1"]


def test_a_small_disk_that_runs_full_keeps_the_old_state(tmp_path: Path) -> None:
    """The same on a file system of 1 MiB: a state fits, a larger one does not, and then it is free again."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        write(tmp_path, 1)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 2, size=2_000_000)
        states.abandon(tmp_path, "step_2")
        write(tmp_path, 3)
        assert [state.name for state in states.listed(tmp_path)] == ["step_3", "step_1"]
        assert not any(faults(tmp_path, state) for state in states.listed(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def named(*steps: int | str, scores: dict[int, float] | None = None, faulty: tuple[int, ...] = ()) -> list[State]:
    """States of these steps, the newest first; a word is a step and a phase."""
    found = []
    for serial, step in enumerate(steps, 1):
        number, _, phase = str(step).partition(".")
        metrics = {"score": scores[int(number)]} if scores and int(number) in scores else {}
        facts = {"step": int(number), "phase": phase, "serial": serial, "metrics": metrics}
        found.append(State(states.name_of(int(number), phase), facts, "bad" if int(number) in faulty else ""))
    return found[::-1]


@pytest.mark.parametrize(
    ("found", "settings", "gone"),
    [
        (named(1, 2, 3), Checkpoint(keep=2), {"step_1"}),
        (named(10, 15, "15.score", 20, 25), Checkpoint(keep=1, keep_every=10), {"step_15", "step_15.score"}),
        (named(1, 2, 3, scores={1: 5.0, 2: 9.0, 3: 1.0}), Checkpoint(keep=1, best="max score"), {"step_1"}),
        (named(1, 2, 3, scores={1: 5.0, 2: 9.0, 3: 7.0}), Checkpoint(keep=1, best="min score"), {"step_2"}),
        (named(1, 2, 3), Checkpoint(keep=1, best="max score"), {"step_1", "step_2"}),
        (named(1, 2, 3, 4, faulty=(3,)), Checkpoint(keep=2), {"step_1", "step_3"}),
    ],
)
def test_retention(found: list[State], settings: Checkpoint, gone: set[str]) -> None:
    """The last k, every n-th, the best by a number; a damaged one does not count and goes."""
    assert set(states.superseded(found, settings)) == gone


def test_an_error_of_writing_is_the_first_one(tmp_path: Path) -> None:
    """torch.save calls from C++: an error there is kept and raised by the writer, and no file of that name appears."""
    with pytest.raises(OSError, match="planted"):
        digest.write(tmp_path / "x", lambda out: setattr(out, "error", OSError("planted")))
    assert not (tmp_path / "x").exists()
    assert snapshot.COMMON == "common.pt"
