"""Bytes of the busiest GPU in every phase of a run, by cause, before anything is started. Pure, no torch.

Weights, gradients, optimizer and average are counted tensor by tensor, with the gaps of Megatron's flat buffers.
Activations are those of the longest rows (plan/passes.py), operation by operation (plan/activations.py). Stated in
plan/phase.py, not counted: what CUDA and its libraries take (`CONTEXT`), a communicator's buffers (`COMMUNICATOR`) and
the share of the memory that the allocator cannot use (`ALLOWANCE`). With `compute.transformer_engine=auto` it and its
fused Adam are taken to be there; with `never` torch's AdamW needs four bytes a weight while it steps.

Not modelled: roles that do not span a rank's phase in time (all roles are built at the start), a saved state's file
cache, and evaluation, which generates as PPO does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_rlhf.config.layout import Layout, LayoutError
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config
from megatron_rlhf.plan.activations import GPU, Kernels
from megatron_rlhf.plan.phase import Bytes, Phase, capacity


def phases(config: Config, world: int, *, recipe: str = "ppo", kernels: Kernels = GPU) -> tuple[Phase, ...]:
    """Every phase of a recipe (ppo, pretrain, sft, reward) in the order in which it runs.

    PPO: generate with the reshard before it, annotate (scores too), train value, train policy, save. Raises BadInput
    or LayoutError where the layouts do not fit the model or the world.
    """
    run = Bytes.of(config, world, recipe, kernels)
    found = []
    for name in run.names:
        seats = [Phase(name, run.causes(name, seat), run.host(name, seat)) for seat in run.seats]
        found.append(max(seats, key=lambda phase: phase.total))
    return tuple(found)


def fits(config: Config, world: int, *, recipe: str = "ppo") -> bool:
    """Whether every phase stays within the cluster's memory less the allowance."""
    return all(phase.total <= capacity(config) for phase in phases(config, world, recipe=recipe))


def fullest(config: Config, world: int, *, recipe: str = "ppo") -> Phase:
    """The phase that takes most."""
    return max(phases(config, world, recipe=recipe), key=lambda phase: phase.total)


def nearest(config: Config, world: int, *, recipe: str = "ppo") -> str:
    """One sentence: the first change of one setting that fits, those that cost least time first, and why it is needed.

    Says so where it fits as it is, or where no single change does.
    """
    now, limit = fullest(config, world, recipe=recipe), capacity(config)
    if now.total <= limit:
        return f"It fits: {now.name} takes most, {_gb(now.total)} of {_gb(limit)} GB."
    why = f"as it is, {now.name} takes {_gb(now.total)} GB ({_largest(now)})"
    least, words = now.total, ""
    for change, changed in _changes(config, world):
        try:
            then = fullest(changed, world, recipe=recipe)
        except (BadInput, LayoutError):
            continue
        if then.total <= limit:
            rest = f"; the most that another change before it saves is {words}, to {_gb(least)} GB" if words else ""
            taken = f"{then.name} then takes most, {_gb(then.total)} of {_gb(limit)} GB"
            return f"{change} fits: {taken}; {why}{rest}."
        if then.total < least:
            least, words = then.total, change
    best = f"; {words} comes nearest with {_gb(least)} GB" if words else ""
    return f"No change of one setting brings every phase under {_gb(limit)} GB: {why}{best}."


def _changes(config: Config, world: int) -> Iterator[tuple[str, Config]]:
    """Changes of one setting that save memory, the cheapest in time first: the host's Adam last."""
    compute, reshard, sampling, layout = config.compute, config.reshard, config.sampling, config.layout
    if not reshard.share_reference and layout.policy == layout.reference:
        yield "reshard.share_reference=true", replace(config, reshard=replace(reshard, share_reference=True))
    if not reshard.park_optimizer:
        yield "reshard.park_optimizer=true", replace(config, reshard=replace(reshard, park_optimizer=True))
    if not compute.head_rows:
        yield "compute.head_rows=256", replace(config, compute=replace(compute, head_rows=256))
    for size in _halves(sampling.batch):
        yield f"sampling.batch={size}", replace(config, sampling=replace(sampling, batch=size))
    for size in _halves(compute.forward_micro_batch):
        yield f"compute.forward_micro_batch={size}", replace(config, compute=replace(compute, forward_micro_batch=size))
    for size in _halves(compute.micro_batch):
        yield f"compute.micro_batch={size}", replace(config, compute=replace(compute, micro_batch=size))
    if compute.recompute != "full":
        yield "compute.recompute=full", replace(config, compute=replace(compute, recompute="full"))
    for words in _layouts(config, world):
        if words != layout.generate:
            yield f"'layout.generate={words}'", replace(config, layout=replace(layout, generate=words))
    for words in _layouts(config, world):
        sp = f"{words} sp" if "tp1 " not in words else words
        if Layout.parse(sp, world) != Layout.parse(layout.policy, world):
            changed = replace(layout, policy=sp, reference=sp)
            yield f"'layout.policy={sp}' 'layout.reference={sp}'", replace(config, layout=changed)
    if not config.adam.host:
        yield "adam.host=true", replace(config, adam=replace(config.adam, host=True))


def _layouts(config: Config, world: int) -> Iterator[str]:
    """Layouts of the policy's model on all ranks whose tp stays inside a node, the narrowest first."""
    model, node = config.model, config.cluster.node
    for tp in (1, 2, 4, 8, 16):
        for pp in range(1, world // tp + 1):
            divides = not (world % (tp * pp) or model.layers % pp or model.groups % tp or model.hidden % tp)
            if divides and tp <= node and not model.ffn_width % tp:
                yield f"tp{tp} pp{pp}"


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _largest(phase: Phase) -> str:
    """Its causes of at least a hundredth, the largest first."""
    causes = sorted(phase.causes.items(), key=lambda cause: -cause[1])
    return ", ".join(f"{name} {_gb(size)}" for name, size in causes if size >= phase.total / 100)
