"""Seconds of every phase of every recipe under a stated roofline. Pure, no torch.

Every row is as long as the settings allow, as in the paper's own count: shorter prompts and answers take less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Config, Model
from megatron_rlhf.plan import flops, generation, pipeline
from megatron_rlhf.plan.generation import Turns
from megatron_rlhf.plan.pipeline import Cut
from megatron_rlhf.plan.roofline import Seconds
from megatron_rlhf.plan.stage import Stage

STATE_BYTES = 12
"""Bytes a parameter of a saved state: fp32 weight and two moments; 4 more for the weight average."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of an iteration or step takes, all its repetitions together."""

    name: str
    seconds: Seconds
    flops: float = 0.0
    """Operations that the result needs, on all GPUs; what is computed again does not count."""
    tokens: float = 0.0
    """Positions that go through the network, the padded ones too."""
    times: float = 1.0
    """How often it happens in an iteration."""


@dataclass(frozen=True, slots=True)
class Role:
    """One role's stages, and its settings."""

    config: Config
    stage: Stage

    @classmethod
    def of(cls, config: Config, world: int, name: str) -> Role:
        """The role `name` of `layout` in a world of `world` ranks. Raises LayoutError where its words do not fit it."""
        scalar = name in ("value", "reward")
        layout = Layout.parse(getattr(config.layout, name), world)
        model = config.reward_model if scalar else config.model
        return cls(config, Stage(model, layout, config.cluster, config.compute, scalar=scalar))

    @property
    def model(self) -> Model:
        """Its network's settings."""
        return self.stage.model

    def read(self, name: str, rows: int, length: int, positions: int, each: int = 1) -> Phase:
        """A forward pass without backward over `rows` elements of `each` rows, the head at `positions` of a row."""
        positions = 0 if self.stage.scalar else positions
        cut = Cut.of(rows, self.config.compute.forward_micro_batch, self.stage.layout, each)
        work = flops.forward(self.model, rows * each, length, rows * each * positions)
        return Phase(name, pipeline.run(self.stage, cut, length, positions, backward=False), work, rows * each * length)

    def learn(self, name: str, rows: int, length: int, positions: int, times: int = 1, each: int = 1) -> Phase:
        """`times` passes, forward and backward, over `rows` elements of `each` rows."""
        positions = 0 if self.stage.scalar else positions
        cut = Cut.of(rows, self.config.compute.micro_batch, self.stage.layout, each)
        seconds = times * pipeline.run(self.stage, cut, length, positions, backward=True)
        work = times * flops.learned(self.model, rows * each, length, rows * each * positions)
        return Phase(name, seconds, work, times * rows * each * length, times)

    def update(self, name: str, times: int = 1, *, averaged: bool = False) -> Phase:
        """`times` optimizer steps."""
        return Phase(name, times * pipeline.update(self.stage, self.config.adam, averaged=averaged), times=times)


POLICY = ("policy", "reference")
"""The roles whose phases the policy's train layout decides."""
GENERATE = ("generate",)
CRITICS = ("value", "reward")
_ROLES = (*POLICY, *GENERATE, *CRITICS)


def iteration(
    config: Config, world: int, switch: Seconds, room: int = 0, *, roles: Sequence[str] = _ROLES
) -> tuple[Phase, ...]:
    """The phases of one PPO iteration in their order (recipes/ppo.py `step`), those of `roles`.

    `switch` is what moving the weights takes (`switched`); `room` is how many sequences a replica decodes together
    where sampling.batch=0 leaves it to the memory that is free, 0 for all of them.
    """
    ppo, answer = config.ppo, config.sampling.max_tokens
    length = config.data.max_prompt_tokens + answer
    at = {name: Role.of(config, world, name) for name in roles if name != "generate"}
    found: list[Phase] = []
    if "generate" in roles:
        found += [Phase("reshard", switch), *generate(config, world, room)]
    if "reward" in at:
        found.append(at["reward"].read("score", ppo.episodes, length, 0))
    for name, phase in (("reference", "reference"), ("policy", "old log-probs"), ("value", "values")):
        if name in at:
            found.append(at[name].read(phase, ppo.episodes, length, answer))
    updates, size = ppo.minibatches * ppo.epochs, ppo.episodes // ppo.minibatches
    if "value" in at:
        value = at["value"]
        found += [value.learn("train value", size, length, 0, updates), value.update("update value", updates)]
    if "policy" in at:
        found.append(at["policy"].learn("train policy", size, length, answer, updates))
        if ppo.pretraining_coef:
            mixed, text = size * ppo.pretraining_ratio, config.pretrain.length
            found.append(at["policy"].learn("train pretraining mix", mixed, text, text, updates))
        found.append(at["policy"].update("update policy", updates, averaged=True))
    if config.checkpoint.every and "policy" in at:
        found.append(saved(config, world, 1 / config.checkpoint.every))
    return tuple(found)


