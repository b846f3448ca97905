"""Bytes that a rank of a whole PPO run holds in each phase: all roles, built and led as recipes/ppo.py does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rlhf.batch import Prompts
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.load import load
from megatron_rlhf.config.schema import Config, Model
from megatron_rlhf.models import roles, transformer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import grid
from megatron_rlhf.recipes import losses
from megatron_rlhf.reshard import grouping, switch
from megatron_rlhf.reshard.layout import specs
from megatron_rlhf.rollout.annotate import annotate
from megatron_rlhf.rollout.credit import credit
from megatron_rlhf.rollout.sample import sample
from megatron_rlhf.rollout.score import score
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import Lodger
from tests.helpers import roles as tiny
from tests.helpers.live_storage import Live
from tests.helpers.measured_memory import Bytes, held, state

NEVER = -1
"""An end token that is never drawn: every response is as long as a plan says."""
_SIZES = (
    "experiment=quickstart", "data.max_prompt_tokens=64", "data.max_response_tokens=32", "sampling.max_tokens=64",
    "sampling.batch=8", "pretrain.length=96", "ppo.episodes=32", "ppo.minibatches=2", "ppo.pretraining_ratio=2",
    "compute.micro_batch=2", "compute.forward_micro_batch=4", "reshard.staging_mb=1",
)  # fmt: skip


def config(layouts: dict[str, str], *words: str) -> Config:
    """A PPO run of two small models, one vocabulary, under these layouts."""
    shapes = {"model": (4, 128), "reward_model": (2, 64)}
    sizes = [
        f"{model}.{key}={value}"
        for model, (layers, hidden) in shapes.items()
        for key, value in (
            ("layers", layers), ("hidden", hidden), ("heads", 4), ("vocabulary", 1024), ("context", 128),
        )
    ]  # fmt: skip
    return load("ppo", [*_SIZES, *sizes, *(f"layout.{role}={words}" for role, words in layouts.items()), *words])


@dataclass(frozen=True, slots=True)
class Roles:
    """The engines of a run and the bridge to the generate network."""

    policy: Engine
    reference: Engine
    value: Engine
    reward: Engine
    bridge: switch.Bridge


def of_run(run: Config) -> dict[str, Bytes]:
    """This rank's bytes by phase and cause, in the second iteration. Collective: world."""
    built = _built(run)
    parallel_state.get_global_memory_buffer().buffer.clear()
    _iteration(run, built, lambda phase, work: work())
    found: dict[str, Bytes] = {}

    def watched(phase: str, work: Callable[[], Any]) -> Any:
        with Live(tensor for tensors in _standing(built).values() for tensor in tensors) as live:
            answer = work()
        bytes_ = {**held(_standing(built)), "at work": float(live.peak)}
        if sum(bytes_.values()) > sum(found.get(phase, {}).values()):
            found[phase] = bytes_
        return answer

    _iteration(run, built, watched)
    return found


def _iteration(run: Config, built: Roles, watch: Callable[[str, Callable[[], Any]], Any]) -> None:
    """One iteration of recipes/ppo.py, each phase handed to `watch`."""
    ppo, value, policy = run.ppo, built.value, built.policy
    prompts = _prompts(run)
    watch("reshard", built.bridge.load)
    generator = switch.Generator(
        built.bridge.network, end=NEVER, rows=run.sampling.batch, groups=run.sampling.groups, ready=built.bridge.ready
    )
    rollout = watch("generate", lambda: sample(generator, prompts, run.sampling, seed=1, iteration=0))
    built.bridge.unload()

    def annotated() -> Any:
        return annotate(score(rollout, built.reward, ppo), policy, built.reference, value)

    experience = credit(watch("annotate", annotated), ppo, kl_coef=0.1)
    size = ppo.episodes // ppo.minibatches
    text = tiny.text(size * ppo.pretraining_ratio, run.pretrain.length, vocabulary=run.model.vocabulary)
    for minibatch in experience.minibatches(size, 1, 3):

        def learn_value(part: Any = minibatch) -> None:
            value.accumulate(part, losses.value(ppo.value_clip))

        def learn_policy(part: Any = minibatch) -> None:
            policy.accumulate(part, losses.policy(ppo.clip))
            policy.accumulate(text, losses.language_per("tokens"), ppo.pretraining_coef, packable=True)

        watch("train value", learn_value)
        value.update()
        watch("train policy", learn_policy)
        policy.update()


def _prompts(run: Config) -> Prompts:
    count, width = run.ppo.episodes, run.data.max_prompt_tokens
    tokens_BT = torch.randint(1, run.model.vocabulary, (count, width), generator=torch.Generator().manual_seed(4))
    return Prompts(tokens_BT, torch.full((count,), width), torch.arange(count))


def _built(run: Config) -> Roles:
    """As recipes/ppo.py prepares them, with their initial weights."""
    words, world = run.layout, dist.get_world_size()

    def network(model: Model, layout: Layout, *, scalar: bool = False) -> Network:
        return transformer.build(
            model, grid.build(layout), rows=model.vocabulary, seed=1, scalar=scalar, recompute=run.compute.recompute
        )

    def at(words: str) -> Layout:
        return Layout.parse(words, world)

    read = roles.logprobs(head_rows=run.compute.head_rows)
    policy = Engine(
        network(run.model, at(words.policy)), read, run.compute, adam=run.adam, learning=run.ppo.policy, averaged=True
    )
    lodges = run.reshard.share_reference
    reference = (
        Lodger(policy, read, run.compute)
        if lodges
        else Engine(network(run.model, at(words.reference)), read, run.compute)
    )
    tensors = specs(run.model, run.model.vocabulary)
    target = grouping.grouped(at(words.policy), at(words.generate), tensors, tensors)
    bridge = switch.build(policy, network(run.model, target), run.reshard)
    value = network(run.reward_model, at(words.value), scalar=True)
    reward = network(run.reward_model, at(words.reward), scalar=True)
    return Roles(
        policy=policy,
        reference=reference,
        value=Engine(value, roles.values(), run.compute, adam=run.adam, learning=run.ppo.value),
        reward=Engine(reward, roles.scores(), run.compute),
        bridge=bridge,
    )


def _standing(built: Roles) -> dict[str, list[Tensor]]:
    """What stays, by the plan's causes, in an order in which the policy's own shards are not the generate network's."""
    found: dict[str, list[Tensor]] = {}
    for name in ("policy", "value"):
        role: Engine = getattr(built, name)
        found[f"{name} weights"] = list(role.network.parameters.values())
        found[f"{name} gradients"] = role.optimizer.gradients() if role.optimizer else []
        found[f"{name} average"] = list(role.average.shards) if role.average else []
        found[f"{name} optimizer"] = _states(role)
    for name in ("reference", "reward"):
        found[f"{name} weights"] = list(getattr(built, name).network.parameters.values())
    found["generate weights"] = list(built.bridge.network.parameters.values())
    found["staging"] = list(built.bridge._mover.buffers)
    found["gather buffer"] = list(parallel_state.get_global_memory_buffer().buffer.values())
    return found


def _states(role: Engine) -> list[Tensor]:
    """Also while they are away, when Optimizer refuses to hand them out."""
    optimizer = role.optimizer
    if optimizer is None:
        return []
    away, optimizer.away = optimizer.away, False
    try:
        return list(state(role))
    finally:
        optimizer.away = away
