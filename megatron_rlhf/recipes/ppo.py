"""PPO and PPO-ptx, InstructGPT equation (2) and appendix C.4; `step` is the page to read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from megatron_rlhf.algorithms import average, kl
from megatron_rlhf.batch import Rollout, Rows
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Config, Ppo
from megatron_rlhf.data.pretraining import PretrainingStream
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models import roles
from megatron_rlhf.models.exact_kl import ExactKl
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe import pulse
from megatron_rlhf.observe.memory import peak_bytes
from megatron_rlhf.observe.progress import Progress
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.recipes import losses, measures, session
from megatron_rlhf.recipes.flight import Flight
from megatron_rlhf.recipes.loop import rate
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.reshard import grouping, switch
from megatron_rlhf.reshard.layout import specs
from megatron_rlhf.reshard.switch import Bridge, Cost, generating
from megatron_rlhf.rollout.annotate import annotate
from megatron_rlhf.rollout.credit import credit
from megatron_rlhf.rollout.sample import sample
from megatron_rlhf.rollout.score import score
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.offload import Lodger

STAGE = "ppo"
START = "rl_start"


@dataclass(slots=True)
class Run:
    """The four roles, the bridge to the generate copy, the streams and the KL coefficient of one PPO run; the iteration
    in flight, the row of the last one and the seconds by phase of all."""

    session: Session
    policy: Engine
    reference: Engine
    value: Engine
    reward: Engine
    bridge: Bridge
    prompts: PromptStream
    text: PretrainingStream
    tokenizer: Tokenizer
    kl: kl.Coefficient
    judge: Callable[[Rollout], Stats]
    iteration: int = 0
    checks: dict[str, float] = field(default_factory=dict)
    drifted: bool = False
    flight: Flight = field(default_factory=Flight)
    began: float = field(default_factory=time.monotonic)
    last: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def ppo(self) -> Ppo:
        """PPO's settings."""
        return self.session.config.ppo

    @property
    def learners(self) -> dict[str, Engine]:
        """The roles whose optimizers are saved."""
        return {"policy": self.policy, "value": self.value}

    @property
    def same_layout(self) -> bool:
        """Whether reference and policy compute alike, so that the first KL is exactly 0."""
        return self.policy.network.grid.layout == self.reference.network.grid.layout

    def exact_kl(self) -> ExactKl | None:
        """What carries one iteration's reference to the policy's pass; None where the penalty is an estimate."""
        if self.ppo.kl.estimator != "exact":
            return None
        config = self.session.config
        return ExactKl(config.sampling.temperature, head_rows=config.compute.head_rows)

    def rates(self) -> tuple[float, float]:
        """The schedules' shares of the policy's and the value model's peak rate in this iteration.

        Iterations are counted in whole ones' worth of updates: what fp16 skips advances no schedule.
        """
        each = self.ppo.minibatches * self.ppo.epochs
        policy, value = self.policy.updates // each, self.value.updates // each
        return rate(self.ppo.policy, policy, self.ppo.iterations), rate(self.ppo.value, value, self.ppo.iterations)

    def pretraining(self, episodes: int) -> Rows:
        """The pretraining rows of a minibatch; none, and so no forward, where the coefficient is 0."""
        if self.ppo.pretraining_coef == 0:
            return Rows(torch.zeros(0, 1, dtype=torch.int64), *(torch.zeros(0, dtype=torch.int64) for _ in range(2)))
        return self.text.take(episodes * self.ppo.pretraining_ratio)