def generate(config: Config, world: int, room: int = 0) -> tuple[Phase, ...]:
    """Prefill and decoding of an iteration's episodes, every response as long as it may be."""
    role = Role.of(config, world, "generate")
    stage, episodes = role.stage, config.ppo.episodes
    prompt, answer = config.data.max_prompt_tokens, config.sampling.max_tokens
    dp, pp = stage.layout.dp, stage.layout.pp
    batch = config.sampling.batch or room or math.ceil(episodes / dp)
    turns = Turns.of(episodes, dp, batch, config.sampling.groups, pp)
    whole = flops.forward(role.model, episodes, prompt, episodes)
    mean = flops.attention(role.model, episodes, answer - 1, prompt + answer / 2) * role.model.layers
    new = episodes * (answer - 1)
    grown = role.model.layers * flops.layer(role.model, new) + flops.head(role.model, new) + mean
    return (
        Phase("prefill", generation.prefilled(stage, turns, prompt), whole, episodes * prompt),
        Phase("decode", generation.decoded(stage, turns, prompt + answer, answer - 1), grown, new),
    )


def switched(config: Config, world: int, nic: float, nvlink: float) -> Seconds:
    """What going to the generate layout takes: the plan's seconds between nodes and inside them at rated speeds, side
    by side, and the state parked and fetched where `reshard.park_optimizer` asks for it."""
    factors = config.cluster.factors
    between, inside = nic / factors.nic, nvlink / factors.nvlink
    found = Seconds(nic=between, nvlink=max(0.0, inside - between))
    if config.reshard.park_optimizer and not config.adam.host:
        policy = Role.of(config, world, "policy").stage
        shard = pipeline.heaviest(policy.model, policy.layout) / policy.layout.dp
        found += Seconds(host=2 * (STATE_BYTES + 4) * shard / config.cluster.host)
    return found


def saved(config: Config, world: int, times: float = 1.0) -> Phase:
    """A PPO state written by all ranks: policy with its average and value model, 12 and 4 bytes a parameter; where
    `checkpoint.asynchronous` the run waits for the copy to host memory only."""
    policy = (STATE_BYTES + 4) * pipeline.whole(config.model)
    value = STATE_BYTES * pipeline.whole(config.reward_model, scalar=True)
    each = (policy + value) / world
    if config.checkpoint.asynchronous:
        return Phase("save", Seconds(host=times * each / config.cluster.host), times=times)
    return Phase("save", Seconds(disk=times * each / config.cluster.disk), times=times)


def written(config: Config, world: int) -> float:
    """Seconds until a PPO state is on storage, which the run may not wait for."""
    policy, value = pipeline.whole(config.model), pipeline.whole(config.reward_model, scalar=True)
    return ((STATE_BYTES + 4) * policy + STATE_BYTES * value) / world / config.cluster.disk


def step(config: Config, world: int, recipe: str) -> tuple[Phase, ...]:
    """One step of a supervised recipe: pretrain, sft, rl_start or reward (K responses, the largest K)."""
    full = config.data.max_prompt_tokens + config.data.max_response_tokens
    if recipe == "pretrain":
        role, text = Role.of(config, world, "pretrain"), config.pretrain.length
        learned = [role.learn("train", config.pretrain.batch, text, text)]
    elif recipe == "reward":
        role = Role.of(config, world, "reward")
        learned = [role.learn("train", config.reward.batch, full, 0, each=config.rank.responses_max)]
    else:
        role, settings = Role.of(config, world, "policy"), config.sft if recipe == "sft" else config.rl_start
        every = settings.loss_on == "sequence"
        learned = [role.learn("train", settings.batch, full, full if every else config.data.max_response_tokens)]
        if settings.pretraining_fraction:
            text = config.pretrain.length
            mixed = max(1, round(settings.batch * settings.pretraining_fraction))
            learned.append(role.learn("train pretraining mix", mixed, text, text))
    return (*learned, role.update("update"))


@dataclass(frozen=True, slots=True)
class Bill:
    """What phases cost together on `world` GPUs."""

    seconds: float
    mfu: float
    """Model operations over what the GPUs could do at their rated speed in that time."""
    tokens_per_second: float
    gpu_hours: float
    kilowatt_hours: float
    """0 where the cluster states no power."""
    price: float
    """0 where it states no price."""

    @classmethod
    def of(cls, phases: Sequence[Phase], config: Config, world: int, tokens: float) -> Bill:
        """The bill of `phases`, which learn from `tokens`: those of the rows and not of the mix, as in log.jsonl."""
        cluster = config.cluster
        seconds = math.fsum(phase.seconds.total for phase in phases)
        hours = seconds * world / 3600
        return cls(
            seconds=seconds,
            mfu=math.fsum(phase.flops for phase in phases) / (seconds * world * cluster.flops),
            tokens_per_second=tokens / seconds,
            gpu_hours=hours,
            kilowatt_hours=hours * cluster.watts / 1000,
            price=hours * cluster.price,
        )

    def times(self, count: float) -> Bill:
        """`count` of it, one after the other."""
        return replace(
            self,
            seconds=count * self.seconds,
            gpu_hours=count * self.gpu_hours,
            kilowatt_hours=count * self.kilowatt_hours,
            price=count * self.price,
        )
