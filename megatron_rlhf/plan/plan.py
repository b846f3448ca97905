"""The plan of a PPO run: bytes and seconds of every phase, what they cost, and whether it fits. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_rlhf.config.schema import Config
from megatron_rlhf.plan import memory, residents, times
from megatron_rlhf.plan.phase import Phase as Bytes
from megatron_rlhf.plan.phase import cache_bytes, capacity
from megatron_rlhf.plan.reshard import reshard
from megatron_rlhf.plan.times import Bill, Phase
from megatron_rlhf.reshard.bound import Summary

RECIPES = ("pretrain", "sft", "rl_start", "reward")


@dataclass(frozen=True)
class Plan:
    """One PPO iteration on `world` GPUs, and a step of each recipe before it."""

    config: Config
    world: int
    memory: tuple[Bytes, ...]
    """Bytes of the busiest GPU by phase and cause."""
    moved: Summary
    """The reshard in numbers."""
    phases: tuple[Phase, ...]
    """Seconds by phase and cause."""
    bill: Bill
    """What an iteration costs."""

    @classmethod
    def of(cls, config: Config, world: int) -> Plan:
        """The plan of `config` on `world` ranks. Raises BadInput or LayoutError where its layouts do not fit."""
        found = memory.phases(config, world)
        moved = reshard(config).summary
        switch = times.switched(config, world, moved.node_time_s, moved.nvlink_time_s)
        phases = times.iteration(config, world, switch, _room(config, world, found))
        tokens = config.ppo.episodes * (config.data.max_prompt_tokens + config.sampling.max_tokens)
        return cls(config, world, found, moved, phases, Bill.of(phases, config, world, tokens))

    @property
    def capacity(self) -> float:
        """Bytes of a GPU that a phase may take."""
        return capacity(self.config)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return all(phase.total <= self.capacity for phase in self.memory)

    @cached_property
    def nearest(self) -> str:
        """The nearest change of one setting that fits."""
        return memory.nearest(self.config, self.world)

    @cached_property
    def steps(self) -> dict[str, Bill]:
        """What a step of each supervised recipe costs."""
        return {recipe: step(self.config, self.world, recipe) for recipe in RECIPES}

    @cached_property
    def run(self) -> Bill:
        """What all iterations cost."""
        return self.bill.times(self.config.ppo.iterations)


def step(config: Config, world: int, recipe: str) -> Bill:
    """What a step of a supervised recipe costs on `world` ranks."""
    phases = times.step(config, world, recipe)
    mixed = sum(phase.tokens for phase in phases if phase.name == "train pretraining mix")
    return Bill.of(phases, config, world, sum(phase.tokens for phase in phases) - mixed)


def _room(config: Config, world: int, found: tuple[Bytes, ...]) -> int:
    """Sequences that a replica decodes together where the free memory decides (generate/room.py)."""
    if config.sampling.batch:
        return config.sampling.batch
    role = residents.ppo(config, world)["generate"]
    each = cache_bytes(role, config.data.max_prompt_tokens + config.sampling.max_tokens)
    kept = next(phase for phase in found if phase.name == "generate").causes["keys and values"]
    return max(1, round(kept / each))
