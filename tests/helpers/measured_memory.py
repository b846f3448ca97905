"""Bytes that a rank really holds, by cause, beside what a plan says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Adam, Compute, Learning, Model
from megatron_rlhf.models import roles
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.plan import activations, passes, residents
from megatron_rlhf.plan.activations import CPU, Pass
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.live_storage import Live, storages

ROWS = 1024
"""Words of the vocabulary, padded."""
GPT = Model(layers=4, hidden=128, heads=8, vocabulary=1000, context=64)
UNTIED = replace(GPT, tied=False)
BF16 = replace(GPT, precision="bf16")
LLAMA = replace(GPT, style="llama", kv_heads=4, ffn=384, tied=False)
PROMPT, RESPONSE = 16, 48
_PACKED = 16
"""Tokens of a packed row, a quarter of a line."""

Bytes = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One role that learns in a world of 4 ranks: its model and layout, and what bounds its activations."""

    layout: str
    model: Model = GPT
    recompute: str = "none"
    micro_batch: int = 2
    scalar: bool = False
    head_rows: int = 0
    dropout: float = 0.0
    packing: bool = False
    rows: int = 16

    def __str__(self) -> str:
        """Its words, for names of tests and tables."""
        model = self.model
        marks = [model.style, model.precision, "value" if self.scalar else "tied" if model.tied else "untied"]
        marks += ["gqa"] if model.kv_heads else []
        marks += [self.recompute, f"mb{self.micro_batch}", *(["packed"] if self.packing else [])]
        marks += [f"head_rows={self.head_rows}"] if self.head_rows else []
        marks += [f"dropout={self.dropout}"] if self.dropout else []
        return f"{self.layout}: {' '.join(marks)}"


CASES = (
    Case("tp2 pp2"),
    Case("tp2 dp2 sp", LLAMA, "full", micro_batch=4),
    Case("pp2 dp2", GPT, "selective", scalar=True),
    Case("tp1 pp1 dp4"),
    Case("tp2 pp2", recompute="full"),
    Case("tp2 pp2 sp", recompute="selective"),
    Case("pp4", UNTIED, micro_batch=1),
    Case("tp2 pp2 vp2"),
    Case("pp2 dp2 vp2", recompute="full"),
    Case("tp2 dp2", LLAMA),
    Case("tp2 pp2 sp", LLAMA, micro_batch=4),
    Case("tp4 sp", LLAMA, "full"),
    Case("tp2 pp2", scalar=True),
    Case("tp2 dp2 sp", LLAMA, "selective", scalar=True),
    Case("tp2 dp2", head_rows=16),
    Case("pp2 dp2", BF16),
    Case("tp2 pp2", dropout=0.1),
    Case("tp1 pp1 dp4", packing=True),
)
QUICK = CASES[:3]


def of_role(case: Case) -> tuple[Bytes, Bytes]:
    """This rank's bytes by cause, as they are and as the plan has them. Collective: world."""
    role, batch = _engine(case), _batch(case)
    parallel_state.get_global_memory_buffer().buffer.clear()
    loss = _squares if case.scalar else losses.language
    for _ in range(2):  # moments appear at the first step, and the gather buffer in the first passes
        role.accumulate(batch, loss, packable=case.packing)
        role.update()
        role.forward(batch)
    standing = {
        "weights": list(role.network.parameters.values()),
        "gradients": role.optimizer.gradients() if role.optimizer else [],
        "average": list(role.average.shards) if role.average else [],
        "optimizer": list(state(role)),
        "gather buffer": list(parallel_state.get_global_memory_buffer().buffer.values()),
    }
    there = [*(tensor for tensors in standing.values() for tensor in tensors), batch.tokens_BT]
    with Live(there) as training:
        role.accumulate(batch, loss, packable=case.packing)
    role.update()
    with Live(there) as reading:
        role.forward(batch)
    found = {**held(standing), "activations": training.peak, "reading": reading.peak}
    return found, _planned(case, role)


def held(standing: Mapping[str, list[Tensor]]) -> Bytes:
    """Bytes of storages by cause; one that several causes share counts for the first."""
    seen: set[int] = set()
    found: Bytes = {}
    for cause, tensors in standing.items():
        new = {place: size for place, size in storages(tensors).items() if place not in seen}
        seen |= set(new)
        found[cause] = sum(new.values())
    return found


