"""Proves that bf16 and fp16 roles follow fp32 within the limits stated here, and what fp16's loss scale does: an
overflow on any rank skips the step on all, nothing of the role moves but the scale, and the scale shrinks, recovers and
is resumed.

Not proved here: anything on CUDA; that these limits hold for models larger than 4 layers of width 32; generation in 16
bits beyond its drift.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.algorithms import average
from megatron_rlhf.batch import Rows
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.schema import Adam, Learning, LossScale, Ppo, Reshard
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.models import roles
from megatron_rlhf.observe.now import Now
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.observe.timer import Timer
from megatron_rlhf.recipes import losses, measures, ppo
from megatron_rlhf.recipes.loop import Lesson, learn, rate
from megatron_rlhf.reshard import move, switch
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid

LAYOUTS = ["tp2 pp2", *(pytest.param(words, marks=pytest.mark.slow) for words in ("dp4", "tp2 dp2 sp"))]
CLOSE = {"bf16": {"loss.language": 1e-3, "grad_norm": 1e-2}, "fp16": {"loss.language": 2e-4, "grad_norm": 2e-3}}
"""Relative distance from fp32 over 10 updates; measured at most a third of it."""
STEADY = LossScale(initial=1024.0, growth_interval=1000)
"""A scale that neither overflows nor grows in a test."""


def role(words: str, precision: str, scale: LossScale = STEADY, **settings: Any) -> Engine:
    """A policy in `precision`. Collective: world."""
    model = replace(tiny.MODEL, precision=precision)
    return tiny.engine(words, model=model, adam=Adam(weight_decay=0.1, loss_scale=scale), **settings)


def train(policy: Engine, updates: int) -> list[Stats]:
    """The statistics of every try until the role has made `updates`; a skipped batch comes again. Collective: world."""
    found: list[Stats] = []
    while policy.updates < updates:
        stats = policy.accumulate(tiny.rows(seed=policy.updates), losses.language)
        found.append(stats + policy.update())
        policy.follow(partial(average.follow, decay=0.9))
        assert len(found) < 4 * updates
    return found


def copied(policy: Engine) -> Any:
    """The role's whole state as a file would hold it, and its 16-bit weights."""
    buffer = io.BytesIO()
    parameters = {name: parameter.detach() for name, parameter in policy.network.parameters.items()}
    kept = tiny.Kept(policy)
    state = {str(where): values for where, values in kept.values.items()}
    torch.save([state, kept.counts, kept.scale, parameters], buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def same(left: Any, right: Any) -> bool:
    """Whether two nests of tensors and numbers are bit-equal."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@on_grid(4)
@pytest.mark.parametrize("words", LAYOUTS)
def test_sixteen_bits_follow_fp32(words: str) -> None:
    """Ten updates; fp16 starts at a scale of 2^24, overflows its way down and recovers by growing too often."""
    expected = train(role(words, "fp32"), 10)
    assert not {"overflow", "loss_scale"} & set(expected[0].means())
    scales = {"bf16": STEADY, "fp16": LossScale(initial=2.0**24, growth_interval=4)}
    for precision, scale in scales.items():
        tried = train(role(words, precision, scale), 10)
        taken = [stats for stats in tried if precision == "bf16" or not stats["overflow"]]
        for name, limit in CLOSE[precision].items():
            apart = max(abs(a[name] / b[name] - 1) for a, b in zip(taken, expected, strict=True))
            assert apart < limit, (precision, name, apart)
        if precision == "fp16":
            used = [stats["loss_scale"] for stats in tried]
            assert len(tried) >= 14 and min(used) < used[0]
            assert any(after > before for before, after in zip(used, used[1:], strict=False)), "it grew again"
            assert all(stats["grad_norm"] == 0 for stats in tried if stats["overflow"])


@on_grid(4)
@pytest.mark.parametrize(("words", "rank"), [("tp2 pp2", 1), ("dp4", 2), ("tp2 dp2 sp", 3), ("pp2 @1-2", 2)])
def test_an_overflow_on_one_rank_skips_the_step_on_all(words: str, rank: int) -> None:
    """Weights, mains, moments, average and counts keep every bit; then all goes on as if the step had never been."""
    never, policy = (role(words, "fp16", averaged=True, dropout=0.1) for _ in range(2))
    for one in (never, policy):
        train(one, 2)
    before = copied(policy)
    policy.accumulate(tiny.rows(seed=2), losses.language)
    if dist.get_rank() == rank:
        assert policy.optimizer is not None
        policy.optimizer.stages[0].buffers[0].grad_data[3] = math.inf
    stats = policy.update()
    policy.follow(partial(average.follow, decay=0.9))
    assert (stats["overflow"], stats["loss_scale"], stats["grad_norm"]) == (1, STEADY.initial, 0)
    assert policy.updates == 2
    after = copied(policy)
    if policy.optimizer is not None:
        for state in (before, after):
            scaler = state[2].pop("scale")
            assert float(scaler["scale"]) == STEADY.initial
            assert scaler["hysteresis_tracker"] == (2 if state is before else 1)
    assert same(before, after)
    assert [stats.means() for stats in train(policy, 4)] == [stats.means() for stats in train(never, 4)]
    assert same(copied(policy)[-1], copied(never)[-1])
    assert tiny.copies_agree(policy.network)


@on_grid(4)
def test_the_scale_shrinks_grows_stops_and_is_resumed() -> None:
    """By its own factors, after its own counts; a state put back goes on in the middle of both."""
    scale = LossScale(initial=256.0, growth_interval=3, growth=4.0, backoff=0.5, hysteresis=2, minimum=64.0, patience=3)
    policy = role("tp2 pp2", "fp16", scale)

    def used(bad: list[int]) -> list[float]:
        found = []
        for number in bad:
            policy.accumulate(tiny.rows(4), losses.language, weight=math.inf if number else 1.0)
            stats = policy.update()
            assert stats["overflow"] == number
            found.append(stats["loss_scale"])
        return found

    assert used([0, 0, 1, 1, 0, 0, 0]) == [256, 256, 256, 256, 128, 128, 128]
    assert used([0, 1]) == [512, 512]
    kept = tiny.Kept(policy)
    assert used([1, 1, 1, 1, 0]) == [512, 256, 128, 64, 64]
    policy = role("tp2 pp2", "fp16", scale)
    policy.restore(kept)
    assert policy.updates == 6
    assert used([1, 1, 1, 1, 0, 1, 1]) == [512, 256, 128, 64, 64, 64, 64]
    before = tiny.weights(policy.network)
    with pytest.raises(FloatingPointError, match="overflowed fp16 3 times in a row at the smallest loss scale, 64"):
        used([1])
    assert tiny.equal(tiny.weights(policy.network), before)


@on_grid(4)
def test_bf16_stops_at_a_gradient_that_is_no_number() -> None:
    """No scale hides it: FloatingPointError on every rank before anything has moved."""
    policy = role("tp2 pp2", "bf16")
    train(policy, 1)
    before = copied(policy)
    policy.accumulate(tiny.rows(), losses.language, weight=math.nan)
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        policy.update()
    assert same(copied(policy), before)


@on_grid(4)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("words", ["tp2 pp2", pytest.param("tp2 dp2 sp", marks=pytest.mark.slow)])
def test_resumed_sixteen_bits_are_bit_equal(words: str, precision: str) -> None:
    """Main weights, moments and the average are put back in fp32, which the model's weights are a rounding of."""
    made = {"averaged": True, "dropout": 0.1, "rate": 0.01}
    first, again = (role(words, precision, **made) for _ in range(2))
    train(first, 2)
    state = tiny.Kept(first)
    expected = train(first, 4)
    again.restore(state)
    assert [stats.means() for stats in train(again, 4)] == [stats.means() for stats in expected]
    assert same(copied(again), copied(first))
    assert again.optimizer is not None
    mains = again.optimizer.shards()
    assert {main.dtype for main in mains} == {torch.float32}
    dtype = again.network.config.params_dtype
    assert not all(torch.equal(main, main.to(dtype).float()) for main in mains)
    live = tiny.weights(again.network)
    with again.averaged():
        assert tiny.distance(tiny.weights(again.network), live) > 1e-3
        assert tiny.copies_agree(again.network)
    again.optimizer.publish()
    assert tiny.equal(tiny.weights(again.network), live)
    again.optimizer.reload()
    assert all(torch.equal(main, main.to(dtype).float()) for main in mains), "the model's weights are the mains now"


@on_grid(4)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("words", LAYOUTS)
def test_ppo_starts_at_ratio_one_and_kl_zero(words: str, precision: str) -> None:
    """Within the precision's limit for minibatches cut otherwise, exactly for the reference; dropout breaks the ratio.

    The generate copy in 16 bits, cache and all, drifts by at most 1.02.
    """
    for dropout in (0.0, 0.2):
        policy = role(words, precision, dropout=dropout)
        episodes = tiny.experience(policy.forward)
        for minibatch in episodes.minibatches(5, 1, seed=3):
            error = policy.accumulate(minibatch, losses.policy(0.2))["ratio_error"]
            assert (error <= measures.RATIO_LIMIT[precision]) == (dropout == 0), (dropout, error)
    model = policy.network.model
    reference = tiny.network(words, model, seed=77)
    move.copy(policy.network, reference)
    rows = tiny.rows()
    assert torch.equal(tiny.learner(reference).forward(rows), policy.forward(rows))
    policy.update()
    bridge = switch.build(policy, tiny.network("tp2 dp2", model, seed=78), Reshard())
    with switch.generating(bridge, end=2, rows=8) as generator:
        rollout = generator.sample(tiny.prompts(8), Draw(seed=3), 12)
    mask_BR = rollout.rows.response_mask_BR(rollout.rows.width)
    apart_BR = (policy.forward(rollout.rows) - rollout.drawn_logprobs_BR[:, : rollout.rows.width]).abs().exp()
    assert float((apart_BR * mask_BR).sum() / mask_BR.sum()) <= 1.02


@on_grid(4)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_is_read_is_computed_in_fp32(precision: str) -> None:
    """Log-probs, values and scores leave in fp32, finer than 16 bits can say and near those of an fp32 model."""
    model, rows = replace(tiny.MODEL, precision=precision), tiny.rows()
    for read, scalar in ((roles.logprobs(), False), (roles.values(), True), (roles.scores(), True)):
        built, exact = (tiny.network("tp2 pp2", kind, scalar=scalar) for kind in (model, tiny.MODEL))
        found = tiny.learner(built, read).forward(rows)
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.to(built.config.params_dtype).float())
        expected = tiny.learner(exact, read).forward(rows)
        limit = {"bf16": 3e-2, "fp16": 4e-3}[precision] * (1 if scalar else 0.1)
        assert float((found - expected).norm() / expected.norm()) < limit


