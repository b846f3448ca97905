"""Our side: `recipes.ppo.step` on roles that `recipes.ppo.prepared` loads, as `megatron-rlhf ppo` runs them.

Run as `python -m benchmarks.ppo.ours TASK FOLDER WORD...`, the WORDs being settings over `experiment=quickstart`. What
it reads (tokenizer, prompts, text, random weights) is first written into FOLDER by the functions that `prepare` and the
earlier stages write theirs with.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness.turns import Channel
from benchmarks.ppo.task import Task
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.load import load
from megatron_rlhf.data import jsonl, pretraining, sentence_pieces
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.observe.log import write_bytes
from megatron_rlhf.observe.memory import peak_bytes
from megatron_rlhf.parallel import collectives
from megatron_rlhf.recipes import ppo, session

_FREQUENT = 100
"""Words so frequent that each is one token; prompts are made of them."""
NEVER = -1


def words(task: Task, out: str, extra: Sequence[str]) -> list[str]:
    """The settings of the run as words of our command line."""
    sizes = {
        "layers": task.layers,
        "hidden": task.hidden,
        "heads": task.heads,
        "vocabulary": task.vocabulary,
        "context": task.context,
    }
    learning = {"rate": task.rate, "schedule": "constant", "epsilon": task.epsilon}
    return [
        "experiment=quickstart",
        f"out={out}",
        # any source but the quickstart's corpus: nothing is scored for plotting inside the iteration
        f"data.source={out}",
        *(f"{model}.{name}={size}" for model in ("model", "reward_model") for name, size in sizes.items()),
        *(f"ppo.{role}.{name}={value}" for role in ("policy", "value") for name, value in learning.items()),
        *("ppo.policy.warmup=0", "ppo.iterations=1000000", "ppo.missing_end=keep", "ppo.pretraining_coef=0"),
        *(f"ppo.episodes={task.episodes}", f"ppo.minibatches={task.minibatches}"),
        *(f"ppo.kl.coef={task.kl_coef}", f"ppo.lam={task.lam}", f"ppo.clip={task.clip}"),
        *(f"adam.beta2={task.beta2}", f"sampling.max_tokens={task.new_tokens}", "evaluate.max_tokens=0"),
        *(f"data.max_prompt_tokens={task.longest}", f"data.max_response_tokens={task.new_tokens}"),
        *("data.min_response_tokens=1", f"pretrain.length={min(64, task.context)}"),
        *extra,
    ]


@dataclass(frozen=True, slots=True)
class Side:
    """A prepared run and the bytes this rank held before it was."""

    run: ppo.Run
    before: int

    def turn(self) -> dict[str, Any]:
        """One iteration as `recipes.ppo.train` runs it: the step, its row in the log, the vote on signals.

        Collective: world.
        """
        started = self.run.session
        began = time.perf_counter()
        stats = ppo.step(self.run)
        self.run.iteration += 1
        phases = started.timer.take()
        started.log.row(ppo.STAGE, self.run.iteration - 1, {**stats.means(), "seconds_by_phase": phases})
        started.stop.requested()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "phases": phases, "tokens": stats["tokens"], **self._memory()}

    def _memory(self) -> dict[str, float]:
        peak = peak_bytes()
        held = 0 if torch.cuda.is_available() else self.before
        return {"peak": collectives.total(peak), "growth": collectives.total(peak - held)}


def prepare(task: Task, folder: str, extra: Sequence[str]) -> Side:
    """A run of `task` with random weights in `folder`. Collective: world."""
    config = load("ppo", words(task, folder, extra))
    started = session.start(config)
    if started.first:
        _write(task, started.data)
    collectives.wait_for_all()
    for stage, model, layout, scalar in (
        (ppo.START, config.model, config.layout.policy, False),
        ("reward", config.reward_model, config.layout.reward, True),
    ):
        weights.save(started.network(model, layout, scalar=scalar), started.weights(stage))
    before = psutil.Process().memory_info().rss
    run = ppo.prepared(started)
    # No token is the end: all responses have the same length on both sides.
    run.tokenizer.end = NEVER
    return Side(run, before)


def _write(task: Task, folder: Path) -> None:
    """The data room: a tokenizer of exactly `task.vocabulary` pieces, prompts of exactly the task's lengths, text."""
    source = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = list(dict.fromkeys("".join(source.choices(letters, k=5)) for _ in range(2 * task.vocabulary)))
    frequent = known[: min(_FREQUENT, task.vocabulary // 16)]
    lines = [" ".join(frequent) for _ in range(50)] + [" ".join(known[at : at + 20]) for at in range(0, len(known), 20)]
    write_bytes(folder / "tokenizer.model", sentence_pieces.train(lines, task.vocabulary))
    prompts = [" ".join(source.choices(frequent, k=length)) for length in task.prompt_lengths]
    made = Tokenizer.load(folder / "tokenizer.model")
    found = [len(tokens) for tokens in made.encode_all(prompts)]
    assert found == task.prompt_lengths, f"the prompts have {found} tokens, they should have {task.prompt_lengths}"
    assert made.vocabulary == task.vocabulary
    jsonl.write(folder / "prompts.train.jsonl", [{"prompt": prompt} for prompt in prompts])
    pretraining.write([" ".join(source.choices(known, k=100)) for _ in range(100)], made, folder / "pretraining.train")


def main() -> None:
    """Prepares, warms up with one iteration, then runs one a turn until the parent leaves."""
    channel = Channel()
    side = prepare(Task.parse(sys.argv[1]), sys.argv[2], sys.argv[3:])
    side.turn()
    first = side.run.session.first
    if first:
        channel.say(gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    # Every rank asks: the others wait here for rank 0, which waits for the parent.
    while collectives.any_rank(first and channel.my_turn()):
        measured = side.turn()
        if first:
            channel.say(**measured)


if __name__ == "__main__":
    main()
