"""Proves that weights arrive bit-equal in every layout from every layout, after real optimizer steps, or not at all;
that a move allocates nothing, and packs nothing where the layouts mirror each other.

Not proved here: speed, GPUs, that the plan is a good one (tests/reshard/test_plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.models import names, transformer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import grid
from megatron_rlhf.parallel.collectives import any_rank, gather_objects, total
from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard import move
from megatron_rlhf.reshard.grouping import grouped
from megatron_rlhf.reshard.message import RankPlan
from megatron_rlhf.reshard.move import Mover
from megatron_rlhf.reshard.storage import check, tensors
from megatron_rlhf.reshard.topology import Cluster
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid
from tests.helpers.naive_plan import naive

GROUPED = " grouped"
PLANNERS = ("real", "naive", "nodes of 2")
UNTIED = replace(tiny.MODEL, tied=False)
BF16 = replace(tiny.LLAMA, precision="bf16")
SMOOTH = replace(tiny.MODEL, hidden=128)
"""Every shard of tp2 is a multiple of 64 numbers, so that Megatron's buffers have no gaps."""
PAIRS: list[tuple[str, list[str], Model]] = [
    ("tp2 pp2", ["tp2 dp2", "tp4", "pp2 dp2 order=tp-pp-dp", "dp4"], tiny.MODEL),
    ("pp2 vp2 dp2", ["tp2 pp2", "pp2 vp2 dp2 order=tp-pp-dp"], tiny.MODEL),
    ("tp2 dp2 sp", ["pp4", tiny.ONE], UNTIED),
    ("tp4", ["tp1 pp2 dp2", "tp2 pp2 order=tp-pp-dp"], BF16),
    ("tp2 pp2 vp2", ["dp4", "tp4"], tiny.LLAMA),
    ("tp2 @0-1", ["pp2 @2-3", "tp2 @2-3", "tp1 pp2 dp2"], tiny.MODEL),
]


def planned(source: Network, target: Network, planner: str = "real") -> RankPlan:
    """This rank's part of the plan from the one network to the other, by the planner of that name."""
    if planner != "naive":
        return move.between(source, target, Cluster(node=2) if planner == "nodes of 2" else None)
    sides = [(tuple(tensors(side).values()), side.grid.layout) for side in (source, target)]
    return naive(*sides[0], *sides[1])[dist.get_rank()]


def arrived(target: Network, expected: tiny.Tensors) -> bool:
    """Whether each rank holds its slice of `expected`, which may have fewer or more rows. Collective: world."""
    same, tp = True, target.grid.layout.tp
    for name, parameter in target.parameters.items():
        entry = target.directory[name]
        full = entry.split.whole_shape(entry.shard_shape, tp)
        wanted, limit = expected[name], min(full[0], expected[name].shape[0])
        padded = torch.zeros(full, dtype=parameter.dtype)
        padded[:limit] = wanted[:limit].to(parameter.dtype)
        known = torch.zeros(full, dtype=torch.bool)
        known[:limit] = True
        part, mask = (entry.split.part(whole, tp, target.grid.tp_rank) for whole in (padded, known))
        same &= torch.equal(part[mask], parameter.detach()[mask])
    return not any_rank(not same)


def another_step(role: Engine, number: int) -> dict[str, Tensor]:
    """The main weights, rounded as the model's, after an optimizer step. Collective: world."""
    role.accumulate(tiny.rows(seed=number), losses.language)
    role.update()
    return tiny.main_weights(role)


def trained(words: str) -> Engine:
    """A policy two steps from its start. Collective: world."""
    role = tiny.engine(words, rate=0.01)
    for number in range(2):
        another_step(role, number)
    return role


def dealt(words: str, source: Network) -> Network:
    """A network under `words` with its ranks dealt so that most of what `source` has stays. Collective: world."""
    layout, model = Layout.parse(words, dist.get_world_size()), source.model
    held = tuple(tensors(source).values())
    layout = grouped(source.grid.layout, layout, held, held)
    return transformer.build(model, grid.build(layout), rows=source.rows, seed=77)


def switches(
    words: str,
    targets: Sequence[str],
    model: Model,
    *,
    planners: Sequence[str] = ("real", "naive"),
    rows: int = tiny.PADDED,
) -> None:
    """Three moves, each after an optimizer step, into every target; staging is so small that most tensors are cut."""
    role = tiny.engine(words, model=model, rate=0.01)
    movers = []
    for number, (target_words, planner) in enumerate(product(targets, planners)):
        asked = target_words.removesuffix(GROUPED)
        target = tiny.network(asked, model, seed=77, rows=rows)
        target = target if asked == target_words else dealt(asked, role.network)
        plan = planned(role.network, target, planner)
        movers.append((target, Mover(role.network, target, plan, staging=4096, check=number % 2 == 1)))
    for number in range(3):
        expected = another_step(role, number)
        assert not any(arrived(target, expected) for target, _ in movers)
        for target, mover in movers:
            moved = mover.run()
            assert arrived(target, expected), target.grid.layout
            assert moved.staged <= moved.received + moved.sent
    assert tiny.equal(
        tiny.weights(role.network), {n: t.to(role.network.directory[n].dtype) for n, t in expected.items()}
    )


