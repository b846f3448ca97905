"""The fastest layouts that fit a number of GPUs: of the policy, of generation and of both critics. Pure, no torch.

Seconds of policy, critics and generation add up, so each is listed by its own; for every way to train, the fastest of
the others that fits beside it is taken. What cannot be faster than the best found, or cannot fit, is told by bounds.
Critics are listed with the micro-batch of the settings; the plans of what was found, which are ranked, with their own.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config, Layouts, Model
from megatron_rlhf.plan import flops, memory, pipeline, residents, times
from megatron_rlhf.plan.activations import GPU
from megatron_rlhf.plan.phase import Bytes
from megatron_rlhf.plan.plan import Plan
from megatron_rlhf.plan.residents import Seat
from megatron_rlhf.plan.roofline import Seconds
from megatron_rlhf.plan.stage import BYTES

MARGIN = 0.1
"""Share of what fits that a search leaves free: the bytes of a plan are within 10 % of those measured."""
_MICRO_BATCHES = (1, 2, 4, 8)
_RECOMPUTE = ("none", "selective", "full")
_VIRTUAL = (1, 2, 3, 4)
# First words of the causes that are there whatever generates and judges beside the policy.
_ALONE = ("policy", "reference", "activations", "logits", "adam", "context")


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings of one part, and the seconds of an iteration that they decide."""

    config: Config
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """The plans of the fastest layouts that fit, and what keeps the leanest from it where Adam must be on the host."""

    gpus: int
    plans: tuple[Plan, ...]
    on_host: bool
    """Whether they need the optimizer in host memory (`adam.host`), which was not asked for."""
    obstacle: str
    """Why the leanest layout does not fit without it; empty where one does."""
    tried: int

    def as_text(self) -> str:
        """The layouts as a table, the fastest first, and the words that choose the first one."""
        if not self.plans:
            return f"Nothing fits on {self.gpus} GPUs, not with the optimizer in host memory either. {self.obstacle}\n"
        lines = [f"{self.gpus} GPUs: the fastest that fit of {self.tried} combinations, {100 * MARGIN:.0f} % left free"]
        if self.on_host:
            told = f"Only with the optimizer in host memory (adam.host=true). {self.obstacle}"
            lines += textwrap.wrap(told, 118, break_on_hyphens=False)
        lines += ["", f"  {'s/iteration':>11} {'MFU':>6} {'GB':>5}  policy | generate | value and reward"]
        for plan in self.plans:
            config, total = plan.config, max(phase.total for phase in plan.memory)
            layout, compute = config.layout, config.compute
            lines += [
                f"  {plan.bill.seconds:>11.1f} {plan.bill.mfu:>6.1%} {total / 1e9:>5.1f}  {layout.policy}, "
                f"{compute.micro_batch} rows, {compute.recompute} | {layout.generate}, {config.sampling.batch} rows | "
                f"{layout.value}"
            ]
        first = "  " + " \\\n    ".join(words(self.plans[0].config))
        return "\n".join([*lines, "", "The first as settings:", first]) + "\n"

    def as_json(self) -> str:
        """The same under names."""
        rows = [
            {"settings": words(plan.config), "bill": asdict(plan.bill), "bytes": max(p.total for p in plan.memory)}
            for plan in self.plans
        ]
        found = {"gpus": self.gpus, "on_host": self.on_host, "obstacle": self.obstacle, "tried": self.tried}
        return json.dumps({**found, "layouts": rows}, indent=2) + "\n"


def words(config: Config) -> list[str]:
    """The settings that a search decides, as words of the command line."""
    layouts = [f"'layout.{name}={value}'" for name, value in asdict(config.layout).items()]
    compute, host = config.compute, ["adam.host=true"] if config.adam.host else []
    return [
        *layouts,
        f"compute.micro_batch={compute.micro_batch} compute.recompute={compute.recompute}",
        f"sampling.batch={config.sampling.batch} sampling.groups=0",
        *host,
    ]


def search(config: Config, gpus: int, most: int = 5) -> Found:
    """The `most` fastest iterations on `gpus` GPUs, each with another layout of the policy, by predicted seconds.

    What `config` says besides layouts, micro-batch, recomputation and rows that generate together stays. Where nothing
    fits, the optimizer goes to host memory, and `obstacle` says what was in the way. Raises BadInput for gpus below 1.
    """
    if gpus < 1:
        raise BadInput(f"gpus={gpus}; a search needs at least one, write for example gpus=1024")
    found = _Search(config, gpus)
    plans = found.best(most)
    if plans or config.adam.host:
        return Found(gpus, plans, False, "" if plans else found.obstacle(), found.tried)
    hosted = _Search(replace(config, adam=replace(config.adam, host=True)), gpus)
    plans = hosted.best(most)
    return Found(gpus, plans, bool(plans), found.obstacle(), found.tried + hosted.tried)


