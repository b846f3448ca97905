"""Proves that Adam on the host is the plain optimizer bit for bit on CPU, where the copies in and out are made all the
same: steps, clipping, decay, the weight average, states, and weights written from outside.

Not proved here: pinned memory, the order of copies and kernels, and the fused kernel's rounding outside the one test
marked gpu, which no machine without CUDA runs; that a GPU has more room.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_rlhf.algorithms import average
from megatron_rlhf.config.schema import Adam
from megatron_rlhf.recipes import losses
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.host import HostAdam
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


def role(words: str, precision: str, *, host: bool) -> Engine:
    """A policy whose clip and decay are at work. Collective: world."""
    adam = Adam(weight_decay=0.1, clip=0.5, host=host)
    model = replace(tiny.MODEL, precision=precision)
    return tiny.engine(words, model=model, adam=adam, averaged=True, rate=0.01, epsilon=1e-5, dropout=0.1)


def train(policy: Engine, updates: range) -> list[dict[str, float]]:
    """The statistics of some updates. Collective: world."""
    found = []
    for number in updates:
        stats = policy.accumulate(tiny.rows(seed=number), losses.language) + policy.update(1 / (1 + number))
        policy.follow(partial(average.follow, decay=0.8))
        found.append(stats.means())
    return found


def everything(policy: Engine) -> list[torch.Tensor]:
    """Every tensor the role owns: weights, mains, moments with their steps, average."""
    if policy.optimizer is None or policy.average is None:
        return []
    states = [shard.adam.state[shard.main] for shard in policy.optimizer.held()]
    moments = [torch.as_tensor(entry[name]) for entry in states for name in sorted(entry)]
    assert len(moments) == 3 * len(policy.optimizer.shards()) > 30
    parameters = [parameter.detach() for parameter in policy.network.parameters.values()]
    return [*parameters, *policy.optimizer.shards(), *moments, *policy.average.shards]


def assert_equal(left: Engine, right: Engine) -> None:
    """Every tensor of the two roles is bit-equal, on every rank."""
    assert all(torch.equal(a, b) for a, b in zip(everything(left), everything(right), strict=True))


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "precision"),
    [
        ("tp2 pp2", "fp32"),
        ("dp2 @1-2", "bf16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tp2 dp2 sp", "fp32"), ("tp2 pp2", "fp16"))),
    ],
)
def test_it_is_the_plain_optimizer(words: str, precision: str) -> None:
    """Five updates; then each goes on from the state of the other, and shows its average and takes weights back."""
    plain, hosted = (role(words, precision, host=host) for host in (False, True))
    assert train(hosted, range(5)) == train(plain, range(5))
    assert_equal(hosted, plain)
    if plain.optimizer is not None and hosted.optimizer is not None:
        inner = hosted.optimizer.inner.chained_optimizers[0].optimizer
        assert isinstance(inner, HostAdam)
        assert all(main.data_ptr() != shard.data_ptr() for shard, main in inner.pairs)
        states = tiny.Kept(plain), tiny.Kept(hosted)
        for one, state in ((hosted, states[0]), (plain, states[1])):
            replace_state(one, state)
    assert train(hosted, range(5, 7)) == train(plain, range(5, 7))
    assert_equal(hosted, plain)
    live = tiny.weights(hosted.network)
    with hosted.averaged(), plain.averaged():
        assert tiny.distance(tiny.weights(hosted.network), live) > 1e-3
        assert_equal(hosted, plain)
    assert tiny.equal(tiny.weights(hosted.network), live)
    for one in (plain, hosted):
        with torch.no_grad():
            for parameter in one.network.parameters.values():
                parameter.mul_(1.5)
        if one.optimizer is not None:
            one.optimizer.reload()
    assert train(hosted, range(7, 8)) == train(plain, range(7, 8))
    assert_equal(hosted, plain)
    assert tiny.copies_agree(hosted.network)


def replace_state(policy: Engine, state: tiny.Kept) -> None:
    """Forget the main weights and put back the state that another role gave. Collective: dp."""
    assert policy.optimizer is not None
    for shard in policy.optimizer.shards():
        shard.detach().zero_()
    policy.restore(state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_torchs_adamw(dtype: torch.dtype) -> None:
    """Five steps with pinned mains and the fused kernel are AdamW on the device to 1e-6; the shards round them."""
    torch.manual_seed(0)
    shards = [torch.randn(1 << size, device="cuda").to(dtype) for size in range(1, 20)]
    plain = [torch.nn.Parameter(shard.float().clone()) for shard in shards]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    hosted = HostAdam([{"params": shards, **settings}], (0.9, 0.95), 1e-8)
    torches = torch.optim.AdamW(plain, betas=(0.9, 0.95), eps=1e-8, **settings)
    for _ in range(5):
        for shard, weight in zip(shards, plain, strict=True):
            shard.decoupled_grad = torch.randn(shard.shape, device="cuda")  # type: ignore[attr-defined]
            weight.grad = shard.decoupled_grad.clone()  # type: ignore[attr-defined]
        hosted.step()
        torches.step()
    for (shard, main), weight in zip(hosted.pairs, plain, strict=True):
        assert main.is_pinned()
        assert torch.equal(shard, main.to("cuda").to(dtype))
        torch.testing.assert_close(main, weight.detach().cpu(), rtol=1e-6, atol=1e-6)