@on_grid(4)
@pytest.mark.parametrize(("words", "targets", "model"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_every_switch_is_bit_equal(words: str, targets: list[str], model: Model) -> None:
    """Every rank of the target holds its slice of the main weights, replicas and tied copies too, whoever plans.

    With two GPUs a node, ranks pull parts of what their node needs and hand them on.
    """
    switches(words, targets, model)


@on_grid(2)
@pytest.mark.parametrize(("words", "target"), [("tp2", "pp2"), ("pp2", "tp2"), ("tp1 @0-0", "tp2"), ("pp2 vp2", "dp2")])
def test_two_ranks(words: str, target: str) -> None:
    """Among them tied embeddings over both stages, and a source of one rank."""
    switches(words, [target], tiny.MODEL)


@on_grid(8)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "targets", "model"),
    [
        ("tp2 pp4", ["tp4 dp2", "tp1 dp8", "tp4 dp2 grouped"], tiny.MODEL),
        ("tp2 pp2 dp2", ["tp2 dp4", "tp4 dp2", "tp1 pp2 dp4"], tiny.MODEL),
        ("tp4 pp2 order=tp-pp-dp", ["tp2 pp4", "tp2 dp4 order=tp-pp-dp", "tp2 pp2 dp2 grouped"], BF16),
        ("tp2 pp2 vp2 dp2", ["tp4 pp2", "tp4 pp2 grouped", "tp2 pp2 @4-7"], UNTIED),
        ("tp2 pp2 @0-3", ["tp4 @4-7", "tp1 pp2 dp2 @4-7"], UNTIED),
    ],
)
def test_eight_ranks(words: str, targets: list[str], model: Model) -> None:
    """As on four."""
    switches(words, targets, model, planners=("real", "nodes of 2"))


@on_grid(12)
@pytest.mark.slow
def test_the_policy_on_eight_ranks_and_the_generator_on_four_others() -> None:
    """Disjoint ranks: nothing is kept, and ranks of the target are in nobody's source."""
    switches("tp2 pp2 dp2 @0-7", ["tp2 dp2 @8-11", "tp4 @8-11"], tiny.MODEL)


@on_grid(4)
def test_another_padding_of_the_vocabulary() -> None:
    """Rows both have arrive, whichever has more; the others keep what they were."""
    for rows in (104, 192):
        switches("tp2 pp2", ["tp4", "dp4"], UNTIED, rows=rows)
    source, target = tiny.network("tp2 pp2"), tiny.network("tp4", rows=192, seed=77)
    kept = tiny.weights(target)[names.EMBEDDING]
    Mover(source, target, planned(source, target)).run()
    assert torch.equal(tiny.weights(target)[names.EMBEDDING][tiny.PADDED :], kept[tiny.PADDED :])


@on_grid(4)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mirrored_layouts_are_not_packed(precision: str) -> None:
    """With equal tp every message is ranges of both sides' buffers, its own shards are the source's, and nothing goes
    through a staging buffer; where tp differs it does, and the buffers keep to their size."""
    for words, target_words in (("tp2 pp2", "tp2 dp2"), ("pp4", "pp2 dp2 order=tp-pp-dp"), ("pp2 vp2 dp2", "dp4")):
        role = tiny.engine(words, model=replace(SMOOTH, precision=precision))
        target = tiny.network(target_words, role.network.model, seed=77)
        mover = Mover(role.network, target, plan := planned(role.network, target))
        moved = mover.run()
        assert arrived(target, tiny.main_weights(role))
        assert (moved.staged, sum(buffer.nbytes for buffer in mover.buffers)) == (0, 0), words
        assert all(target.parameters[n].data_ptr() == role.network.parameters[n].data_ptr() for n in plan.aliased)
    target = tiny.network("tp2 pp2", role.network.model)
    mover = Mover(role.network, target, planned(role.network, target), staging=10000)
    assert any_rank(mover.run().staged > 0)
    assert all(buffer.nbytes <= 10000 for buffer in mover.buffers)
    assert all(len(each.operations) <= 64 for each in mover.exchanges)


