"""The passes that the roles of a run make through their pipelines, in their longest shapes. Pure, no torch.

A plan has no data, so every row is as long as the settings allow: a prompt of `data.max_prompt_tokens` with a response
of `sampling.max_tokens` (demonstrations: `data.max_response_tokens`; rankings: the model's context). Batches are cut
as train/microbatch.py cuts them.
"""

from __future__ import annotations

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Config
from megatron_rlhf.plan.activations import Pass


def cut(
    layout: Layout,
    elements: int,
    micro_batch: int,
    length: int,
    *,
    words: int,
    each: int = 1,
    packed: bool = False,
    dropout: float = 0.0,
) -> Pass:
    """A replica's pass over `elements` elements of `each` lines, `micro_batch` lines at most at a time; `words`
    positions of a line ask the head."""
    step = layout.pp if layout.vp > 1 else 1
    local = max(1, -(-elements // layout.dp))
    count = _up(-(-local // max(1, micro_batch // each)), step)
    lines = -(-local // count) * each
    return Pass(count, lines, _up(length, layout.tp if layout.sp else 1), lines * words, packed, dropout)


def policy(config: Config, layout: Layout) -> list[Pass]:
    """What the policy learns from in PPO: a minibatch of episodes, and pretraining text."""
    ppo, compute = config.ppo, config.compute
    size = ppo.episodes // ppo.minibatches
    found = [episodes(config, layout, size, compute.micro_batch, dropout=ppo.dropout)]
    if ppo.pretraining_coef:
        found.append(text(config, layout, size * ppo.pretraining_ratio, dropout=ppo.dropout))
    return found


def episodes(config: Config, layout: Layout, rows: int, micro_batch: int, *, dropout: float = 0.0) -> Pass:
    """A pass over `rows` prompts with their responses."""
    response = config.sampling.max_tokens
    return cut(layout, rows, micro_batch, config.data.max_prompt_tokens + response, words=response, dropout=dropout)


def text(config: Config, layout: Layout, rows: int, *, dropout: float = 0.0) -> Pass:
    """A pass over `rows` rows of pretraining text that learns."""
    return _language(config, layout, rows, config.pretrain.length, config.pretrain.length - 1, dropout)


def demonstrations(config: Config, layout: Layout) -> list[Pass]:
    """What SFT learns from, of its baseline and of the RL start."""
    found = []
    for sft in (config.sft, config.rl_start):
        response = config.data.max_response_tokens
        length = config.data.max_prompt_tokens + response
        words = length - 1 if sft.loss_on == "sequence" else response
        if round(sft.batch * sft.pretraining_fraction):
            length, words = max(length, config.pretrain.length), max(words, config.pretrain.length - 1)
        found.append(_language(config, layout, sft.batch, length, words, sft.dropout))
    return found


def rankings(config: Config, layout: Layout) -> list[Pass]:
    """What the reward model learns from: all responses to a prompt are in one micro-batch."""
    reward, context = config.reward, config.reward_model.context
    most = config.rank.responses_max
    compute = config.compute
    return [cut(layout, reward.batch, compute.micro_batch, context, words=0, each=most, dropout=reward.dropout)]


def _language(config: Config, layout: Layout, rows: int, length: int, words: int, dropout: float) -> Pass:
    """Rows for a language model, end to end in lines where `compute.packing` says so."""
    compute = config.compute
    together = max(1, compute.pack_tokens // length) if compute.packing else 1
    lines, line = -(-rows // together), max(length, compute.pack_tokens if together > 1 else 0)
    return cut(
        layout,
        lines,
        compute.micro_batch,
        line,
        words=words * together,
        packed=compute.packing,
        dropout=dropout,
    )


def _up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
