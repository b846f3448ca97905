"""Responses of saved weights in the generate layout, outside of training."""

from __future__ import annotations

from pathlib import Path

from megatron_rlhf.batch import Prompts, Rollout
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.recipes.session import Session


def answers(run: Session, folder: Path, prompts: Prompts, draw_as: Draw, max_tokens: int = 0) -> Rollout:
    """A response to every prompt by the weights in `folder`, of at most `max_tokens` (0: sampling.max_tokens).

    Collective: world.
    """
    network = run.network(run.config.model, run.config.layout.generate)
    run.fill(network, folder)
    tokenizer, sampling = run.tokenizer(), run.config.sampling
    generator = Generator(network, end=tokenizer.end, rows=sampling.batch, groups=sampling.groups)
    return generator.sample(prompts, draw_as, max_tokens or sampling.max_tokens)