def state(role: Engine) -> Iterator[Tensor]:
    """Main weights and moments of a role that learns."""
    for adam in role.optimizer.adams() if role.optimizer else ():
        for shard, entry in adam.state.items():
            yield shard
            yield from (value for value in entry.values() if isinstance(value, Tensor))


def _planned(case: Case, role: Engine) -> Bytes:
    grid, compute, rows = role.network.grid, role.compute, 0 if case.scalar else ROWS
    stage, model = grid.pp_rank, case.model
    plan = residents.Role("role", model, grid.layout, ROWS, case.scalar, learns=True, averaged=not case.scalar)

    def run(micro_batch: int, **more: Any) -> Pass:
        lines, words = (case.rows // 4, 4 * (_PACKED - 1)) if case.packing else (case.rows, RESPONSE)
        return passes.cut(grid.layout, lines, micro_batch, PROMPT + RESPONSE, words=words, **more)

    learns = run(compute.micro_batch, packed=case.packing, dropout=case.dropout)
    reads = replace(run(compute.forward_micro_batch), dropout=0.0)
    if case.packing:  # rows that are read are not packed
        reads = passes.cut(grid.layout, case.rows, compute.forward_micro_batch, _PACKED, words=_PACKED - 1)
    head: dict[str, Any] = {"rows": rows, "head_rows": case.head_rows, "kernels": CPU}
    gathers = grid.layout.sp and grid.layout.tp > 1
    return {
        "weights": plan.weights(stage),
        "gradients": plan.gradients(stage),
        "average": plan.average(stage),
        "optimizer": plan.optimizer(stage),
        "gather buffer": 4 * model.hidden * max(each.lines * each.length for each in (learns, reads)) if gathers else 0,
        "activations": activations.training(
            model, grid.layout, stage, learns, recompute=case.recompute, **head
        ).total,
        "reading": activations.reading(model, grid.layout, stage, reads, **head).total,
    }  # fmt: skip


def _engine(case: Case) -> Engine:
    network = tiny.network(
        case.layout, case.model, rows=ROWS, scalar=case.scalar, recompute=case.recompute, dropout=case.dropout
    )
    each = case.micro_batch
    compute = Compute(
        micro_batch=each, forward_micro_batch=2 * each, head_rows=case.head_rows, packing=case.packing,
        pack_tokens=PROMPT + RESPONSE if case.packing else 0,
    )  # fmt: skip
    read = roles.values() if case.scalar else roles.logprobs(head_rows=case.head_rows)
    return Engine(network, read, compute, adam=Adam(), learning=Learning(rate=1e-4), averaged=not case.scalar, seed=1)


def _batch(case: Case) -> Rows:
    """Rows of one length: a prompt and a response, or text so short that four share a line."""
    prompt, length = (1, _PACKED) if case.packing else (PROMPT, PROMPT + RESPONSE)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(1, case.model.vocabulary, (case.rows, length), generator=generator)
    return Rows(tokens_BT, torch.full((case.rows,), prompt), torch.full((case.rows,), length))


def _squares(values_BR: Tensor, part: Rows, whole: Rows) -> tuple[Tensor, Stats]:
    return values_BR.square().sum() / whole.response_lengths_B.sum(), Stats()


def of_layer(case: Case) -> tuple[float, float]:
    """Bytes that one more layer keeps of a forward pass for its backward pass, and as the plan has them; the layout has
    one stage. Collective: world."""
    kept = [_kept(replace(case, model=replace(case.model, layers=layers))) for layers in (2, 4)]
    layout = Layout.parse(case.layout, dist.get_world_size())
    run = Pass(1, case.micro_batch, PROMPT + RESPONSE, dropout=case.dropout)
    return (kept[1] - kept[0]) / 2, activations.layer(case.model, layout, run, case.recompute, CPU)


def _kept(case: Case) -> int:
    """Bytes of the storages that a forward pass saves, parameters left out. Collective: world."""
    network = tiny.network(case.layout, case.model, rows=ROWS, recompute=case.recompute, dropout=case.dropout)
    (stage,) = network.chunks
    parameters = storages(network.parameters.values())
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    tokens_cS = _batch(case).tokens_BT[: case.micro_batch]
    positions_cS = torch.arange(tokens_cS.shape[1]).expand_as(tokens_cS)
    stage.train()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        stage(tokens_cS, positions_cS, attention_mask=None)
    return sum(size for place, size in storages(saved).items() if place not in parameters)
