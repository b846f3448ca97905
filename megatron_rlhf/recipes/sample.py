"""Responses to prompts of one's own, printed for people to read."""

from __future__ import annotations

from megatron_rlhf.batch import Prompts
from megatron_rlhf.config.schema import Config
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.parallel import collectives
from megatron_rlhf.recipes import session
from megatron_rlhf.recipes.generation import answers
from megatron_rlhf.recipes.judge import texts

SHOWN = 10


def run(config: Config) -> None:
    """Print the PPO policy's responses to the first held-out prompts. Collective: world."""
    started = session.start(config, writes=False)
    tokenizer = started.tokenizer()
    stream = PromptStream.load(
        started.data / "prompts.test.jsonl", tokenizer, max_tokens=config.data.max_prompt_tokens, seed=config.seed
    )
    prompts: Prompts = stream.take(min(SHOWN, len(stream)))
    draw_as = Draw(config.evaluate.temperature, config.sampling.top_k, config.sampling.top_p, seed=config.seed)
    rollout = answers(started, started.weights("ppo"), prompts, draw_as)
    for place, response in zip(prompts.ids_B.tolist(), texts(rollout, tokenizer), strict=True):
        started.log.say(f"> {stream.texts[place]}\n{response}\n")
    collectives.wait_for_all()
