"""Responses of the present policy to prompts."""

from __future__ import annotations

from megatron_rlhf.batch import Prompts, Rollout
from megatron_rlhf.config.schema import Sampling
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.generate.sampling import Draw


def sample(generator: Generator, prompts: Prompts, sampling: Sampling, *, seed: int, iteration: int) -> Rollout:
    """One response a prompt with the log-prob each token was drawn with, from the full softmax. Collective: world."""
    draw_as = Draw(temperature=sampling.temperature, seed=seed, iteration=iteration)
    return generator.sample(prompts, draw_as, sampling.max_tokens)
