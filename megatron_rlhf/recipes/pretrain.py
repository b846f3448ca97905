"""A language model from text, where no pretrained one is at hand."""

from __future__ import annotations

from megatron_rlhf.batch import Rows
from megatron_rlhf.checkpoint import weights
from megatron_rlhf.config.schema import Config
from megatron_rlhf.data.pretraining import PretrainingStream
from megatron_rlhf.models import roles
from megatron_rlhf.recipes import losses, session
from megatron_rlhf.recipes.loop import Lesson, learn
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.train.engine import Engine

VALID_ROWS = 256


def run(config: Config) -> None:
    """Train on `pretraining.train` and write `<out>/pretrain/weights`. Collective: world."""
    started = session.start(config)
    if not started.done("pretrain"):
        pretrain(started)


def pretrain(run: Session) -> dict[str, float]:
    """The validation loss after the last step, in nats a token. Collective: world."""
    settings = run.config.pretrain
    stream = PretrainingStream(run.data / "pretraining.train", settings.length, run.config.seed)
    engine = Engine(
        run.network(run.config.model, run.config.layout.pretrain),
        roles.logprobs(head_rows=run.config.compute.head_rows),
        run.config.compute,
        adam=run.config.adam,
        learning=settings.learning,
        seed=run.config.seed,
    )
    lesson = Lesson(
        "pretrain",
        engine,
        settings.learning,
        settings.steps,
        lambda: stream.take(settings.batch),
        losses.language,
        {"pretraining": stream},
        packable=True,
    )
    learn(run, lesson)
    found = {"valid.loss.pretraining": language_loss(engine, held_out_text(run))}
    run.log.row("pretrain", settings.steps, found)
    weights.save(engine.network, run.weights("pretrain"), found)
    return found


def held_out_text(run: Session) -> Rows:
    """The first rows of the held-out text."""
    stream = PretrainingStream(run.data / "pretraining.valid", run.config.pretrain.length, run.config.seed)
    return stream.first(min(VALID_ROWS, len(stream)))


def language_loss(engine: Engine, rows: Rows) -> float:
    """Mean negative log-prob of the rows' response tokens, in nats. Collective: world."""
    return float(-engine.forward(rows).double().sum() / rows.response_lengths_B.sum())
