"""Contestants that take turns: each lives in its own processes, and one of them computes at a time.

Two programs that are measured one after the other see different machines (other load, another clock frequency); two
that alternate see the same. The parent holds a `Contestant` for each; a contestant's first process talks over a
`Channel`: it says when it is ready, waits for its turn, and answers each turn with what it measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from benchmarks.harness.result import ROOT
from megatron_rlhf.config.env import free_port

_PATIENCE = 20.0
"""Seconds in which a contestant may end by itself."""


class Contestant:
    """The ranks of one module, `threads` threads each; `turn` runs it once."""

    def __init__(
        self,
        module: str,
        words: Sequence[str],
        *,
        ranks: int = 1,
        threads: int = 1,
        device: str = "cpu",
        checkout: Path = ROOT,
    ) -> None:
        """Starts nothing yet; `words` are the module's arguments. On "cpu" the processes see no GPU. The module and
        all it imports of ours are those of `checkout`."""
        self._command = [sys.executable, "-m", module, *words]
        self._checkout = checkout
        self._ranks, self._threads = ranks, threads
        self._module, self._device = module, device
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        """Starts the processes and returns when they are ready; RuntimeError with what they printed if one fails."""
        with ExitStack() as undo:
            undo.callback(self._end)
            self._said = undo.enter_context(tempfile.TemporaryFile("w+"))
            port = str(free_port())
            for rank in range(self._ranks):
                pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                env = {**os.environ, **self._environment(rank, port)}
                self._processes.append(
                    subprocess.Popen(
                        self._command,
                        cwd=self._checkout,
                        env=env,
                        text=True,
                        stdin=pipe,
                        stdout=pipe,
                        stderr=self._said,
                    )
                )
            self.facts = self._answer()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the processes."""
        self._undo.close()

    def turn(self) -> dict[str, Any]:
        """What the contestant measured of one run, while the others wait."""
        first = self._processes[0]
        assert first.stdin is not None
        first.stdin.write("go\n")
        first.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        first = self._processes[0]
        assert first.stdout is not None
        line = first.stdout.readline()
        if not line:
            first.wait(_PATIENCE)
            self._said.seek(0)
            raise RuntimeError(f"{self._module} ended with code {first.returncode}:\n{self._said.read()[-4000:]}")
        return json.loads(line)

    def _environment(self, rank: int, port: str) -> Mapping[str, str]:
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._ranks)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        threads = {name: str(self._threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self._device == "cpu" else {}
        return {**(world if self._ranks > 1 else {}), **place, **threads, **hidden, "HF_HUB_OFFLINE": "1"}

    def _end(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


class Channel:
    """A contestant's end: its standard output belongs to the parent, whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        """Takes standard output over; make it before anything prints."""
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **measured: Any) -> None:
        """Tells the parent that this contestant is ready, or what its turn gave."""
        self._answers.write(json.dumps(measured) + "\n")
        self._answers.flush()

    def my_turn(self) -> bool:
        """Waits; whether there is another turn."""
        return sys.stdin.readline() == "go\n"