def step(run: Run) -> Stats:
    """One iteration: episodes drawn, scored and annotated, then one update a minibatch.

    What an iteration that was stopped had made (`run.flight`) is not made again. Collective: world.
    """
    ppo, seed, clock, flight = run.ppo, run.session.config.seed, run.session.timer, run.flight
    sampling, end = run.session.config.sampling, run.tokenizer.end
    if (rollout := flight.rollout) is None:
        prompts = run.prompts.take(ppo.episodes)
        with (
            clock("generate"),
            generating(run.bridge, end=end, rows=sampling.batch, groups=sampling.groups) as generator,
        ):
            rollout = sample(generator, prompts, sampling, seed=seed, iteration=run.iteration)
        reached(run, "generate", rollout=rollout)
    if (scored := flight.scored) is None:
        with clock("score"):
            scored = score(rollout, run.reward, ppo)
        reached(run, "score", scored=scored)
    if (annotated := flight.annotated) is None:
        with clock("annotate"):
            annotated = annotate(scored, run.policy, run.reference, run.value, run.exact_kl())
        reached(run, "annotate", annotated=annotated)
    if (experience := flight.experience) is None:
        measures.first_kl(run.checks, annotated, same=run.same_layout)
        if not run.drifted and (found := measures.drifted(annotated, run.policy, run.bridge.network)):
            run.drifted = True
            run.session.log.say(f"{STAGE}: iteration {run.iteration}: {found}")
        experience = credit(annotated, ppo, kl_coef=run.kl.coef)
        reached(run, "credit", experience=experience, stats=measures.episodes(experience) + run.judge(scored))

    policy_rate, value_rate = run.rates()
    size, done, stats = ppo.episodes // ppo.minibatches, run.flight.minibatches, run.flight.stats
    minibatches = experience.minibatches(size, ppo.epochs, seed * 1_000_003 + run.iteration)
    for number, minibatch in islice(enumerate(minibatches, 1), done, None):
        with clock("value"):
            stats += run.value.accumulate(minibatch, losses.value(ppo.value_clip, ppo.normalisation))
            stats += measures.named(run.value.update(value_rate), "value")
        with clock("policy"):
            stats += run.policy.accumulate(minibatch, losses.policy(ppo.clip, ppo.normalisation))
        with clock("pretraining"):
            text, mixed = run.pretraining(len(minibatch)), losses.language_per(ppo.normalisation)
            stats += run.policy.accumulate(text, mixed, ppo.pretraining_coef, packable=True)
        with clock("policy"):
            stats += measures.named(run.policy.update(policy_rate), "policy")
            run.policy.follow(partial(average.follow, decay=ppo.average_decay), when=ppo.average_unit == "update")
        measures.first_ratio(run.checks, stats, run.session.config.model.precision)
        reached(run, f"update{number}", minibatches=number, stats=stats)
    run.policy.follow(partial(average.follow, decay=ppo.average_decay), when=ppo.average_unit == "iteration")
    run.kl = run.kl.adapted(stats["kl"], ppo.episodes)
    run.flight = Flight()
    return stats


def reached(run: Run, phase: str = "", *, due: bool = False, **made: Any) -> None:
    """A boundary behind a phase of an iteration, or behind the iteration: what was `made` joins what is in flight.

    Saves where that is `due` or checkpoint.phases asks for it; exits with 75 after saving when a signal asked for it.
    Collective: world.
    """
    run.flight = replace(run.flight, phase=phase, **made)
    settings = run.session.config.checkpoint
    if run.session.stopping():
        run.session.leave(STAGE, run.iteration, _put_down(run), run.learners, phase)
    if due or settings.phases:
        metrics = None if phase else run.last
        run.session.save(STAGE, run.iteration, _put_down(run), run.learners, phase, metrics)


def run(config: Config) -> None:
    """Train the policy of `<out>/rl_start/weights` and write `<out>/ppo/weights`. Collective: world."""
    started = session.start(config)
    if not started.done(STAGE):
        train(started)


def train(run: Session) -> dict[str, float]:
    """The checks of the first iteration and the statistics of the last. Collective: world.

    Exits with 75 after saving when a signal asked for it.
    """
    ppo, every = prepared(run), run.config.checkpoint.every
    _take_up(ppo)
    run.now.stage(STAGE, ppo.ppo.iterations, ppo.iteration)
    with Progress(run.first, ppo.ppo.iterations, STAGE, done=ppo.iteration) as progress:
        while ppo.iteration < ppo.ppo.iterations:
            pulse.at(STAGE, ppo.iteration)
            ppo.began = time.monotonic() - ppo.flight.elapsed
            stats = step(ppo)
            ppo.iteration += 1
            ppo.last = {**stats.means(), "kl_coef": ppo.kl.coef}
            seconds = {name: round(value, 3) for name, value in run.timer.take().items()}
            ppo.measured = {name: ppo.measured.get(name, 0.0) + value for name, value in seconds.items()}
            tokens_per_second = stats["tokens"] / (time.monotonic() - ppo.began)
            row = {**ppo.last, **switched(ppo), "tokens_per_second": tokens_per_second, "memory_bytes": peak_bytes()}
            run.log.row(STAGE, ppo.iteration - 1, {**row, **run.slowest(), "seconds_by_phase": seconds})
            run.now.step(ppo.iteration)
            progress.advance("score {score:.3f}, KL {kl:.3f}, drift {drift:.6f}".format(**ppo.last))
            reached(ppo, due=bool(every) and ppo.iteration % every == 0)
    run.settle()
    _publish(ppo)
    run.now.end()
    return {**ppo.last, **ppo.checks}


