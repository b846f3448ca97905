"""Proves that a token is drawn from the policy's present weights or not at all, that training does not notice the
switch, and that every planted fault ends in a sentence and leaves a bridge that works.

Not proved here: speed and memory; that copies overlap with the move (GPUs only).
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_rlhf.batch import Rollout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Reshard
from megatron_rlhf.generate import room
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.models import roles
from megatron_rlhf.models.attention import CoreAttention
from megatron_rlhf.models.decode import Cache
from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard import move, switch
from megatron_rlhf.reshard.switch import Bridge, State, generating
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import Lodger, resident
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

FC1 = "decoder.layers.1.mlp.linear_fc1.weight"


def bridged(words: str = "tp2 pp2", generate: str = "tp2 dp2", **settings: bool | int | str) -> Bridge:
    """The bridge of a policy one update from its start to a network of other weights. Collective: world."""
    role = tiny.engine(words, rate=0.01, averaged=True)
    learn(role)
    return switch.build(role, tiny.network(generate, seed=77), Reshard(**settings))  # type: ignore[arg-type]


def learn(role: Engine, rollout: Rollout | None = None) -> None:
    """One update. Collective: world."""
    role.accumulate(rollout.rows if rollout else tiny.rows(), losses.language)
    role.update()


def cached(bridge: Bridge) -> bool:
    """Whether keys and values hang in the generate network."""
    modules = [module for stage in bridge.network.chunks for module in stage.modules()]
    return any(module.cache is not None for module in modules if isinstance(module, CoreAttention))


def draw(bridge: Bridge, seed: int = 0, rows: int = 8) -> Rollout:
    """Five responses. Collective: world."""
    with generating(bridge, end=2, rows=rows) as generator:
        return generator.sample(tiny.prompts(5), Draw(seed=seed), 6)


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "generate", "settings"),
    [
        ("tp2 pp2", "tp2 dp2", {"park_optimizer": True, "check": True}),
        pytest.param("tp2 pp2 vp2", "dp4", {"park_optimizer": True, "proof": "never"}, marks=pytest.mark.slow),
        ("pp2 @0-1", "dp2 @2-3", {"park_optimizer": True}),
    ],
)
def test_generating_brings_the_last_steps_weights(words: str, generate: str, settings: dict[str, bool | str]) -> None:
    """Each time the present weights are there, drawn log-probs are those of training, and training is undisturbed."""
    bridge, undisturbed = bridged(words, generate, **settings), tiny.engine(words, rate=0.01, averaged=True)
    learn(undisturbed)
    policy, network, addresses = bridge.policy, bridge.network, []
    for number in range(3):
        rollout = draw(bridge, number)
        assert tiny.equal(tiny.weights(network), tiny.main_weights(policy))
        assert tiny.copies_agree(network)
        addresses.append([parameter.data_ptr() for parameter in network.parameters.values()])
        mask_BR = rollout.rows.response_mask_BR(rollout.rows.width)
        torch.testing.assert_close(rollout.drawn_logprobs_BR * mask_BR, policy.forward(rollout.rows), rtol=0, atol=1e-5)
        plain = tiny.network(generate, seed=78)
        move.copy(undisturbed.network, plain)
        expected = switch.Generator(plain, end=2, rows=8).sample(tiny.prompts(5), Draw(seed=number), 6)
        assert torch.equal(rollout.rows.tokens_BT, expected.rows.tokens_BT)
        for role in (policy, undisturbed):
            learn(role, rollout)
    assert tiny.equal(tiny.weights(undisturbed.network), tiny.weights(policy.network))
    assert addresses[0] == addresses[-1]


@on_grid(4)
def test_the_cost_is_that_of_the_rank_that_receives_most() -> None:
    """Bytes are the plan's lower bound, the same on all ranks, and staging is what was really allocated."""
    bridge = bridged("tp2 pp2", "dp4", staging_mb=1)
    assert bridge.cost is None
    draw(bridge)
    cost = bridge.cost
    assert cost is not None
    full = sum(t.numel() * 4 for t in tiny.weights(bridge.network).values())
    assert cost.bytes == cost.bound and 0.5 * full < cost.bytes < full
    assert 0 < cost.peak_extra <= 1 << 20 and 0 < cost.seconds < 60


@on_grid(4)
def test_a_generator_is_used_inside_alone() -> None:
    """Before it is READY, after its phase, and with the weights of another update nothing is drawn."""
    bridge = bridged()
    assert bridge.state is State.EMPTY
    with pytest.raises(RuntimeError, match="the generate network is EMPTY"):
        bridge.ready()
    with generating(bridge, end=2, rows=8) as generator:
        assert (bridge.state, bridge.version) == (State.READY, 1)
        with pytest.raises(RuntimeError, match="the policy is generating already"), generating(bridge, end=2, rows=8):
            pass
        bridge.policy.updates = 4
        with pytest.raises(RuntimeError, match="holds the weights of update 1, the policy has made 4"):
            generator.sample(tiny.prompts(5), Draw(), 6)
        bridge.policy.updates = 1
        generator.sample(tiny.prompts(5), Draw(), 6)
        Cache(bridge.network, 1, 4)
        assert cached(bridge)
    with pytest.raises(RuntimeError, match="is EMPTY: use a generator inside its `with generating"):
        generator.sample(tiny.prompts(5), Draw(), 6)
    assert not cached(bridge)


def flipped(bridge: Bridge) -> None:
    """One bit changes after every move, on all of its copies."""
    run = bridge._mover.run

    def moving() -> move.Moved:
        moved = run()
        bridge.network.parameters[FC1].data.view(torch.int32)[3, 5] ^= 1
        return moved

    bridge._mover.run = moving  # type: ignore[method-assign]


