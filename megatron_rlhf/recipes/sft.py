"""Supervised fine-tuning: the SFT baseline (InstructGPT appendix C.1) and PPO's initial policy (appendix C.3)."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_rlhf.batch import Rows, joined
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.schema import Config, Sft
from megatron_rlhf.data.demonstrations import DemonstrationStream
from megatron_rlhf.data.pretraining import PretrainingStream
from megatron_rlhf.models import roles
from megatron_rlhf.recipes import losses, session
from megatron_rlhf.recipes.loop import Lesson, Resumable, learn
from megatron_rlhf.recipes.pretrain import VALID_ROWS, held_out_text, language_loss
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.train.engine import Engine


def run(config: Config) -> None:
    """Fine-tune the baseline and the RL start; writes `<out>/sft/weights` and `<out>/rl_start/weights`."""
    started = session.start(config)
    for stage, settings in (("sft", config.sft), ("rl_start", config.rl_start)):
        if not started.done(stage):
            tune(started, stage, settings)


def tune(run: Session, stage: str, settings: Sft) -> dict[str, float]:
    """Both validation losses after fine-tuning the pretrained weights under `settings`. Collective: world."""
    config = run.config
    demonstrations = demonstrations_of(run, "train", settings.examples)
    text = PretrainingStream(run.data / "pretraining.train", config.pretrain.length, config.seed + 1)
    network = run.network(config.model, config.layout.policy, dropout=settings.dropout)
    run.fill(network, run.weights("pretrain"))
    engine = Engine(
        network,
        roles.logprobs(head_rows=config.compute.head_rows),
        config.compute,
        adam=config.adam,
        learning=settings.learning,
        seed=config.seed,
    )
    mixed = round(settings.batch * settings.pretraining_fraction)

    def batch() -> Rows:
        rows = _masked(demonstrations.take(settings.batch - mixed), settings.loss_on)
        return joined(rows, text.take(mixed)) if mixed else rows

    steps = settings.epochs * len(demonstrations) // (settings.batch - mixed)
    streams: dict[str, Resumable] = {"demonstrations": demonstrations, "pretraining": text}
    learn(run, Lesson(stage, engine, settings.learning, steps, batch, losses.language, streams, packable=True))
    valid = demonstrations_of(run, "valid", VALID_ROWS)
    found = {
        "valid.loss.demonstrations": language_loss(engine, valid.all_rows()),
        "valid.loss.pretraining": language_loss(engine, held_out_text(run)),
    }
    run.log.row(stage, steps, found)
    weights.save(engine.network, run.weights(stage), found)
    return found


def demonstrations_of(run: Session, split: str, limit: int) -> DemonstrationStream:
    """The demonstrations of a split, at most `limit` of them (0 for all)."""
    return DemonstrationStream.load(
        run.data / f"demonstrations.{split}.jsonl",
        run.tokenizer(),
        max_prompt=run.config.data.max_prompt_tokens,
        max_response=run.config.data.max_response_tokens,
        limit=limit,
        seed=run.config.seed,
    )


def _masked(rows: Rows, loss_on: str) -> Rows:
    """The rows with the loss on the response, or on every token but the first."""
    if loss_on == "sequence":
        return replace(rows, prompt_lengths_B=torch.ones_like(rows.prompt_lengths_B))
    return rows
