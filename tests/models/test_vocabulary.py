"""Proves that the vocabulary head is applied to the positions that predict response tokens and to no others, so many at
a time as was asked, and that loss and gradients are those of logits of every position on one rank, the head's product
and softmax in float64; that a head whose gradient is not added up, one a position off and one gathered wrong are seen.

A model's gradients may differ by 1.5e-6 of its largest one, losses by 1e-6, as in invariance/test_gradients.

Not proved here: gradients of 16-bit weights; what the kernels allocate inside (ops/test_logprob, benchmarks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlhf.batch import Rows
from megatron_rlhf.config.schema import Model
from megatron_rlhf.models import roles, vocabulary
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.parallel.collectives import gather
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.microbatch import cut
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

LAYOUTS = ["tp2 pp2", "tp2 dp2 sp", "pp2 vp2 dp2"]
PADDED, WORDS = 2048, 2000
MODEL = replace(tiny.MODEL, hidden=64, vocabulary=WORDS, init_std=0.05)
TEMPERATURE = 0.7
NEAR, SAME = 1.5e-6, 1e-6
LENGTHS = [40, 12, 5, 9, 30, 2, 17, 24, 3, 8, 21, 15, 6]
FAULTS = ("not added up", "one position off", "summed")


def batch() -> Rows:
    """Ragged rows with a response, two that are all prompt, and so many empty ones that they fill micro-batches."""
    generator = torch.Generator().manual_seed(6)
    lengths_B = torch.tensor([*LENGTHS, 7, 4])
    prompts_B = torch.cat([(lengths_B[:-2] // 3).clamp(min=1), lengths_B[-2:]])
    tokens_BT = torch.randint(1, WORDS, (len(lengths_B), max(LENGTHS)), generator=generator)
    tokens_BT = tokens_BT.masked_fill(torch.arange(max(LENGTHS)) >= lengths_B[:, None], 0)
    return Rows(tokens_BT, prompts_B, lengths_B).select(torch.tensor([*range(len(lengths_B)), *[-1] * 9]))


def role(words: str, read: roles.Read, *, model: Model = MODEL, **compute: Any) -> Engine:
    """A policy with 4 rows a micro-batch. Collective: world."""
    made = tiny.engine(words, read, model=model, rows=PADDED)
    made.compute = replace(made.compute, **compute)
    return made


def every_position(network: Network, hidden_cSH: Tensor, rows: Rows, width: int) -> Tensor:
    """What `roles.logprobs` reads, of float64 logits of all positions, for rows that lie alone on one rank."""
    name = "embedding.word_embeddings.weight" if network.model.tied else "output_layer.weight"
    logits_cSV = hidden_cSH.double() @ network.parameters[name].double().T
    log_p_cSV = (logits_cSV[..., :WORDS] / TEMPERATURE).log_softmax(-1)
    found_bR = torch.zeros(len(rows), width, dtype=torch.float64)
    for b, (start, end) in enumerate(zip(rows.prompt_lengths_B.tolist(), rows.lengths_B.tolist(), strict=True)):
        for token in range(start, end):
            found_bR[b, token - start] = log_p_cSV[b, token - 1, rows.tokens_BT[b, token]]
    return found_bR


def learned(made: Engine, rows: Rows) -> tuple[float, dict[str, Tensor]]:
    """Loss and full gradients of one accumulation. Collective: world."""
    stats = made.accumulate(rows, losses.language, packable=True)
    return stats["loss.language"], tiny.step(made)[1]


def expected(rows: Rows, model: Model) -> tuple[float, dict[str, Tensor]]:
    """The same by plain autograd on one rank, the loss NaN on the other ranks. Collective: world."""
    seen: list[float] = []

    def loss(found_BR: Tensor, part: Rows, whole: Rows) -> tuple[Tensor, Stats]:
        value, stats = losses.language(found_BR, part, whole)
        seen.append(float(value))
        return value, stats

    network = tiny.network(tiny.ONE, model, rows=PADDED)
    gradients = tiny.plain_gradients(network, roles.Read(every_position), [(rows, loss, 1.0)])
    return (seen or [torch.nan])[0], gradients


def worst(found: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a gradient, in parts of the largest gradient, and its tensor."""
    assert found.keys() == right.keys()
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    return max((float((found[name] - right[name]).abs().max()) / largest, name) for name in right)


@on_grid(4)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", LAYOUTS)
def test_gradients_are_those_of_every_positions_logits(words: str, tied: bool) -> None:
    """At once or a few positions at a time, in rows that lie alone, in several lengths and end to end; some rows have
    no response, and some micro-batches no row."""
    model, rows = replace(MODEL, tied=tied), batch()
    loss, gradients = expected(rows, model)
    losses_seen = []
    for compute in (
        {"head_rows": 0},
        {"head_rows": 7},
        {"head_rows": 7, "buckets": 2},
        {"head_rows": 5, "packing": True, "pack_tokens": 60},
    ):
        made = role(words, roles.logprobs(TEMPERATURE, head_rows=int(compute.pop("head_rows"))), model=model, **compute)
        if not compute:
            calls = cut(rows, made.network.grid, made.compute.micro_batch)
            assert any(not part.rows.lengths_B.any() for parts in calls for part in parts)
        found, theirs = learned(made, rows)
        losses_seen.append(found)
        difference, name = worst(theirs, gradients)
        assert difference <= NEAR, (compute, name, difference)
    assert max(losses_seen) - min(losses_seen) <= SAME
    assert not abs(losses_seen[0] - loss) > SAME


