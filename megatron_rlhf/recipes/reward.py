"""The reward model: equation (1) on rankings, each response forwarded once, then a bias that makes demonstrations
score 0 (InstructGPT section 3.5, appendix C.2)."""

from __future__ import annotations

import torch

from megatron_rlhf.algorithms import ranking_loss
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.schema import Config
from megatron_rlhf.data.rankings import RankingStream
from megatron_rlhf.models import roles
from megatron_rlhf.recipes import losses, session
from megatron_rlhf.recipes.loop import Lesson, learn
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.recipes.sft import demonstrations_of
from megatron_rlhf.train.engine import Engine

START = "sft"
HEAD = ("head.weight", "head.bias")
CALIBRATED_ON = 512


def run(config: Config) -> None:
    """Train on `rankings.train` and write `<out>/reward/weights`. Collective: world."""
    started = session.start(config)
    if not started.done("reward"):
        train(started)


def train(run: Session) -> dict[str, float]:
    """Held-out loss and accuracy, and the mean demonstration score before and after the bias. Collective: world."""
    config = run.config
    stream = _rankings(run, "train")
    network = run.network(config.reward_model, config.layout.reward, scalar=True, dropout=config.reward.dropout)
    run.fill(network, run.weights(START), fresh=HEAD)
    engine = Engine(
        network,
        roles.scores(),
        config.compute,
        adam=config.adam,
        learning=config.reward.learning,
        seed=config.seed,
    )
    steps = max(1, config.reward.epochs * len(stream) // config.reward.batch)
    loss = losses.ranking(config.reward.denominator)
    lesson = Lesson(
        "reward",
        engine,
        config.reward.learning,
        steps,
        lambda: stream.take(config.reward.batch),
        loss,
        {"rankings": stream},
    )
    learn(run, lesson)
    found = held_out(run, engine)
    found["demonstration_score_before"] = calibrate(run, engine)
    found["demonstration_score"] = demonstration_score(run, engine)
    run.log.row("reward", steps, {f"valid.{name}": value for name, value in found.items()})
    weights.save(engine.network, run.weights("reward"), found)
    return found


def held_out(run: Session, engine: Engine) -> dict[str, float]:
    """Loss and pairwise accuracy on the held-out rankings. Collective: world."""
    rankings = _rankings(run, "valid").all()
    scores_PK = engine.forward(rankings)
    _, stats = ranking_loss.pairwise(
        scores_PK,
        rankings.ranks_PK,
        num_prompts=ranking_loss.num_ranked(rankings.ranks_PK),
        denominator=run.config.reward.denominator,
    )
    return {"loss": stats["loss.reward"], "accuracy": stats["accuracy"]}


def calibrate(run: Session, engine: Engine) -> float:
    """Shift the head's bias so that demonstrations score 0 on average; their mean before. Collective: world."""
    mean = demonstration_score(run, engine)
    bias = engine.network.parameters.get("head.bias")
    if bias is not None:
        with torch.no_grad():
            bias.sub_(mean)
    if engine.optimizer is not None:
        engine.optimizer.reload()
    return mean


def demonstration_score(run: Session, engine: Engine) -> float:
    """The mean score of the first training demonstrations. Collective: world."""
    return float(engine.forward(demonstrations_of(run, "train", CALIBRATED_ON).all_rows()).double().mean())


def _rankings(run: Session, split: str) -> RankingStream:
    return RankingStream.load(
        run.data / f"rankings.{split}.jsonl",
        run.tokenizer(),
        max_tokens=run.config.reward_model.context,
        seed=run.config.seed,
    )