class Allocations(TorchDispatchMode):
    """Counts the tensors that operations return in memory that none of their arguments lie in."""

    def __init__(self) -> None:
        """None so far."""
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at where its results lie."""
        answer = func(*args, **(kwargs or {}))
        flat = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = {value.untyped_storage().data_ptr() for value in flat}
        for value in torch.utils._pytree.tree_leaves(answer):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.found.append(str(func))
        return answer


@on_grid(4)
def test_a_move_allocates_nothing() -> None:
    """No operation of the second move makes memory, packed or not; nothing hangs on an autograd graph."""
    role = tiny.engine("tp2 pp2")
    for words in ("tp2 dp2", "pp2 dp2", "tp4"):
        target = tiny.network(words, seed=77)
        mover = Mover(role.network, target, planned(role.network, target), staging=4096)
        mover.run()
        with Allocations() as allocations:
            mover.run()
        assert not allocations.found
        with Allocations() as allocations:
            torch.zeros(3).clone()
        assert len(allocations.found) == 2, "the counter itself"
        assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in target.parameters.values())


@on_grid(4)
def test_bytes_are_those_of_the_plan() -> None:
    """Received and kept together are the target's shards, and received by all is what all sent."""
    role = tiny.engine("pp4")
    target = tiny.network("tp4", seed=77)
    moved = Mover(role.network, target, planned(role.network, target)).run()
    assert moved.received + moved.kept == sum(parameter.nbytes for parameter in target.parameters.values())
    assert total(moved.received) == total(moved.sent) > 0


@on_grid(4)
def test_a_dealing_that_keeps_most_moves_fewer_bytes() -> None:
    """Ranks of a target that were dealt anew hold what they should, and need no bytes that others have."""
    role, most = tiny.engine("pp2 dp2 order=tp-pp-dp"), []
    for target in (tiny.network("tp2 pp2", seed=77), dealt("tp2 pp2", role.network)):
        mover = Mover(role.network, target, planned(role.network, target))
        most.append(max(gather_objects(mover.run().received)))
        assert arrived(target, tiny.main_weights(role))
    assert most[0] > most[1] == 0
    assert target.grid.layout.places


@on_grid(4)
def test_what_was_brought_is_handed_on() -> None:
    """A relayed round sends what came in the round before it, however few buckets lie between."""
    role = tiny.engine("tp2 pp2", rate=0.01)
    for staging in (1024, 1 << 20):
        target = tiny.network("dp4", seed=77)
        plan = planned(role.network, target, "nodes of 2")
        assert [each.relayed for each in plan.rounds] == sorted(each.relayed for each in plan.rounds)
        assert plan.rounds[-1].relayed
        mover = Mover(role.network, target, plan, staging=staging)
        assert sum(each.waits for each in mover.exchanges) == sum(each.relayed for each in plan.rounds)
        mover.run()
        expected = another_step(role, staging)
        mover.run()
        assert arrived(target, expected)


@on_grid(4)
def test_a_copy_is_independent() -> None:
    """`copy` writes where the target's shards are, even of a role that learns, and shares no memory with the source;
    it tells the most bytes that a rank received."""
    role, other = tiny.engine("tp2 pp2", rate=0.01), tiny.engine("tp2 dp2", seed=77)
    before = another_step(role, 0)
    places = {name: parameter.data_ptr() for name, parameter in other.network.parameters.items()}
    received = move.copy(role.network, other.network)
    kept = planned(role.network, other.network).aliased
    mine = sum(parameter.nbytes for name, parameter in other.network.parameters.items() if name not in kept)
    assert received == max(gather_objects(mine)) > 0
    assert move.copy(role.network, tiny.network("tp2 pp2", seed=78)) == 0
    another_step(role, 1)
    assert arrived(other.network, before)
    assert places == {name: parameter.data_ptr() for name, parameter in other.network.parameters.items()}


@on_grid(4)
def test_a_skipped_parameter_sync_is_seen() -> None:
    """Without the gather after the step, what is moved are last step's weights of other replicas."""
    role = tiny.engine("dp4", rate=0.01)
    target = tiny.network("tp2 pp2", seed=77)
    mover = Mover(role.network, target, planned(role.network, target))
    expected = another_step(role, 0)
    mover.run()
    assert arrived(target, expected)
    with mock.patch.object(DistributedDataParallel, "start_param_sync", lambda *_, **__: None):
        expected = another_step(role, 1)
    mover.run()
    assert not arrived(target, expected)


@on_grid(4)
def test_a_dropped_bucket_is_seen() -> None:
    """One bucket that rank 3 does not put into place: the weights differ, and with checksums it is named."""
    role, target = tiny.engine("pp4", rate=0.01), tiny.network("tp4", seed=77)
    plan = planned(role.network, target)
    for checked in (False, True):
        mover = Mover(role.network, target, plan, check=checked)
        mover.run()
        expected = another_step(role, int(checked))
        if dist.get_rank() == 3:
            place, broken = next((n, e) for n, e in enumerate(mover.exchanges) if e.receive and e.receive.staged)
            mover.exchanges[place] = replace(broken, receive=replace(broken.receive, staged=()))
        if checked and dist.get_rank() == 3:
            with pytest.raises(RuntimeError, match=rf"rank {broken.peer} sent of .*weight.* is not what rank 3 has"):
                mover.run()
        else:
            mover.run()
        assert not arrived(target, expected)


