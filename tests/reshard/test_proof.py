"""Proves that the digest of weights does not depend on the layout and that every planted fault changes it or is named.

Not proved here: that two different sets of weights never have one digest (64 bits are no proof against an adversary);
GPUs; which layer a drift comes from (test_drift.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_rlhf.models import names
from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard import proof
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

LAYOUTS = [tiny.ONE, "tp2 pp2", "dp4", "tp2 dp2 sp", "pp4", "tp4", "pp2 dp2 order=tp-pp-dp", "tp2 pp2 vp2", "pp2 @2-3"]
FC1, NORM = "decoder.layers.2.mlp.linear_fc1.weight", "decoder.final_layernorm.weight"


def by_hand(whole: Tensor) -> int:
    """The digest of a whole tensor, number by number in Python."""
    kind = {4: torch.int32, 2: torch.int16}[whole.element_size()]
    total = 0
    for row, numbers in enumerate(whole.view(kind).view(whole.shape[0], -1).tolist()):
        for column, bits in enumerate(numbers):
            total += bits * factor(row, 1) * factor(column, 2)
    return total % 2**64


def factor(index: int, salt: int) -> int:
    """SplitMix64's finaliser, made odd."""
    mixed = (index + salt * 2**40) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return (mixed ^ mixed >> 31) | 1


@on_grid(4)
@pytest.mark.parametrize(("style", "precision"), [("gpt", "fp32"), ("llama", "bf16")])
def test_it_does_not_depend_on_the_layout(style: str, precision: str) -> None:
    """Split by rows, columns and SwiGLU's blocks, tied, replicated or on other ranks: one sum, that of plain Python."""
    model = replace(tiny.STYLES[style], precision=precision)
    expected = {name: by_hand(whole) for name, whole in tiny.weights(tiny.network(tiny.ONE, model)).items()}
    assert len(set(expected.values())) > 15
    for words in LAYOUTS:
        assert proof.digest(tiny.network(words, model)) == expected, words


@on_grid(4)
@pytest.mark.parametrize("style", tiny.STYLES)
def test_other_padding_counts_for_nothing(style: str) -> None:
    """Networks with 128 and 100 rows hold the same weights; the rows beyond 100 may be anything."""
    wide, narrow = tiny.network("tp2 pp2", tiny.STYLES[style]), tiny.network("dp4", tiny.STYLES[style], rows=100)
    for name in proof._VOCABULARY:
        if name in narrow.directory:
            whole, parameter = torch.randn(128, 32), wide.parameters.get(name)
            dist.broadcast(whole, 0)
            narrow.parameters[name].data.copy_(whole[:100])
            if parameter is not None:
                parameter.data.copy_(wide.directory[name].split.part(whole, 2, wide.grid.tp_rank))
    proof.same(wide, narrow)
    proof.same(narrow, wide)
    assert proof.digest(wide) != proof.digest(narrow)


def flip(parameter: Tensor) -> None:
    """The lowest bit of one number."""
    parameter.view(torch.int32).view(-1)[5] ^= 1


def swap_numbers(parameter: Tensor) -> None:
    """Two neighbours change places."""
    flat = parameter.view(-1)
    flat[2:4] = flat[2:4].flip(0)


def swap_rows(parameter: Tensor) -> None:
    """Two rows change places."""
    parameter[3:5] = parameter[3:5].flip(0)


def turn(parameter: Tensor) -> None:
    """A square part is transposed."""
    side = min(parameter.shape)
    parameter[:side, :side] = parameter[:side, :side].T.clone()


def negate_zero(parameter: Tensor) -> None:
    """What compares equal has other bits."""
    parameter[1, 1] = -0.0


@on_grid(4)
@pytest.mark.parametrize("fault", [flip, swap_numbers, swap_rows, turn, negate_zero])
def test_a_fault_in_the_target_is_named(fault: Callable[[Tensor], None]) -> None:
    """The same on all copies of a shard, so that no copy gives it away; the vocabulary's sum changes too."""
    source, target = tiny.network("tp2 pp2"), tiny.network("tp2 dp2")
    for name in (FC1, names.EMBEDDING):
        for built in (source, target):
            if name in built.parameters:
                built.parameters[name].data[1, 1] = 0.0
    proof.same(source, target)
    for name in (FC1, names.EMBEDDING):
        if target.grid.tp_rank == 1:
            fault(target.parameters[name].data)
    with pytest.raises(RuntimeError, match=rf"{FC1}, {names.EMBEDDING} did not arrive"):
        proof.same(source, target)


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "name", "rank", "said"),
    [
        ("dp4", FC1, 2, "ranks 2 and 0, 1, 3 hold"),
        ("tp2 dp2", FC1, 3, r"ranks (1 and 3|3 and 1) hold"),
        ("tp2 dp2", NORM, 3, "ranks 3 and 0, 1, 2 hold"),
        ("tp2 pp2", names.EMBEDDING, 3, r"ranks (1 and 3|3 and 1) hold"),
    ],
)
def test_a_copy_that_differs_is_named(words: str, name: str, rank: int, said: str) -> None:
    """One bit on one rank: of a replica, a weight that tp does not split, a tied output layer."""
    built = tiny.network(words)
    if dist.get_rank() == rank:
        flip(built.parameters[name].data)
    with pytest.raises(RuntimeError, match=rf"copies of {name} differ: of the first, {said}"):
        proof.digest(built)


@on_grid(4)
def test_a_skipped_parameter_sync_is_seen() -> None:
    """Without the gather after the step replicas hold weights of two steps."""
    role = tiny.engine("dp4", rate=0.01)
    role.accumulate(tiny.rows(), losses.language)
    with mock.patch.object(DistributedDataParallel, "start_param_sync", lambda *_, **__: None):
        role.update()
    with pytest.raises(RuntimeError, match=r"copies of .* and \d+ more differ"):
        proof.digest(role.network)


@on_grid(4)
def test_swapped_and_missing_tensors_are_named() -> None:
    """Two layers in each other's place are two faults; a tensor the source lacks has not arrived."""
    source, target = tiny.network("tp2 pp2"), tiny.network("dp4")
    first, second = (target.parameters[f"decoder.layers.{n}.mlp.linear_fc2.weight"].data for n in (1, 3))
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.linear_fc2.weight, .*layers.3.mlp.linear_fc2.weight did not"):
        proof.same(source, target)
    without = {name: entry for name, entry in source.directory.items() if name != NORM}
    parameters = {name: parameter for name, parameter in source.parameters.items() if name != NORM}
    with pytest.raises(RuntimeError, match=rf"^{NORM}, .* did not arrive"):
        proof.same(replace(source, directory=without, parameters=parameters), target)


def test_it_is_bounded_in_memory() -> None:
    """A tensor of many chunks has the sum it has in one."""
    weight, split = torch.randn(300, 77), names.Split(0, 2)
    whole = proof._sum(weight, split, 1, 0, 0)
    with mock.patch.object(proof, "_CHUNK", 1000):
        assert torch.equal(proof._sum(weight, split, 1, 0, 0), whole)
        halves = [proof._sum(split.part(weight, 2, place), split, 2, place, 0) for place in range(2)]
    assert torch.equal(halves[0] + halves[1], whole)