@on_grid(4)
def test_a_stages_weights_serve_any_precision(tmp_path: Path) -> None:
    """They are stored as the model holds them: bf16 rounds fp32 weights, and fp32 reads bf16's as they are."""
    exact, model = tiny.network("tp2 pp2"), replace(tiny.MODEL, precision="bf16")
    weights.save(exact, tmp_path / "exact")
    rounded = tiny.network("dp4", model, seed=77)
    weights.load(rounded, tmp_path / "exact")
    expected = {name: tensor.bfloat16() for name, tensor in tiny.weights(exact).items()}
    assert tiny.equal(tiny.weights(rounded), expected)
    weights.save(rounded, tmp_path / "rounded")
    back = tiny.network("tp2 dp2 sp", seed=78)
    weights.load(back, tmp_path / "rounded")
    assert tiny.equal(tiny.weights(back), {name: tensor.float() for name, tensor in expected.items()})


@on_grid(4)
def test_a_skipped_update_does_not_advance_a_supervised_schedule() -> None:
    """The learning rate stands until an update is made, and the batch is gone."""
    scale = LossScale(initial=2.0**40, backoff=2.0**-12, hysteresis=1)
    engine = role("tp2 pp2", "fp16", scale)
    learning = Learning(rate=1e-3, warmup=2)
    engine.learning = learning
    written: list[dict[str, float]] = []
    session = SimpleNamespace(
        saved=lambda _: None,
        first=False,
        stopping=lambda: False,
        settle=lambda: None,
        slowest=dict,
        now=Now(None),
        timer=Timer(),
        config=SimpleNamespace(checkpoint=SimpleNamespace(every=0)),
        log=SimpleNamespace(row=lambda _phase, _step, values: written.append(values)),
    )
    drawn: list[Rows] = []

    def batch() -> Rows:
        drawn.append(tiny.rows(4, seed=len(drawn)))
        return drawn[-1]

    learn(session, Lesson("sft", engine, learning, 6, batch, losses.language, {}))  # type: ignore[arg-type]
    assert [row["overflow"] for row in written] == [1, 1, 0, 0, 0, 0]
    shares = [rate(learning, place, 6) for place in (0, 0, 0, 1, 2, 3)]
    assert [row["lr"] for row in written] == [pytest.approx(1e-3 * share) for share in shares]
    assert len(drawn) == 6 and engine.updates == 4


def test_a_ppo_schedule_counts_whole_iterations_of_updates() -> None:
    """A role whose updates were skipped stays behind, the other does not."""
    learning = Learning(rate=1.0, schedule="constant", warmup=4, warmup_start=0.0)
    settings = Ppo(iterations=8, minibatches=2, epochs=2, policy=learning, value=learning)
    for policy, value, shares in ((0, 0, (0.0, 0.0)), (7, 8, (0.25, 0.5)), (16, 15, (1.0, 0.75))):
        run = SimpleNamespace(
            ppo=settings, policy=SimpleNamespace(updates=policy), value=SimpleNamespace(updates=value)
        )
        assert ppo.Run.rates(run) == shares  # type: ignore[arg-type]