def stale(bridge: Bridge) -> None:
    """One rank keeps what it had before."""
    run = bridge._mover.run

    def moving() -> move.Moved:
        before = {name: parameter.detach().clone() for name, parameter in bridge.network.parameters.items()}
        moved = run()
        if dist.get_rank() == 3:
            bridge.network.parameters[FC1].data.copy_(before[FC1] + 1)
        return moved

    bridge._mover.run = moving  # type: ignore[method-assign]


def behind(bridge: Bridge) -> None:
    """One rank has missed an update."""
    bridge.policy.updates = 4 if dist.get_rank() == 2 else 3


def unsynchronised(bridge: Bridge) -> None:
    """The weights of one rank are not those of its replica: a bit of a norm, which tp does not split."""
    if dist.get_rank() == 1:
        bridge.policy.network.parameters["decoder.layers.0.input_layernorm.weight"].data[0] += 1


@on_grid(4)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (flipped, f"{FC1} did not arrive"),
        (stale, f"copies of {FC1} differ: of the first, ranks 3 and 0, 1, 2 hold"),
        (behind, "3 on 0, 1, 3; 4 on 2"),
        (unsynchronised, r"copies of decoder.layers.0.input_layernorm.weight differ: of the first, ranks . and ."),
    ],
)
def test_a_fault_stops_the_switch(fault: Callable[[Bridge], None], said: str) -> None:
    """All ranks raise the same sentence before anything can be drawn, and the policy's optimizer is back."""
    bridge = bridged("tp2 pp2", "dp4", park_optimizer=True)  # no shard of which is the policy's own
    fault(bridge)
    with pytest.raises(RuntimeError, match=said), generating(bridge, end=2, rows=8):
        pass
    assert bridge.state is State.EMPTY
    bridge.policy.updates = 1
    learn(bridge.policy)


@on_grid(4)
def test_a_skipped_parameter_sync_is_made_up_for() -> None:
    """Replicas that did not gather after the step do so before their weights move."""
    bridge = bridged("dp4", "tp2 pp2")
    with mock.patch.object(DistributedDataParallel, "start_param_sync", lambda *_, **__: None):
        learn(bridge.policy)
    draw(bridge)
    assert tiny.equal(tiny.weights(bridge.network), tiny.main_weights(bridge.policy))
    learn(bridge.policy)
    with (
        mock.patch.object(DistributedDataParallel, "start_param_sync", lambda *_, **__: None),
        pytest.raises(RuntimeError, match=r"copies of .* differ"),
    ):
        learn(bridge.policy)
        draw(bridge)


@on_grid(4)
def test_an_exception_inside_leaves_a_bridge_that_works() -> None:
    """Thrown in the middle of a generation by all ranks: the next switch and the next update are as without it."""
    bridge, undisturbed = (bridged(park_optimizer=True) for _ in range(2))
    with (
        pytest.raises(KeyError, match="stumbled"),
        mock.patch("megatron_rlhf.models.decode.advance", side_effect=KeyError("stumbled")),
    ):
        draw(bridge)
    assert not cached(bridge)
    for one in (bridge, undisturbed):
        learn(one.policy, draw(one))
    assert tiny.equal(tiny.weights(bridge.policy.network), tiny.weights(undisturbed.policy.network))


@on_grid(4)
def test_open_gradients_and_lent_weights_do_not_generate() -> None:
    """Nothing is freed or moved: the update that follows counts the gradients."""
    bridge = bridged(park_optimizer=True)
    bridge.policy.accumulate(tiny.rows(), losses.language)
    with pytest.raises(RuntimeError, match="accumulated gradients would be lost"), generating(bridge, end=2, rows=8):
        pass
    assert bridge.policy.update()["grad_norm"] > 0
    lodger = Lodger(bridge.policy, roles.logprobs(), bridge.policy.compute)
    with (
        resident(lodger),
        pytest.raises(RuntimeError, match="another role's weights are in this role's place"),
        generating(bridge, end=2, rows=8),
    ):
        pass
    draw(bridge)


@on_grid(4)
@pytest.mark.parametrize(("generate", "style"), [("pp2 dp2", "gpt"), ("tp2 pp2", "llama"), ("tp2 dp2", "biased")])
def test_rows_fit_in_what_is_free(generate: str, style: str) -> None:
    """Their number follows from the rank with the least memory, the cache has the size it was reckoned with, and the
    tokens are those of any other number of rows."""
    network, asked = tiny.network(generate, (tiny.STYLES | tiny.RELATIVES)[style]), tiny.prompts(5)
    layout, prompt = network.grid.layout, int(asked.lengths_B.max())
    cache = Cache(network, 3, prompt + 6)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    cache.drop()
    each, step = room.cache_bytes(network.model, layout, prompt + 6), room.step_bytes(network.model, layout, prompt)
    assert found == 3 * each
    free = [int(2.1 * (each + step / 2) / room.SHARE) + 9999 * rank for rank in range(4)][-1 - dist.get_rank()]
    plain = switch.Generator(network, end=2, rows=8).sample(asked, Draw(), 6)
    with mock.patch.object(room, "free_bytes", lambda: free):
        assert room.rows(network, prompt, 6, 2) == 2
        fitted = switch.Generator(network, end=2, rows=0).sample(asked, Draw(), 6)
        with pytest.raises(BadInput, match="bytes are free and a sequence takes"):
            room.rows(network, prompt, 600, 2)
    assert torch.equal(fitted.rows.tokens_BT, plain.rows.tokens_BT)
    assert room.free_bytes() > 1 << 20
