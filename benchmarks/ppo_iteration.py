"""One PPO iteration: seconds by phase, tokens/s and peak memory under three layouts, beside TRL 1.12.0's PPO trainer.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python benchmarks/ppo_iteration.py [--device cpu|cuda] [--json FILE] [--iterations N] [--toy]

Four GPT-2 networks of 1.07 M parameters (4 layers, 128 wide, vocabulary 2,048) with random weights; 64 episodes of
24-48 prompt tokens and exactly 40 new ones; 8 updates of 8 episodes, each of the policy and of the value model; fp32,
Adam, one inner epoch, temperature 1, no dropout. On a CPU every case may use two cores: tp1 is one process of two
threads, dp2 two processes of one, tp2 pp2 four of one (generation at tp2 dp2, as layout=cpu4). TRL is one process of
two threads. It knows no tensor or pipeline parallelism, so all cases are compared with that one. Ours and TRL, each in
processes of its own, alternate iteration by iteration; a number is the median of its turns, after warm-up. `ratio` > 1
means ours is better.

What is not equal, and cannot be made so without changing one of the two:
* Ours scores the rollout again with the policy's training forward, so that the first ratio is exactly 1; TRL takes the
  log-probs it drew with. Ours also draws with noise that no layout or batch changes, and copies the policy into the
  generating network.
* Ours clips gradients by their norm, keeps a weight average and fp32 gradient buffers, and updates value and policy one
  after the other; TRL sums both losses into one backward pass and one Adam step, and clips nothing. TRL also computes
  the entropy in every update.
* TRL's Adam is torch's fused AdamW (its default), ours Megatron-Core's distributed optimizer over torch's Adam.
* TRL pads prompts on the left, ours on the right; both forward rows of 88 tokens.
* Words of prompts and random weights differ. Nothing that was measured depends on them: no response ends early.
* TRL's `annotate` has the log-probs of what was drawn, the reference and the values; ours has the policy's, too.
  `update` is the value model's and the policy's together, as TRL's cannot be told apart.
* Memory is resident memory added over the processes of a case (shared pages count in each); `growth` leaves out what
  imports and, on our side, writing the initial weights had taken before.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import result
from benchmarks.harness.result import Row
from benchmarks.harness.turns import Contestant
from benchmarks.ppo.task import TOY, Task

RIVAL = "1.12.0"
PHASES = ("generate", "score", "annotate", "update")
PARTS = ("value", "policy", "pretraining")
WARM_UP = 2
MIB = 2**20

Turns = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run ours: the settings over the quickstart's, and how many processes and threads they get."""

    name: str
    words: tuple[str, ...]
    ranks: int = 1
    threads: int = 1


CASES = (
    Case("tp1", ("layout=cpu1", "compute.micro_batch=8", "compute.forward_micro_batch=64"), threads=2),
    Case(
        "dp2",
        (
            *(f"layout.{role}=dp2" for role in ("policy", "generate", "reference", "value", "reward", "pretrain")),
            *("compute.micro_batch=8", "compute.forward_micro_batch=64"),
        ),
        ranks=2,
    ),
    Case("tp2 pp2", ("layout=cpu4", "compute.micro_batch=4", "compute.forward_micro_batch=16"), ranks=4),
    Case(
        "tp1 with pretraining mix",
        ("layout=cpu1", "compute.micro_batch=8", "compute.forward_micro_batch=64", "ppo.pretraining_coef=27.8"),
        threads=2,
    ),
)


def rival_there() -> bool:
    """Whether the rival is installed in the version that has the trainer."""
    return result.version("trl") == RIVAL


def rival_name() -> str:
    """The rival as its rows name it: with its version, or why it was not run."""
    if rival_there():
        return f"TRL {RIVAL}"
    found = result.version("trl")
    there = f"trl {found} has no PPO trainer" if found else "trl is not installed"
    return f"TRL {RIVAL}: not run, {there}; pip install -e '.[bench]'"