def prepared(run: Session) -> Run:
    """The roles with their starting weights: the value model is the reward model, head and all. Collective: world."""
    config, layout = run.config, run.config.layout
    seed = config.seed
    read = roles.logprobs(config.sampling.temperature, head_rows=config.compute.head_rows)
    tokenizer = run.tokenizer()

    dropout = config.ppo.dropout
    policy = _loaded(run, run.network(config.model, layout.policy, dropout=dropout), START)
    value = _loaded(run, run.network(config.reward_model, layout.value, scalar=True, dropout=dropout), "reward")
    reward = _loaded(run, run.network(config.reward_model, layout.reward, scalar=True), "reward")
    adam, compute = config.adam, config.compute
    learner = Engine(policy, read, compute, adam=adam, learning=config.ppo.policy, averaged=True, seed=seed)
    if config.reshard.share_reference:
        reference: Engine = Lodger(learner, read, compute)
    else:
        reference = Engine(_loaded(run, run.network(config.model, layout.reference), START), read, compute)
    bridge = switch.build(learner, run.network(config.model, _generate(run)), config.reshard)
    run.pinned["plan"] = bridge.plan
    return Run(
        session=run,
        policy=learner,
        reference=reference,
        value=Engine(value, roles.values(), compute, adam=adam, learning=config.ppo.value, seed=seed),
        reward=Engine(reward, roles.scores(), config.compute),
        bridge=bridge,
        prompts=PromptStream.load(
            run.data / "prompts.train.jsonl", tokenizer, max_tokens=config.data.max_prompt_tokens, seed=seed
        ),
        text=PretrainingStream(run.data / "pretraining.train", config.pretrain.length, seed + 2),
        tokenizer=tokenizer,
        kl=kl.Coefficient(config.ppo.kl.coef, config.ppo.kl.adaptive, config.ppo.kl.target, config.ppo.kl.horizon),
        judge=measures.judge(run, tokenizer),
    )


def switched(run: Run) -> dict[str, float]:
    """What the last phase switch cost, under the names of log.jsonl; nothing before the first."""
    cost = run.bridge.cost
    return {f"reshard.{name}": value for name, value in asdict(cost).items()} if cost else {}


def _generate(run: Session) -> Layout:
    """The generate layout, its slots dealt to the ranks that hold most of them in the policy's layout, unless its
    words choose an order or other ranks."""
    words, model = run.config.layout, run.config.model
    policy, target = run.layout(words.policy), run.layout(words.generate)
    if "order=" in words.generate or (policy.first, policy.size) != (target.first, target.size):
        return target
    tensors = specs(model, run.rows(model))
    return grouping.grouped(policy, target, tensors, tensors)


def _loaded(run: Session, network: Network, stage: str) -> Network:
    """The network with a stage's weights, or its initial ones where nothing is to be learned. Collective: world."""
    if run.config.checkpoint.untrained:
        run.pinned[f"weights.{stage}"] = "untrained"
        return network
    found = run.fill(network, run.weights(stage))
    run.pinned[f"weights.{stage}"] = str(found.get("seal"))[:16]
    return network


def _publish(run: Run) -> None:
    """Write the weights that evaluation reads, the average or the live ones, and say which. Collective: world."""
    folder = run.session.weights(STAGE)
    extra = {"iterations": run.iteration, "checks": run.checks, "last": run.last, "reshard": switched(run)}
    if run.ppo.evaluate_average:
        with run.policy.averaged():
            weights.save(run.policy.network, folder, {"which": "average", **extra})
    else:
        weights.save(run.policy.network, folder, {"which": "live", **extra})


def _put_down(run: Run) -> dict[str, Any]:
    """What is equal on all ranks, but for clocks and the judge's word, which are rank 0's; the rest of the state is in
    `run.learners`."""
    seconds, elapsed = dict(run.session.timer.seconds), time.monotonic() - run.began
    return {
        "prompts": run.prompts.state(),
        "text": run.text.state(),
        "kl_coef": run.kl.coef,
        "checks": dict(run.checks),
        "drifted": run.drifted,
        "last": dict(run.last),
        "measured": dict(run.measured),
        "reshard": asdict(run.bridge.cost) if run.bridge.cost else {},
        "flight": replace(run.flight, seconds=seconds, elapsed=elapsed if run.flight.phase else 0.0).state(),
    }


def _take_up(run: Run) -> None:
    """Go on from the newest saved boundary, of an iteration or inside one. Collective: world."""
    saved = run.session.saved(STAGE)
    if saved is None:
        return
    saved.fill(run.learners)
    run.iteration, common = saved.step, saved.common
    run.prompts.restore(common["prompts"])
    run.text.restore(common["text"])
    run.kl = replace(run.kl, coef=common["kl_coef"])
    run.checks, run.drifted = dict(common["checks"]), common["drifted"]
    run.last, run.measured = dict(common["last"]), dict(common["measured"])
    run.flight = Flight.of(common["flight"])
    run.session.timer.seconds = dict(run.flight.seconds)
    if run.flight.drawn:
        # What drew the episodes in flight is looked at where they drift.
        run.bridge.load()
        run.bridge.unload()
    run.bridge.cost = Cost(**common["reshard"]) if common["reshard"] else None
    run.session.log.truncate_after(STAGE, run.iteration - 1)
    inside = f", in the next one after {run.flight.phase}" if run.flight.phase else ""
    run.session.log.say(f"{STAGE}: going on after iteration {run.iteration}{inside}")
