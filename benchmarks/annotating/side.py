"""One side's policy pass: `python -m benchmarks.annotating.side TASK`, one process a rank of tp."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from benchmarks.annotating.task import NOW, Task
from benchmarks.harness.turns import Channel
from benchmarks.movers import memory
from megatron_rlhf.batch import Rows
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Compute
from megatron_rlhf.models import roles, stage, transformer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.ops import library
from megatron_rlhf.parallel import collectives, cpu, grid, vocab
from megatron_rlhf.train.engine import Engine


def made(task: Task) -> Rows:
    """The same rows on every rank and side."""
    tokens_BT = torch.randint(task.vocabulary, (task.rows, task.length), generator=torch.Generator().manual_seed(1))
    return Rows(tokens_BT, torch.full((task.rows,), task.prompt), torch.full((task.rows,), task.length))


def of_all_logits(network: Network, logits_bTV: Tensor, rows: Rows, width: int) -> Tensor:
    """What the product read of the logits of all positions: those that predict no response are ignored rows."""
    assert network.grid.groups is not None
    start = int(rows.prompt_lengths_B[0])
    targets_bT = torch.full(logits_bTV.shape[:2], -1)
    targets_bT[:, start - 1 : -1] = rows.tokens_BT[:, start:]
    found_bT, _ = vocab.logprobs(
        logits_bTV,
        targets_bT,
        vocab_start=network.vocab_start,
        vocab_size=network.model.vocabulary,
        group=network.grid.groups.tp,
    )
    return found_bT[:, start - 1 : start - 1 + width]


def eagerly(network: Network, logits_bTV: Tensor, rows: Rows, width: int) -> Tensor:
    """The usual way, the vocabulary whole on one rank: log_softmax of all positions, then the tokens'."""
    start = int(rows.prompt_lengths_B[0])
    log_p_bTV = logits_bTV.float().log_softmax(-1)
    found_bT = log_p_bTV[:, :-1].gather(-1, rows.tokens_BT[:, 1:, None])[..., 0]
    return found_bT[:, start - 1 : start - 1 + width]


def engine(task: Task, stack: ExitStack) -> Engine:
    """The policy as the side has it; a side without kernels is so while `stack` lives. Collective: world."""
    if task.side != NOW:
        # GPTModel applies the head to all positions
        stack.enter_context(mock.patch.object(stage, "LanguageModel", GPTModel))
    if task.side == "before":
        stack.enter_context(library.references())
    elif not library.loaded():
        raise RuntimeError(library.WHY_NOT)
    built = grid.build(Layout.parse(f"tp{task.tp}", task.tp))
    network = transformer.build(task.model, built, rows=task.vocabulary, seed=1)
    reads = {NOW: roles.logprobs(), "eager": roles.Read(eagerly)}
    read = reads.get(task.side, roles.Read(of_all_logits))
    return Engine(network, read, Compute(forward_micro_batch=task.rows))


def measured(policy: Engine, rows: Rows) -> dict[str, float]:
    """Seconds of one pass, the memory of the rank that needs most, and the mean log-prob. Collective: world."""
    dist.barrier()
    peak = memory.Peak()
    began = time.perf_counter()
    found_BR = policy.forward(rows)
    seconds = time.perf_counter() - began
    growth = torch.tensor(float(peak.growth), dtype=torch.float64)
    dist.all_reduce(growth, op=dist.ReduceOp.MAX)
    return {"seconds": seconds, "extra": float(growth), "mean": float(found_BR.double().mean())}


def main() -> None:
    """A small pass first, which brings code into memory, then one a turn until the parent leaves."""
    channel = Channel()
    task = Task.parse(sys.argv[1])
    cpu.install()
    grid.connect()
    memory.keep_freed(False)
    memory.check()
    with ExitStack() as stack:
        policy, rows = engine(task, stack), made(task)
        policy.forward(rows.select(torch.arange(2)))
        leads = collectives.rank() == 0
        if leads:
            channel.say()
        while collectives.any_rank(leads and channel.my_turn()):
            found = measured(policy, rows)
            if leads:
                channel.say(**found)


if __name__ == "__main__":
    main()
