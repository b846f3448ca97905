"""One generation step of one pipeline stage: prefill a block of prompts, then one token a row through the cache.

b rows, P prompt positions, V vocabulary. Every row keeps its own length; rows are padded on the right.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rlhf.models import vocabulary
from megatron_rlhf.models.attention import CoreAttention, LayerCache
from megatron_rlhf.models.rope import Rotary
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel.collectives import device


class Cache:
    """Keys and values of a stage's layers for b rows of at most `capacity` tokens.

    A stage reads and fills the cache that was activated last; the caches of other rows wait as they are.
    """

    def __init__(self, network: Network, rows: int, capacity: int) -> None:
        """Allocate [b, g, capacity, d] twice a layer and hang them into the stage."""
        config, tp = network.config, network.grid.layout.tp
        heads = network.model.groups // tp
        here = device()
        self.lengths_b = torch.zeros(rows, dtype=torch.int64, device=here)
        self.attentions = [m for chunk in network.chunks for m in chunk.modules() if isinstance(m, CoreAttention)]
        shape = (rows, heads, capacity, config.kv_channels)
        self.layers: list[LayerCache] = []
        for _ in self.attentions:
            keys, values = (torch.zeros(shape, dtype=config.params_dtype, device=here) for _ in range(2))
            self.layers.append(LayerCache(keys, values, self.lengths_b))
        self.activate()

    def activate(self) -> None:
        """Hang these keys and values into the stage in place of any others."""
        for attention, layer in zip(self.attentions, self.layers, strict=True):
            attention.cache = layer

    def filled(self, lengths_b: Tensor, *, decoding: bool) -> None:
        """Tell every layer how many slots of each row are filled, and whether the next forward is one token."""
        self.lengths_b = lengths_b
        for attention in self.attentions:
            assert attention.cache is not None
            attention.cache.lengths_b, attention.cache.decoding = lengths_b, decoding

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows only."""
        for attention in self.attentions:
            cache = attention.cache
            assert cache is not None
            cache.keys, cache.values = cache.keys[rows], cache.values[rows]
        self.filled(self.lengths_b[rows], decoding=True)

    def drop(self) -> None:
        """Free the cache; the stage attends without one until another is activated."""
        self.layers = []
        for attention in self.attentions:
            attention.cache = None


def drop(network: Network) -> None:
    """Free whatever cache hangs in the stages of `network`; they attend without one until another is activated."""
    for chunk in network.chunks:
        for module in chunk.modules():
            if isinstance(module, CoreAttention):
                module.cache = None


def prefill(network: Network, tokens_bP: Tensor, lengths_b: Tensor, hidden: Tensor | None) -> Tensor:
    """The stage's output for whole prompts: hidden [P, b, h], or on the last stage logits [b, 1, V/tp] at each row's
    last prompt token; the full [b, P, V] are never made."""
    stage = network.chunks[0]
    positions = torch.arange(tokens_bP.shape[1], device=tokens_bP.device).expand_as(tokens_bP)
    output = _forward(stage, tokens_bP, positions, hidden)
    if not stage.post_process:
        return output
    last_b1H = (lengths_b - 1)[:, None, None].expand(-1, 1, output.shape[2])
    return vocabulary.logits(network, output.gather(1, last_b1H))


def advance(network: Network, tokens_b: Tensor, lengths_b: Tensor, hidden: Tensor | None) -> Tensor:
    """The stage's output for one new token a row at position `lengths_b`: hidden [1, b, h] or logits [b, 1, V/tp]."""
    stage = network.chunks[0]
    output = _forward(stage, tokens_b[:, None], lengths_b[:, None], hidden)
    return vocabulary.logits(network, output) if stage.post_process else output


def _forward(stage: GPTModel, tokens: Tensor, positions: Tensor, hidden: Tensor | None) -> Tensor:
    if not stage.pre_process:
        stage.set_input_tensor(hidden)
    if not isinstance(getattr(stage, "rotary_pos_emb", None), Rotary):
        return stage(tokens, positions, attention_mask=None)
    # A row's one new token stands at a place of its own; a prompt starts at 0, as every row in training does.
    stage.rotary_pos_emb.positions_b = positions[:, 0] if positions.shape[1] == 1 else None
    try:
        return stage(tokens, positions, attention_mask=None)
    finally:
        stage.rotary_pos_emb.positions_b = None