class _Search:
    """One search: the choices of each part by their seconds, and how many combinations were looked at."""

    def __init__(self, config: Config, gpus: int) -> None:
        self.config, self.gpus = config, gpus
        self.limit = (1 - MARGIN) * memory.capacity(config)
        self.training = sorted(self._training(), key=lambda choice: choice.seconds)
        self.generating = sorted(self._generating(), key=lambda choice: choice.seconds)
        self.critics = _front(list(self._critics()), gpus)
        self.tried = len(self.training) * len(self.generating) * len(self.critics)
        self.pairs: dict[str, list[tuple[float, Choice, Choice]]] = {}
        self.known: dict[tuple[object, ...], float] = {}
        self.seats: dict[Layouts, list[Seat]] = {}

    def best(self, most: int) -> tuple[Plan, ...]:
        """The plans of the fastest combinations that fit, one a layout of the policy."""
        found: dict[str, tuple[float, Config]] = {}
        for train in self.training if self.critics else ():
            at = train.config.layout.policy
            known = sorted(seconds for seconds, _ in found.values())
            bound = min(found[at][0] if at in found else math.inf, known[most - 1] if len(known) >= most else math.inf)
            if together := self._beside(train, bound):
                found[at] = together
        fastest = sorted(found.values(), key=lambda item: item[0])[:most]
        plans = [Plan.of(config, self.gpus) for _, config in fastest]
        return tuple(sorted(plans, key=lambda plan: plan.bill.seconds))

    def obstacle(self) -> str:
        """Which layout takes least, and what it takes."""
        if not (self.training and self.generating and self.critics):
            return "No layout divides the models over these GPUs."
        slow = (train.config for train in self.training if _is_slow(train.config))
        config = min(map(self._leanest, slow), key=self._total)
        phase, shared = memory.fullest(config, self.gpus), ""
        if not config.reshard.share_reference:
            lodged = replace(config, reshard=replace(config.reshard, share_reference=True))
            shared = f" With reshard.share_reference=true it is {self._total(lodged) / 1e9:.1f} GB."
        causes = sorted(phase.causes.items(), key=lambda cause: -cause[1])[:6]
        told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in causes)
        return (
            f"Without it the leanest is '{config.layout.policy}' with {config.compute.recompute} recomputation, whose "
            f"phase '{phase.name}' takes {phase.total / 1e9:.1f} GB where {self.limit / 1e9:.1f} are there, "
            f"{MARGIN:.0%} left free: {told}.{shared}"
        )

    def _leanest(self, train: Config) -> Config:
        """`train` beside the leanest critics, generating one row a stage in its own layout."""
        policy = Layout.parse(train.layout.policy, self.gpus)
        layout = replace(train.layout, generate=f"tp{policy.tp} pp{policy.pp}")
        own = replace(train, layout=layout, sampling=replace(train.sampling, batch=policy.pp))
        return _joined(own, own, self.critics[-1].config)

    def _total(self, config: Config) -> float:
        return memory.fullest(config, self.gpus).total

    def _beside(self, train: Choice, bound: float) -> tuple[float, Config] | None:
        """The fastest generate layout and critics that fit beside `train`, None unless all take less than `bound`."""
        pairs = self._pairs(train.config)
        if not pairs or train.seconds + pairs[0][0] >= bound or self._floor(train.config) > self.limit:
            return None
        for seconds, generate, critic in pairs:
            if train.seconds + seconds >= bound:
                return None
            config = _joined(train.config, generate.config, critic.config)
            if self._bytes(config) <= self.limit and memory.fullest(config, self.gpus).total <= self.limit:
                return train.seconds + seconds, config
        return None

    def _pairs(self, train: Config) -> list[tuple[float, Choice, Choice]]:
        """Generate layouts and critics that have room beside a layout of the policy, by their seconds.

        What does not fit beside one row at a time and full recomputation fits beside nothing. Of generate weights at
        least the layers are everywhere, less what lies in place of the policy's own.
        """
        at = train.layout.policy
        if at not in self.pairs:
            slow = replace(train, compute=replace(train.compute, micro_batch=1, recompute="full"))
            model, size, floor = self.config.model, BYTES[self.config.model.precision], self._floor(slow)
            room = self.limit - floor + size * pipeline.heaviest(model, Layout.parse(at, self.gpus))
            layers = size * model.layers * flops.layer_weights(model)
            found = [
                (generate.seconds + critic.seconds, generate, critic)
                for generate in self.generating
                if floor <= self.limit and layers / _shards(generate.config.layout.generate) <= room
                for critic in self.critics
            ]
            self.pairs[at] = sorted(found, key=lambda pair: pair[0])
        return self.pairs[at]

    def _floor(self, train: Config) -> float:
        """Bytes that the policy takes while it trains whatever generates and judges beside it."""
        key = (train.layout.policy, train.compute.micro_batch, train.compute.recompute)
        if key not in self.known:
            policy = Layout.parse(train.layout.policy, self.gpus)
            alone = replace(train, layout=replace(train.layout, generate=f"tp{policy.tp} pp{policy.pp}"))
            run = self._run(_joined(alone, alone, self.critics[-1].config))
            self.known[key] = max(
                sum(size for cause, size in run.causes("train policy", seat).items() if cause.split()[0] in _ALONE)
                for seat in run.seats
            )
        return self.known[key]

    def _bytes(self, config: Config) -> float:
        """Bytes of the busiest GPU in the two phases that take most, or in the first that takes too much."""
        layout, compute = config.layout, config.compute
        most = 0.0
        for phase, decides in (
            ("train policy", (compute.micro_batch, compute.recompute)),
            ("generate", (compute.micro_batch, config.sampling.batch)),  # a buffer of training stays
        ):
            key = (phase, layout.policy, layout.generate, layout.value, *decides)
            if key not in self.known:
                run = self._run(config)
                self.known[key] = max(sum(run.causes(phase, seat).values()) for seat in run.seats)
            most = max(most, self.known[key])
            if most > self.limit:
                break
        return most

    def _run(self, config: Config) -> Bytes:
        """The roles of `config` on their ranks; which roles share a rank follows from the layouts alone."""
        roles = residents.ppo(config, self.gpus)
        if config.layout not in self.seats:
            self.seats[config.layout] = residents.seats(roles, self.gpus)
        return Bytes(config, self.gpus, "ppo", GPU, roles, self.seats[config.layout])

    def _training(self) -> Iterator[Choice]:
        config = self.config
        rows = config.ppo.episodes // config.ppo.minibatches
        for layout in _layouts(config.model, self.gpus, config.cluster.node, virtual=_VIRTUAL):
            sp = config.model.context % layout.tp == 0
            for micro in _MICRO_BATCHES:
                if micro > max(1, rows // layout.dp):
                    break
                for recompute in _RECOMPUTE:
                    text = _words(layout, sp=sp)
                    compute = replace(config.compute, micro_batch=micro, recompute=recompute)
                    layouts = replace(config.layout, policy=text, reference=text, pretrain=text)
                    yield self._chosen(replace(config, compute=compute, layout=layouts), times.POLICY)

    def _generating(self) -> Iterator[Choice]:
        config = self.config
        for layout in _layouts(config.model, self.gpus, 2 * config.cluster.node):
            local = math.ceil(config.ppo.episodes / layout.dp)
            for batch in sorted({min(local, layout.pp * 2**power) for power in range(10)}):
                layouts = replace(config.layout, generate=_words(layout))
                sampling = replace(config.sampling, batch=batch, groups=0)
                yield self._chosen(replace(config, layout=layouts, sampling=sampling), times.GENERATE)

    def _critics(self) -> Iterator[Choice]:
        config = self.config
        for layout in _layouts(config.reward_model, self.gpus, config.cluster.node):
            text = _words(layout, sp=config.reward_model.context % layout.tp == 0)
            layouts = replace(config.layout, value=text, reward=text)
            yield self._chosen(replace(config, layout=layouts), times.CRITICS)

    def _chosen(self, config: Config, roles: tuple[str, ...]) -> Choice:
        phases = times.iteration(config, self.gpus, Seconds(), roles=roles)
        return Choice(config, math.fsum(phase.seconds.total for phase in phases))


def _joined(train: Config, generate: Config, critic: Config) -> Config:
    layout = replace(
        train.layout,
        generate=generate.layout.generate,
        value=critic.layout.value,
        reward=critic.layout.reward,
    )
    return replace(train, layout=layout, sampling=generate.sampling)


def _is_slow(config: Config) -> bool:
    """Whether it is the way to train in its layout that takes least memory."""
    return config.compute.micro_batch == 1 and config.compute.recompute == "full"


def _front(choices: list[Choice], gpus: int) -> list[Choice]:
    """The choices that no other beats in both seconds and bytes, the fastest first."""
    kept: list[Choice] = []
    least = math.inf
    for choice in sorted(choices, key=lambda choice: choice.seconds):
        if (size := _critic_bytes(choice.config, gpus)) < least:
            kept.append(choice)
            least = size
    return kept


def _critic_bytes(config: Config, gpus: int) -> float:
    """Bytes of both critics on a GPU: 16-bit weights twice, fp32 gradients, the optimizer over the replicas."""
    layout = Layout.parse(config.layout.value, gpus)
    held = pipeline.heaviest(config.reward_model, layout, scalar=True)
    return held * (2 * BYTES[config.reward_model.precision] + 4 + (0 if config.adam.host else 12 / layout.dp))


def _shards(text: str) -> int:
    return math.prod(int(word[2:]) for word in text.split() if word[:2] in ("tp", "pp"))


def _layouts(model: Model, gpus: int, widest: int, virtual: tuple[int, ...] = (1,)) -> Iterator[Layout]:
    """Layouts on all GPUs that divide the model, tp a power of two up to `widest`, as config/rules.py has them."""
    tp = 1
    while tp <= min(widest, gpus):
        splits = not (model.groups % tp or model.heads % tp or model.hidden % tp or model.ffn_width % tp or gpus % tp)
        for pp in range(1, gpus // tp + 1 if splits else 1):
            for vp in virtual:
                if gpus % (tp * pp) == 0 and model.layers % (pp * vp) == 0 and (vp == 1 or pp > 1):
                    yield Layout(tp, pp, gpus // (tp * pp), vp)
        tp *= 2


def _words(layout: Layout, *, sp: bool = False) -> str:
    return str(replace(layout, sp=sp and layout.tp > 1))