@on_grid(4)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_head_is_seen(fault: str) -> None:
    """By the comparison above."""
    rows, whole = batch(), vocabulary.whole
    right = expected(rows, MODEL)[1]
    summing = vocabulary.gather_from_sequence_parallel_region

    def summed(hidden: Tensor, tensor_parallel_output_grad: bool, group: Any) -> Tensor:
        return summing(hidden, tensor_parallel_output_grad=True, group=group)

    changed: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "not added up": ("copy_to_tensor_model_parallel_region", lambda hidden, group: hidden),
        "one position off": ("whole", lambda network, hidden: whole(network, hidden).roll(1, 1)),
        "summed": ("gather_from_sequence_parallel_region", summed),
    }
    for head_rows in (0, 7):
        with mock.patch.object(vocabulary, *changed[fault]):
            found = learned(role("tp2 dp2 sp", roles.logprobs(TEMPERATURE, head_rows=head_rows)), rows)[1]
        assert worst(found, right)[0] > 1e-2


class Allocations(TorchDispatchMode):
    """Notes inside the context how many rows each product has whose columns are `columns` words, and the numbers that
    each new storage of at least `least` numbers holds."""

    def __init__(self, columns: int, least: int) -> None:
        """Notes nothing yet."""
        super().__init__()
        self.columns, self.least = columns, least
        self.products: list[int] = []
        self.large: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator."""
        before = {_place(tensor) for tensor in _tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        made = {_place(tensor): tensor for tensor in _tensors(found)}
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.products += [x.numel() // x.shape[-1] for x in made.values() if x.shape[-1] == self.columns]
        new = [tensor.untyped_storage().nbytes() // 4 for place, tensor in made.items() if place not in before]
        self.large += [numbers for numbers in new if numbers >= self.least]
        return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def replicas(made: Engine, numbers: list[int]) -> int:
    """The sum of `numbers` over the replicas' ranks that hold the head's first words. Collective: world."""
    grid = made.network.grid
    return int(gather(torch.tensor([sum(numbers) if grid.speaks else 0])).sum())


@on_grid(4)
@pytest.mark.parametrize("words", LAYOUTS)
def test_the_head_sees_the_positions_that_predict(words: str) -> None:
    """Each response token costs one row of the product, two where logits are made again for the gradient, and no more
    than asked for are made at once; nothing depends on how many."""
    rows = batch()
    responses = int(rows.response_lengths_B.sum())
    columns = PADDED // (2 if "tp2" in words else 1)
    made = role(words, roles.logprobs())
    wide = made.forward(rows)
    with mock.patch.object(vocabulary, "FORWARD_ROWS", 11), Allocations(columns, 1) as seen:
        narrow = made.forward(rows)
    assert replicas(made, seen.products) == responses < int(rows.lengths_B.sum())
    assert max(seen.products, default=0) <= 11
    assert max(seen.products, default=0) > 1 or not made.network.grid.last_stage
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-5)
    for head_rows, times in ((0, 1), (7, 2)):
        made = role(words, roles.logprobs(head_rows=head_rows))
        with Allocations(columns, 1) as seen:
            made.accumulate(rows, losses.language)
        assert replicas(made, seen.products) == times * responses
        assert max(seen.products, default=0) <= (head_rows or responses)


@on_grid(4)
@pytest.mark.parametrize("head_rows", [0, 16])
def test_training_holds_the_logits_once(head_rows: int) -> None:
    """The gradient is written over the logits: a micro-batch makes one tensor of [N, V/tp], or none of more than
    `head_rows` rows, forward and backward. The reference is asked for the least it can take at once."""
    rows = tiny.rows(8, longest=30, vocabulary=WORDS)
    words, model = PADDED // 2, replace(MODEL, hidden=16, heads=2)
    made = role("tp2 pp2", roles.logprobs(head_rows=head_rows), model=model, micro_batch=8)
    numbers = int(rows.response_lengths_B.sum()) * words
    # nothing else is as large: neither activations nor the weight's gradient
    least = (head_rows + 1) * words if head_rows else numbers
    assert least > max(words * model.hidden, int(rows.tokens_BT.numel()) * model.ffn_width // 2)
    with mock.patch("megatron_rlhf.ops.logprob_reference._CHUNK", 1), Allocations(words, least) as seen:
        made.accumulate(rows, losses.language)
    assert seen.large == ([numbers] if made.network.grid.last_stage and not head_rows else [])