@on_grid(4)
def test_a_plan_that_brings_too_little_or_too_much_is_refused() -> None:
    """The tensor is named before anything moves."""
    source, target = tiny.network("pp4"), tiny.network("tp4")
    plan = planned(source, target)
    assert plan.rounds
    (first, *others), last = plan.rounds[-1].receive, plan.rounds[-1]
    for wrong in (replace(last, receive=tuple(others)), replace(last, receive=(first, first, *others))):
        with pytest.raises(RuntimeError, match=rf"the plan brings .* of {first.name}, and .* is needed"):
            Mover(source, target, replace(plan, rounds=(*plan.rounds[:-1], wrong)))


@on_grid(4)
def test_what_is_not_alike_is_refused() -> None:
    """The error names the tensor and both sides."""
    source = tiny.network("tp2 pp2")
    plan = planned(source, tiny.network("tp2 dp2"))
    with pytest.raises(RuntimeError, match=r"bias is \(32,\) .* in the source and \(64,\)|is \(.*32\).* and \(.*64\)"):
        Mover(source, tiny.network("tp2 dp2", replace(tiny.MODEL, hidden=64)), plan)
    with pytest.raises(RuntimeError, match=r"torch.float32 in the source .* torch.bfloat16 here"):
        Mover(source, tiny.network("tp2 dp2", replace(tiny.MODEL, precision="bf16")), plan)
    with pytest.raises(RuntimeError, match=r"the source's vocabulary has 100 tokens and the target's 90"):
        Mover(source, tiny.network("tp2 dp2", replace(tiny.MODEL, vocabulary=90)), plan)
    with pytest.raises(RuntimeError, match=r"no weights for head.weight, head.bias|no weights for head.bias, head"):
        Mover(source, tiny.network("tp2 dp2", scalar=True), plan)
    with pytest.raises(BadInput, match="staging=8 is too small .* staging=67108864"):
        Mover(source, tiny.network("tp2 dp2"), plan, staging=8)
    with pytest.raises(RuntimeError, match="is a weight that learns"):
        Mover(source, tiny.engine("tp2 dp2").network, plan)


@on_grid(4)
def test_shards_that_lie_elsewhere_are_refused() -> None:
    """A Mover looks at memory once; where it was given away since, on either side, no weight is moved."""
    source, target = tiny.network("tp2 pp2"), tiny.network("tp2 dp2")
    mover = Mover(source, target, planned(source, target))
    mover.run()
    for side in (source, target):
        name, parameter = next(iter(side.parameters.items()))
        parameter.data = (before := parameter.data).clone()
        with pytest.raises(RuntimeError, match=f"{name} lies elsewhere"):
            mover.run()
        parameter.data = before
        mover.run()


@on_grid(4)
@pytest.mark.parametrize("style", tiny.STYLES | tiny.RELATIVES)
def test_live_modules_are_held_against_their_specs(style: str) -> None:
    """Names, shapes, splits and dtypes, of the whole model and of this rank."""
    network = tiny.network("tp2 pp2", (tiny.STYLES | tiny.RELATIVES)[style])
    check(network)
    fc1 = "decoder.layers.0.mlp.linear_fc1.weight"
    entry = network.directory[fc1]
    faults: list[tuple[names.Entry, str]] = [
        (replace(entry, split=names.Split(1)), "split along 1"),
        (replace(entry, split=names.Split(0, 3)), "in 3 blocks"),
        (replace(entry, split=names.Split(None)), "replicated"),
        (replace(entry, shard_shape=(1, 32)), r"\(1, 32\)"),
        (replace(entry, dtype=torch.bfloat16), "torch.bfloat16"),
    ]
    for wrong, fault in faults:
        with pytest.raises(RuntimeError, match=f"{fc1} is .*{fault}.*in the model, its spec says"):
            check(replace(network, directory={**network.directory, fc1: wrong}))
    with pytest.raises(RuntimeError, match=f"differ in {fc1}$"):
        check(replace(network, directory={n: e for n, e in network.directory.items() if n != fc1}))
    name = next(iter(network.parameters))
    with pytest.raises(RuntimeError, match=f"this rank's tensors and the specs differ in {name}$"):
        check(replace(network, parameters={n: p for n, p in network.parameters.items() if n != name}))
    with pytest.raises(RuntimeError, match=f"{name} is .* on this rank"):
        check(replace(network, parameters={**network.parameters, name: torch.nn.Parameter(torch.zeros(3))}))