def measure(
    case: Case, task: Task, theirs: Contestant | None, device: str, iterations: int
) -> tuple[Turns, Turns, str]:
    """Each side's turns, taken alternately, whoever was second first in the next round, and the GPU's name."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        words, threads = [task.word(), folder, *case.words], case.threads
        ours = stack.enter_context(
            Contestant("benchmarks.ppo.ours", words, ranks=case.ranks, threads=threads, device=device)
        )
        sides: list[tuple[Contestant, Turns]] = [(ours, [])]
        if theirs is not None:
            sides.append((theirs, []))
        found = {side: turns for side, turns in sides}
        for _ in range(WARM_UP + iterations):
            for side, turns in sides:
                turns.append(side.turn())
            sides.reverse()
        taken = found[theirs][WARM_UP:] if theirs is not None else []
        return found[ours][WARM_UP:], taken, ours.facts["gpu"]


def rows(case: str, task: Task, ours: Turns, theirs: Turns, rival: str) -> list[Row]:
    """The rows of one case; `ours` or `theirs` may be empty, their numbers are then None."""
    for turn in (*ours, *theirs):
        turn["phases"].setdefault("update", sum(turn["phases"].get(part, 0.0) for part in PARTS))
    names = [*PHASES, *(part for part in PARTS if any(turn["phases"].get(part, 0.0) > 1e-3 for turn in ours))]
    found = [_row(case, "iteration", "s", rival, _median(ours, "seconds"), _median(theirs, "seconds"))]
    for name in names:
        found.append(_row(case, name, "s", rival, _phase(ours, name), _phase(theirs, name)))
    found.append(_row(case, "rest", "s", rival, _rest(ours), _rest(theirs)))
    rates = [_rate(task, turns) for turns in (ours, theirs)]
    found.append(_row(case, "throughput", "tokens/s", rival, *rates))
    for metric, key in (("peak memory", "peak"), ("peak memory growth", "growth")):
        found.append(_row(case, metric, "MiB", rival, _last(ours, key), _last(theirs, key)))
    return found


def _row(case: str, metric: str, unit: str, rival: str, ours: float | None, theirs: float | None) -> Row:
    return Row(case=case, metric=metric, unit=unit, ours=ours, rival=rival, theirs=theirs)


def _median(turns: Turns, key: str) -> float | None:
    return statistics.median(turn[key] for turn in turns) if turns else None


def _phase(turns: Turns, name: str) -> float | None:
    if not turns or name not in turns[0]["phases"]:
        return None
    return statistics.median(turn["phases"][name] for turn in turns)


def _rest(turns: Turns) -> float | None:
    if not turns:
        return None
    return statistics.median(turn["seconds"] - sum(turn["phases"][name] for name in PHASES) for turn in turns)


def _rate(task: Task, turns: Turns) -> float | None:
    seconds = _median(turns, "seconds")
    return task.tokens / seconds if seconds else None


def _last(turns: Turns, key: str) -> float | None:
    return turns[-1][key] / MIB if turns else None


def run(task: Task, cases: Sequence[Case], *, device: str, iterations: int) -> tuple[list[Row], str]:
    """The rows of all cases and the GPU's name; the rival runs where it is installed.

    A case that needs more GPUs than there are is not run: its row has no number of ours.
    """
    rival = rival_name()
    gpus = _gpus() if device == "cuda" else 0
    found: list[Row] = []
    gpu = ""
    with ExitStack() as stack:
        theirs = None
        if rival_there():
            words = [task.word(), device]
            theirs = stack.enter_context(Contestant("benchmarks.ppo.rival", words, threads=2, device=device))
        for case in cases:
            if device == "cuda" and case.ranks > gpus:
                name = f"{case.name}: not run, needs {case.ranks} GPUs"
                found.append(_row(name, "iteration", "s", rival, None, None))
                continue
            ours, taken, gpu = measure(case, task, theirs, device, iterations)
            found += rows(case.name, task, ours, taken, rival)
    return found, gpu


def _gpus() -> int:
    """GPUs of this machine; torch stays out of this process, whose memory its children would count as theirs."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--iterations", type=int, default=11, help="measured turns of each side in each case")
    parser.add_argument("--toy", action="store_true", help="a tiny task, to see that everything runs")
    asked = parser.parse_args()
    found, gpu = run(TOY if asked.toy else Task(), CASES, device=asked.device, iterations=asked.iterations)
    result.show(found)
    if asked.json:
        result.write(asked.json, found, gpu)


if __name__ == "__main__":
    main()
