"""Proves that gradient buffers, optimizer state and a lodger's weights leave the device and come back bit for bit, that
nothing is lost or read meanwhile, and that training does not notice.

Not proved here: pinned memory, and copies beside other work of the device, outside the tests marked gpu, which no
machine without CUDA runs; how much room a GPU gains.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from megatron_rlhf.algorithms import average
from megatron_rlhf.config.schema import Adam, Compute
from megatron_rlhf.models import roles
from megatron_rlhf.recipes import losses
from megatron_rlhf.train import offload
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import Arena, Lodger, Offload, resident
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


def role(words: str, precision: str = "fp32", *, host: bool = False, seed: int = 5) -> Engine:
    """A policy with an average, whose moments appear at the first update. Collective: world."""
    adam, model = Adam(weight_decay=0.1, host=host), replace(tiny.MODEL, precision=precision)
    return tiny.engine(words, model=model, adam=adam, averaged=True, rate=0.01, dropout=0.1, seed=seed)


def learn(policy: Engine, number: int) -> dict[str, float]:
    """The statistics of one update. Collective: world."""
    stats = policy.accumulate(tiny.rows(seed=number), losses.language) + policy.update()
    policy.follow(partial(average.follow, decay=0.8))
    return stats.means()


def state(policy: Engine) -> list[torch.Tensor]:
    """Main weights, moments and average, each where it lies."""
    assert policy.optimizer is not None and policy.average is not None
    entries = [entry for adam in policy.optimizer.adams() for entry in adam.state.values()]
    moments = [entry[name] for entry in entries for name in ("exp_avg", "exp_avg_sq")]
    return [*policy.optimizer.shards(), *moments, *policy.average.shards]


def gradients(policy: Engine) -> list[torch.Tensor]:
    """The gradient buffers."""
    assert policy.optimizer is not None
    return policy.optimizer.gradients()


def bits(policy: Engine) -> list[torch.Tensor]:
    """Everything the role owns, copied."""
    if policy.optimizer is None:
        return []
    return [tensor.detach().clone() for tensor in (*policy.network.parameters.values(), *state(policy))]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether all tensors are bit-equal."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "precision", "host"),
    [
        ("tp2 dp2 sp", "bf16", False),
        ("dp2 @1-2", "fp32", False),
        pytest.param("tp2 pp2", "bf16", True, marks=pytest.mark.slow),
    ],
)
def test_training_does_not_notice(words: str, precision: str, host: bool) -> None:
    """Four updates with a stay on the host before each are those without, and a state saved after is the same."""
    plain, parked = (role(words, precision, host=host) for _ in range(2))
    leaves = Offload(parked, state=True)
    for number in range(4):
        leaves.start()
        leaves.finish()
        forward = parked.forward(tiny.rows())
        leaves.restore()
        assert torch.equal(forward, plain.forward(tiny.rows()))
        assert learn(parked, number) == learn(plain, number)
        assert equal(bits(parked), bits(plain))
    restored = role(words, precision, host=host, seed=6)
    leaves.start()
    leaves.finish()
    leaves.restore()
    restored.restore(tiny.Kept(parked))
    assert learn(restored, 9) == learn(plain, 9)


@on_grid(4)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_device_is_free_meanwhile(precision: str) -> None:
    """All but the weights has no storage left; the arena is allocated before there are moments and then never again;
    tensors are the same objects afterwards."""
    policy = role("tp2 dp2", precision)
    assert policy.optimizer is not None
    leaves, memory = Offload(policy, state=True), 0
    for number in range(3):
        tensors, before, grads = state(policy), bits(policy), gradients(policy)
        mains = len(policy.optimizer.shards())
        leaves.start()
        leaves.finish()
        assert sum(t.untyped_storage().nbytes() for t in grads) == 0
        left = sum(1 for t in tensors if t.untyped_storage().nbytes())
        assert left == (0 if precision == "bf16" else mains), "fp32 weights are their own main weights"
        assert leaves.arena.size == memory or number == 0
        memory = leaves.arena.size
        leaves.restore()
        assert all(a is b for a, b in zip(tensors, state(policy), strict=True))
        assert equal(bits(policy), before)
        assert all(not grad.any() for grad in grads)
        learn(policy, number)
    gone = Offload(policy, state=False)
    gone.start()
    gone.finish()
    assert all(t.untyped_storage().nbytes() == 0 for t in gradients(policy)) and gone.arena.size == 0
    gone.restore()
    assert all(t.untyped_storage().nbytes() for t in state(policy))


@on_grid(4)
def test_what_is_away_is_not_read() -> None:
    """State, averages, gradients and updates raise between start and restore; before them open gradients do."""
    policy = role("tp2 pp2", "bf16")
    assert policy.optimizer is not None
    learn(policy, 0)
    leaves = Offload(policy, state=True)
    policy.accumulate(tiny.rows(), losses.language)
    with pytest.raises(RuntimeError, match="accumulated gradients would be lost"):
        leaves.start()
    policy.update()
    leaves.start()
    leaves.finish()
    reads = (
        policy.pieces,
        policy.optimizer.shards,
        policy.optimizer.publish,
        policy.optimizer.reload,
        policy.optimizer.zero,
        policy.optimizer.finalise,
        lambda: policy.follow(partial(average.follow, decay=0.8)),
        lambda: policy.averaged().__enter__(),
    )
    for read in reads:
        with pytest.raises(RuntimeError, match="have left the device for the generate phase"):
            read()
    assert policy.forward(tiny.rows()).any()
    leaves.restore()
    leaves.restore()
    learn(policy, 1)


@on_grid(4)
@pytest.mark.parametrize(("words", "precision"), [("tp2 pp2", "bf16"), ("dp2 @1-2", "fp32")])
def test_a_lodger_shares_the_device_memory(words: str, precision: str) -> None:
    """It reads as a reference of its own does, in chunks of few bytes; its owner trains on and keeps every bit."""
    policy, undisturbed = (role(words, precision) for _ in range(2))
    model = policy.network.model
    reference = Engine(tiny.network(words, model), roles.logprobs(), policy.compute)
    lodger = Lodger(policy, roles.logprobs(), Compute(forward_micro_batch=8))
    asked = tiny.rows(seed=30)
    expected = reference.forward(asked)
    for number in range(3):
        assert learn(policy, number) == learn(undisturbed, number)
        before, live = bits(policy), policy.forward(asked)
        assert not torch.equal(live, expected)
        with mock.patch.object(offload, "_CHUNK", 1000), resident(lodger):
            assert torch.equal(lodger.forward(asked), expected)
            if policy.optimizer is not None:
                assert not equal([p.detach() for p in policy.network.parameters.values()], before)
        assert equal(bits(policy), before)
        assert torch.equal(policy.forward(asked), live)
    assert equal(bits(policy), bits(undisturbed))


@on_grid(4)
def test_neither_is_read_in_the_others_place() -> None:
    """The lodger outside, its owner inside; an exception inside brings the owner back."""
    policy = role("tp2 dp2")
    lodger, other = (Lodger(policy, roles.logprobs(), policy.compute) for _ in range(2))
    learn(policy, 0)
    before, asked = bits(policy), tiny.rows()
    with pytest.raises(RuntimeError, match="weights wait in host memory"):
        lodger.forward(asked)
    with pytest.raises(KeyError, match="stumbled"), resident(lodger):
        for read in (
            lambda: policy.forward(asked),
            lambda: policy.accumulate(asked, losses.language),
            policy.update,
            policy.pieces,
        ):
            with pytest.raises(RuntimeError, match="another role's weights are in this role's place"):
                read()
        with pytest.raises(RuntimeError, match="the owner's place is taken"), resident(other):
            pass
        raise KeyError("stumbled")
    assert equal(bits(policy), before) and not policy.lent
    with resident(policy):
        policy.forward(asked)
    learn(policy, 1)


def test_an_arena_grows_only_when_it_must() -> None:
    arena = Arena()
    first = arena.room(1000)
    first.fill_(7)
    assert arena.room(10).data_ptr() == first.data_ptr() and arena.size == 1000
    assert arena.room(1001).numel() == 1001 == arena.size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_arena_is_pinned() -> None:
    """Memory of an odd size is page-locked as it is, and grows."""
    arena = Arena()
    assert arena.room(1234567).is_pinned()
    assert arena.room(3 << 20).is_pinned()
    assert arena.size == 3 << 20
