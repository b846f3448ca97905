"""One phase's bytes on one rank, by cause: what the roles keep and what the phase itself takes. Pure, no torch.

`plan/memory.py` says what is counted, what is stated and what is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Config
from megatron_rlhf.plan import activations, passes, residents
from megatron_rlhf.plan.activations import BYTES, Kernels, Part, Pass
from megatron_rlhf.plan.residents import Role, Seat

ALLOWANCE = 0.05
"""Share of a GPU's memory for fragmentation: gaps between blocks that the allocator holds and cannot use."""
CONTEXT = 1.0e9
"""Bytes of the CUDA context, cuBLAS's workspaces and loaded kernels."""
COMMUNICATOR = 0.1e9
"""Bytes of NCCL's buffers for one group of ranks: 4 MiB a channel and direction (NCCL_BUFFSIZE), over a dozen."""
GROUPS = 6
"""Groups of a layout that communicate: tp, pp, dp, tp x pp, tp x dp and all of it."""
STEP = 4
"""Bytes a weight beside the state while torch's AdamW steps: the root of all second moments at once."""
_PROOF = 4 << 20
"""Weights that are widened to 64 bits together for their digest (reshard/proof.py)."""
_SHARE, _STREAMS, _DRAW = 0.8, 8, 40
"""generate/room.py: share of the free memory that caches may take, hidden states that a layer holds in prefill, bytes
a column of the vocabulary while a token is drawn."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a run: bytes on the GPU that holds most in it, by cause, and in that GPU's share of its host."""

    name: str
    causes: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes on the busiest GPU."""
        return sum(self.causes.values())


def capacity(config: Config) -> float:
    """Bytes of a GPU that a phase may take."""
    return config.cluster.memory * (1 - ALLOWANCE)


@dataclass(frozen=True, slots=True)
class Bytes:
    """A recipe's roles, their seats on the ranks and their passes."""

    config: Config
    world: int
    recipe: str
    kernels: Kernels
    roles: dict[str, Role]
    seats: list[Seat]

    @classmethod
    def of(cls, config: Config, world: int, recipe: str, kernels: Kernels) -> Bytes:
        """The roles of `recipe` and their seats. Raises BadInput or LayoutError where the layouts do not fit."""
        roles = residents.ppo(config, world) if recipe == "ppo" else residents.tuned(config, world, recipe)
        return cls(config, world, recipe, kernels, roles, residents.seats(roles, world))

    @property
    def names(self) -> tuple[str, ...]:
        """The recipe's phases, in order."""
        if self.recipe == "ppo":
            return ("reshard", "generate", "annotate", "train value", "train policy", "save")
        return (f"train {next(iter(self.roles))}", "save")

    def causes(self, name: str, seat: Seat) -> dict[str, float]:
        """Bytes by cause of a rank in this seat; causes of 0 bytes are left out."""
        found = dict(self._kept(name, seat))
        if name.startswith("train "):
            found |= self._training(name.removeprefix("train "), seat)
        elif name == "annotate":
            found |= self._annotating(seat)
        elif name == "generate":
            found |= self._generating(seat, sum(found.values()))
        elif name == "reshard":
            found["proof"] = self._proof(seat)
        elif name == "save":
            found["average swap"] = max(
                (residents.AVERAGE * role.stages[stage].largest for role, stage in self._here(seat) if role.averaged),
                default=0,
            )
        return {cause: size for cause, size in found.items() if size}

    def host(self, name: str, seat: Seat) -> dict[str, float]:
        """Bytes in host memory by cause."""
        found: dict[str, float] = {}
        adam, reshard = self.config.adam, self.config.reshard
        for role, stage in self._here(seat):
            if adam.host:
                found[f"{role.name} optimizer"] = role.on_host(stage) + role.average(stage)
            elif role.name == "policy" and reshard.park_optimizer and self.recipe == "ppo":
                found["parked optimizer"] = role.optimizer(stage) + role.average(stage)
            if role.name == "policy" and reshard.share_reference and self.recipe == "ppo":
                found["reference weights"] = BYTES[role.model.precision] * role.stages[stage].weights
            if name == "save" and role.learns:
                state = (residents.MAIN + residents.MOMENTS) * role.stages[stage].shard + role.average(stage)
                found["snapshot"] = found.get("snapshot", 0) + state
        return {cause: size for cause, size in found.items() if size}

    def _here(self, seat: Seat) -> Iterator[tuple[Role, int]]:
        for name, stage in seat.stages.items():
            if stage >= 0:
                yield self.roles[name], stage

    def _kept(self, name: str, seat: Seat) -> Iterator[tuple[str, float]]:
        """What is there in the phase whatever runs in it."""
        adam, reshard = self.config.adam, self.config.reshard
        for role, stage in self._here(seat):
            away = role.name == "policy" and name in ("reshard", "generate")
            parked = name == "generate" and role.name == "policy" and reshard.park_optimizer
            yield f"{role.name} weights", role.weights(stage) - (seat.aliased if role.name == "generate" else 0)
            if not away:
                yield f"{role.name} gradients", role.gradients(stage)
            if not (adam.host or parked):
                yield f"{role.name} optimizer", role.optimizer(stage)
                yield f"{role.name} average", role.average(stage)
        if "generate" in self.roles:
            policy, generate = self.roles["policy"].layout, self.roles["generate"].layout
            yield "staging", 0 if policy.tp == generate.tp else reshard.staging_mb << 20
        yield "communication", COMMUNICATOR * GROUPS * sum(layout.size > 1 for layout in self._layouts)
        yield "gather buffer", self._gathered()
        yield "context", CONTEXT

    @property
    def _layouts(self) -> set[Layout]:
        return {role.layout for role in self.roles.values()}

    def _gathered(self) -> float:
        """What sequence parallelism gathers into, a buffer that stays and that all roles share."""
        sizes = [
            BYTES[role.model.precision] * role.model.hidden * run.length * run.lines
            for role in self.roles.values()
            if role.layout.sp and role.layout.tp > 1
            for run in (*self._passes(role), *self._reads(role))
        ]
        return max(sizes, default=0)

    def _passes(self, role: Role) -> list[Pass]:
        """The passes of a role that learns, in which it learns."""
        config, layout = self.config, role.layout
        if not role.learns:
            return []
        if self.recipe == "ppo":
            if role.name == "policy":
                return passes.policy(config, layout)
            size = config.ppo.episodes // config.ppo.minibatches
            each = config.compute.micro_batch
            return [passes.episodes(config, layout, size, each, dropout=config.ppo.dropout)]
        if self.recipe == "pretrain":
            return [passes.text(config, layout, config.pretrain.batch)]
        return passes.demonstrations(config, layout) if self.recipe == "sft" else passes.rankings(config, layout)

    def _reads(self, role: Role) -> list[Pass]:
        """The passes in which PPO reads a role without learning."""
        if self.recipe != "ppo" or role.name == "generate":
            return []
        config = self.config
        return [passes.episodes(config, role.layout, config.ppo.episodes, config.compute.forward_micro_batch)]

    def _training(self, name: str, seat: Seat) -> dict[str, float]:
        role, stage = self.roles[name], seat.stages[name]
        if stage < 0:
            return {}
        compute = self.config.compute
        rows = 0 if role.scalar else role.rows
        parts = [
            activations.training(
                role.model, role.layout, stage, run, recompute=compute.recompute, rows=rows,
                head_rows=compute.head_rows, kernels=self.kernels,
            )
            for run in self._passes(role)
        ]  # fmt: skip
        most = max(parts, key=lambda part: part.total)
        step = STEP * role.stages[stage].shard if compute.transformer_engine == "never" else 0
        if step > most.total and not self.config.adam.host:
            return {"adam step": step}
        return {"activations": most.activations, "logits": most.logits}

    def _annotating(self, seat: Seat) -> dict[str, float]:
        """One role reads at a time; where the reference lodges in the policy's place, it reads there."""
        parts: list[Part] = []
        for role, stage in self._here(seat):
            rows = 0 if role.scalar else role.rows
            head = self.config.compute.head_rows
            parts += [
                activations.reading(
                    role.model, role.layout, stage, run, rows=rows, head_rows=head, kernels=self.kernels
                )
                for run in self._reads(role)
            ]
        most = max(parts, key=lambda part: part.total, default=Part(0, 0, 0))
        return {"activations": most.activations, "logits": most.logits, "exact KL": self._exact(seat)}

    def _exact(self, seat: Seat) -> float:
        """The reference's logits beside the policy's, and its head where it only lodges (models/exact_kl.py)."""
        role = self.roles["policy"]
        if self.config.ppo.kl.estimator != "exact" or seat.stages["policy"] != role.layout.pp - 1:
            return 0
        words = min(max(run.words for run in self._reads(role)), activations.FORWARD_ROWS)
        lent = role.model.hidden if self.config.reshard.share_reference else 0
        return BYTES[role.model.precision] * role.rows / role.layout.tp * (words + lent)

    def _generating(self, seat: Seat, kept: float) -> dict[str, float]:
        """The caches of a replica's rows, and what one group of them needs while it reads its prompts or draws.

        With `sampling.batch=0` there are as many rows as generate/room.py finds room for.
        """
        role, stage = self.roles["generate"], seat.stages["generate"]
        if stage < 0:
            return {}
        config, layout = self.config, role.layout
        prompt, sampling = config.data.max_prompt_tokens, config.sampling
        cache = cache_bytes(role, prompt + sampling.max_tokens)
        groups = sampling.groups or layout.pp
        rows = sampling.batch
        if not rows:
            free = capacity(config) - kept
            rows = max(groups, int(_SHARE * free / (cache + step_bytes(role, prompt) / groups)))
        rows = min(rows, -(-config.ppo.episodes // layout.dp))
        together = -(-rows // min(groups, rows))
        read = activations.reading(role.model, layout, stage, Pass(1, together, prompt), kernels=self.kernels).total
        copied = cache // (2 * (role.model.layers // layout.pp))
        drawn = together * (role.model.vocabulary / layout.tp * _DRAW + copied)
        return {"keys and values": rows * cache, "activations": max(read, drawn)}

    def _proof(self, seat: Seat) -> float:
        if self.config.reshard.proof != "always":
            return 0
        stage = seat.stages["policy"]
        return 8 * min(_PROOF, self.roles["policy"].stages[stage].largest) if stage >= 0 else 0


def cache_bytes(role: Role, tokens: int) -> int:
    """A rank's bytes of keys and values of one sequence, as generate/room.py counts them."""
    model, layout = role.model, role.layout
    width = model.groups // layout.tp * activations.head_width(model)
    return 2 * (model.layers // layout.pp) * tokens * width * BYTES[model.precision]


def step_bytes(role: Role, prompt: int) -> int:
    """A rank's bytes beside the cache of one sequence in a step, as generate/room.py counts them."""
    model, layout = role.model, role.layout
    gates = 3 if activations.gated(model) else 2
    token = (_STREAMS * model.hidden + gates * model.ffn_width // layout.tp) * BYTES[model.precision]
    packed = cache_bytes(role, prompt) // (model.layers // layout.pp)
    return max(prompt * token, model.vocabulary // layout.tp * _DRAW) + packed
