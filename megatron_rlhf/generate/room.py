"""How many sequences fit in the memory that is free: the size of their caches, and of what a step needs beside them."""

from __future__ import annotations

import psutil
import torch

from megatron_rlhf.config import env
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.models.stage import PRECISIONS
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives

SHARE = 0.8
"""Of the free memory; the rest is for what the allocator cannot use."""
_STREAMS = 8
"""Hidden states of a prompt that a layer holds at the same time, its feed-forward block apart."""
_DRAW = 40
"""Bytes a column of the vocabulary while a token is drawn: logits, scaled and perturbed, noise and its integers."""


def cache_bytes(model: Model, layout: Layout, tokens: int) -> int:
    """A rank's bytes of keys and values of one sequence of `tokens` tokens."""
    width = model.groups // layout.tp * model.head_width
    return 2 * (model.layers // layout.pp) * tokens * width * PRECISIONS[model.precision].itemsize


def step_bytes(model: Model, layout: Layout, prompt: int) -> int:
    """A rank's bytes beside the cache, at most and about, while a sequence's prompt is read or a token is drawn."""
    gates = 3 if model.gated else 2
    token = (_STREAMS * model.hidden + gates * model.ffn_width // layout.tp) * PRECISIONS[model.precision].itemsize
    packed = cache_bytes(model, layout, prompt) // (model.layers // layout.pp)
    return max(prompt * token, model.vocabulary // layout.tp * _DRAW) + packed


def fitting(free: int, *, cache: int, step: int, groups: int = 1) -> int:
    """Sequences whose caches fit in SHARE of `free` bytes, one of `groups` of them at a time in a step.

    Raises BadInput where not one of each group does.
    """
    rows = int(SHARE * free / (cache + step / groups))
    if rows < groups:
        raise BadInput(
            f"{free} bytes are free and a sequence takes {cache + step}, so {groups} do not fit; write a smaller "
            "sampling.max_tokens, more tp or pp in layout.generate, or reshard.park_optimizer=true"
        )
    return rows


def free_bytes() -> int:
    """Bytes this process may still allocate: of its GPU, or its share of this machine's memory where there is none."""
    if torch.cuda.is_available():
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    return psutil.virtual_memory().available // max(1, env.local_world_size())


def rows(network: Network, prompt: int, max_tokens: int, groups: int) -> int:
    """Sequences a replica can decode together, the same number on all ranks. Collective: world."""
    model, layout = network.model, network.grid.layout
    free = collectives.least(free_bytes())
    step = step_bytes(model, layout, prompt)
    return fitting(free, cache=cache_bytes(model, layout, prompt + max_tokens), step=step, groups=groups)
