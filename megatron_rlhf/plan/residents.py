"""What the roles of a run keep on a GPU, and on its host, from their start to the end of the run. Pure, no torch.

A role's engine is built once and never freed, so every phase holds the weights of all of them; what a phase frees or
parks is said in plan/memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Config, Model
from megatron_rlhf.plan import parameters
from megatron_rlhf.plan.activations import BYTES
from megatron_rlhf.plan.parameters import Stage
from megatron_rlhf.reshard.grouping import grouped
from megatron_rlhf.reshard.layout import Place, TensorSpec, layers, specs
from megatron_rlhf.reshard.topology import Seats

GRADIENT = 4
"""Bytes a weight of the gradient buffers, fp32 whatever the weights are."""
MOMENTS = 8
"""Bytes a weight of Adam's two moments."""
MAIN = 4
"""Bytes a weight of the fp32 main weights, which fp32 weights are themselves."""
AVERAGE = 4
"""Bytes a weight of the moving average."""


@dataclass(frozen=True)
class Role:
    """A network of the run under its layout; `learns` with gradients and an optimizer, `averaged` with an average."""

    name: str
    model: Model
    layout: Layout
    rows: int
    scalar: bool = False
    learns: bool = False
    averaged: bool = False

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What a rank of each pipeline stage holds."""
        return parameters.stages(self.model, self.layout, self.rows, scalar=self.scalar)

    def weights(self, stage: int) -> int:
        """Bytes of weights: in Megatron's flat buffer, gaps included, where the role learns."""
        held = self.stages[stage]
        return BYTES[self.model.precision] * (held.buffer if self.learns else held.weights)

    def gradients(self, stage: int) -> int:
        """Bytes of the flat gradient buffers."""
        return GRADIENT * self.stages[stage].buffer if self.learns else 0

    def optimizer(self, stage: int) -> int:
        """Bytes of main weights and moments, this rank's share of the distributed optimizer."""
        main = 0 if self.model.precision == "fp32" else MAIN
        return (main + MOMENTS) * self.stages[stage].shard if self.learns else 0

    def average(self, stage: int) -> int:
        """Bytes of the moving average, this rank's share."""
        return AVERAGE * self.stages[stage].shard if self.averaged else 0

    def on_host(self, stage: int) -> int:
        """Bytes of `adam.host`: fp32 main weights, moments and the gradients that are copied in."""
        return (MAIN + MOMENTS + GRADIENT) * self.stages[stage].shard if self.learns else 0


def ppo(config: Config, world: int) -> dict[str, Role]:
    """The roles of PPO by name; the reference has none of its own where it waits in host memory."""
    layout, model, reward = config.layout, config.model, config.reward_model
    rows = {id(each): parameters.padded(config, each, world) for each in (model, reward)}

    def role(name: str, of: Model, words: str, *, scalar: bool = False, learns: bool = False) -> Role:
        placed = Layout.parse(words, world)
        return Role(name, of, placed, rows[id(of)], scalar, learns, averaged=name == "policy")

    found = [
        role("policy", model, layout.policy, learns=True),
        role("reference", model, layout.reference),
        role("value", reward, layout.value, scalar=True, learns=True),
        role("reward", reward, layout.reward, scalar=True),
        role("generate", model, layout.generate),
    ]
    lodges = config.reshard.share_reference
    return {each.name: each for each in found if not (lodges and each.name == "reference")}


def tuned(config: Config, world: int, recipe: str) -> dict[str, Role]:
    """The one role of the recipes pretrain, sft and reward."""
    scalar = recipe == "reward"
    model = config.reward_model if scalar else config.model
    words = {"pretrain": config.layout.pretrain, "sft": config.layout.policy, "reward": config.layout.reward}[recipe]
    name = "reward" if scalar else "policy"
    rows = parameters.padded(config, model, world)
    return {name: Role(name, model, Layout.parse(words, world), rows, scalar, learns=True)}


@dataclass(frozen=True, slots=True)
class Seat:
    """The pipeline stage of each role on some rank, -1 where a role does not span it, and the bytes of the generate
    network that are the policy's own."""

    stages: dict[str, int]
    aliased: int = 0


def seats(roles: dict[str, Role], world: int) -> list[Seat]:
    """Every different seat of a world's ranks."""
    layouts = {name: role.layout for name, role in roles.items()}
    bridge = "generate" in roles and "policy" in roles
    if bridge:
        layouts["generate"] = dealt(roles["policy"], roles["generate"])
    placed = {name: Seats.of(layout, world) for name, layout in layouts.items()}
    columns = [each.pp for each in placed.values()]
    if bridge:
        alike = layouts["generate"].tp == layouts["policy"].tp
        columns.append((placed["generate"].tp == placed["policy"].tp).astype(np.int64) * alike)
    found = []
    for row in np.unique(np.stack(columns), axis=1).T.tolist():
        stages = dict(zip(placed, row, strict=False))
        inside = bridge and min(stages["policy"], stages["generate"]) >= 0
        aliased = shared(roles["policy"], roles["generate"], stages, same=bool(row[-1])) if inside else 0
        found.append(Seat(stages, aliased))
    return found


def dealt(policy: Role, generate: Role) -> Layout:
    """The generate layout with its ranks dealt as a run deals them (reshard/grouping.py), from one tensor a layer."""
    return _dealt(policy.model, policy.rows, policy.layout, generate.layout)


@lru_cache(maxsize=1024)
def _dealt(model: Model, rows: int, policy: Layout, generate: Layout) -> Layout:
    if (policy.first, policy.size) != (generate.first, generate.size) or generate.order != "tp-dp-pp":
        return generate
    thin = [tensor for tensor in specs(model, rows) if _stands(tensor)]
    return grouped(policy, generate, thin, thin)


def _stands(tensor: TensorSpec) -> bool:
    """Whether a tensor stands for its place: all tensors of a layer go where its first product's goes."""
    return tensor.dim is not None and (tensor.place is not Place.LAYER or tensor.name.endswith("linear_fc1.weight"))


def shared(policy: Role, generate: Role, stages: dict[str, int], *, same: bool) -> int:
    """Bytes of the shards that both layouts put on a rank and that are alike: the generate network's are the policy's.

    `same` says that the rank has the same shards of what tp splits; what it does not split is alike anyway.
    """
    model, mine, theirs = policy.model, policy.layout, generate.layout
    held = {layer for chunk in range(mine.vp) for layer in layers(model.layers, mine, stages["policy"], chunk)}
    common = len(held.intersection(layers(model.layers, theirs, stages["generate"])))
    ends = [_ends(layout, stages[name]) for name, layout in (("policy", mine), ("generate", theirs))]
    both = ends[0][0] and ends[1][0], ends[0][1] and ends[1][1]
    return BYTES[model.precision] * parameters.common(
        model, mine.tp, policy.rows, common, first=both[0], last=both[1], crossed=_crossed(model, ends), same=same
    )


def _ends(layout: Layout, stage: int) -> tuple[bool, bool]:
    return stage == 0, stage == layout.pp - 1


def _crossed(model: Model, ends: list[tuple[bool, bool]]) -> bool:
    """Whether a tied embedding is there on both sides, as itself or as the last stage's copy."""
    return model.tied and any(ends[0]) and any(ends[1])
