"""The contestants: each makes its inputs, and returns what refreshes them before a turn and what a turn runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.kernels.task import Task
from megatron_rlhf.algorithms import gae as plain_gae
from megatron_rlhf.config.env import free_port
from megatron_rlhf.ops import gae, library
from megatron_rlhf.parallel import random, vocab

Turn = tuple[Callable[[], object], Callable[[], object]]
Loss = Callable[[Tensor, Tensor], Tensor]


def _logprob(task: Task, loss: Loss) -> Turn:
    """One forward and backward pass down to the gradient of the logits, which are restored before each turn."""
    source = torch.Generator(task.device).manual_seed(1)
    shape, dtype = (task.rows, task.columns), getattr(torch, task.dtype)
    kept = torch.empty(shape, dtype=dtype, device=task.device).normal_(0, 3, generator=source)
    logits = kept.clone().requires_grad_()
    targets = torch.randint(0, task.columns, (task.rows,), generator=source, device=task.device)

    @torch.no_grad()
    def fresh() -> None:
        logits.copy_(kept)

    def run() -> None:
        torch.autograd.grad(loss(logits, targets), logits)

    return fresh, run


def _ours(inplace: bool, entropy: bool) -> Loss:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        chosen, mean = vocab.logprobs(
            logits, targets, vocab_start=0, vocab_size=logits.shape[1], entropy=entropy, inplace=inplace
        )
        return chosen.sum() if mean is None else (chosen + 0.01 * mean).sum()

    return loss


def _eager(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, targets[:, None]).sum()


def _eager_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (log_p.gather(-1, targets[:, None])[:, 0] + 0.01 * entropy).sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _megatron(task: Task) -> Loss:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    kind = "nccl" if task.device == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    group = dist.group.WORLD
    return lambda x, targets: fused_vocab_parallel_cross_entropy(x[:, None], targets[:, None], group).sum()


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda x, targets: liger_cross_entropy(x, targets, reduction="sum")


def _copy(task: Task) -> Turn:
    """One copy of the logits: the bandwidth that nothing exceeds."""
    source = torch.ones(task.rows, task.columns, dtype=getattr(torch, task.dtype), device=task.device)
    into = source.clone()
    return lambda: None, lambda: into.copy_(source)


def _sample(task: Task, ours: bool) -> Turn:
    dtype = getattr(torch, task.dtype)
    logits = torch.randn(task.rows, task.columns, device=task.device).mul_(3).to(dtype)
    place = torch.arange(task.rows, device=task.device)

    def kernel() -> object:
        return vocab.draw(logits, random.row_keys(0, 0, place, place), vocab_start=0, vocab_size=task.columns)

    def plain() -> object:
        scaled = logits.float()
        words = (scaled + random.gumbel(0, 0, place, place, 0, task.columns)).argmax(1)
        return words, scaled.log_softmax(1).gather(1, words[:, None])

    return lambda: None, kernel if ours else plain


def _gae(task: Task, ours: bool) -> Turn:
    rewards, values = torch.randn(2, task.rows, task.columns, device=task.device).unbind(0)
    mask = torch.ones_like(values)
    scan = gae.advantages if ours else plain_gae.advantages
    return lambda: None, lambda: scan(rewards, values, mask, gamma=1.0, lam=0.95)


def turn(task: Task) -> Turn:
    """What the side of this task does in a turn; RuntimeError where its kernels were not built."""
    side = task.side
    if side.startswith("ours") and not library.loaded():
        raise RuntimeError(library.WHY_NOT)
    if side == "copy":
        return _copy(task)
    if task.operator == "sample":
        return _sample(task, side == "ours")
    if task.operator == "gae":
        return _gae(task, side == "ours")
    losses: dict[str, Callable[[], Loss]] = {
        "ours in place": lambda: _ours(inplace=True, entropy=False),
        "ours in place, entropy": lambda: _ours(inplace=True, entropy=True),
        "ours": lambda: _ours(inplace=False, entropy=False),
        "ours, entropy": lambda: _ours(inplace=False, entropy=True),
        "eager": lambda: _eager,
        "eager, entropy": lambda: _eager_entropy,
        "cross_entropy": lambda: _cross_entropy,
        "torch.compile": lambda: torch.compile(_eager),
        "torch.compile, entropy": lambda: torch.compile(_eager_entropy),
        "Megatron-Core": lambda: _megatron(task),
        "Liger": _liger,
    }
    return _logprob(task, losses[side]())
