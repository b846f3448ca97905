"""Global names: what a parameter is called and which slice of it a rank holds, whatever the layout.

Layers are counted over the whole model, a tied output layer is the word embedding, a scalar head is `head.*`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.grid import Grid

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
# Transformer Engine keeps a norm's weights in the projection behind it
_FUSED = re.compile(r"^(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_(weight|bias)$")
_NORMS = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Split:
    """How tp cuts a tensor: along `dim` (None where it is replicated), each of its equal `blocks` for itself.

    SwiGLU's first projection has two, gate and up: a shard is its part of the gate, then its part of the up.
    """

    dim: int | None
    blocks: int = 1

    def part(self, whole: Tensor, tp: int, place: int) -> Tensor:
        """The shard of `whole` at a tp rank."""
        if self.dim is None:
            return whole
        parts = [block.chunk(tp, self.dim)[place] for block in whole.chunk(self.blocks, self.dim)]
        return parts[0] if self.blocks == 1 else torch.cat(parts, self.dim)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor from its shards in the order of tp."""
        if self.dim is None:
            return shards[0]
        cut = [shard.chunk(self.blocks, self.dim) for shard in shards]
        return torch.cat([shard[block] for block in range(self.blocks) for shard in cut], self.dim)

    def whole_shape(self, shard: Sequence[int], tp: int) -> tuple[int, ...]:
        """The shape of the whole tensor from a shard's."""
        return tuple(size * tp if place == self.dim else size for place, size in enumerate(shard))


@dataclass(frozen=True, slots=True)
class Entry:
    """One logical tensor: how tp splits it, a shard's shape, and the world rank that hands out each tp shard."""

    split: Split
    shard_shape: tuple[int, ...]
    dtype: torch.dtype
    owners: tuple[int, ...]


def local(chunks: list[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """The parameters of this rank's chunks by global name."""
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            named[_global(chunk, name)] = parameter
    return named


def split_of(name: str, parameter: torch.nn.Parameter, *, gated: bool) -> Split:
    """How tensor parallelism cuts the parameter; `gated` tells whether the feed-forward block has a gate."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return Split(None)
    return Split(parameter.partition_dim, 2 if gated and ".linear_fc1." in name else 1)  # type: ignore[attr-defined]


def directory(named: dict[str, torch.nn.Parameter], grid: Grid, *, gated: bool) -> dict[str, Entry]:
    """Every logical tensor of the model with its owners, replica 0's first stage that has it. Collective: world."""
    mine = {
        name: (split_of(name, parameter, gated=gated), tuple(parameter.shape), parameter.dtype)
        for name, parameter in named.items()
        if grid.dp_rank == 0
    }
    everyone = collectives.gather_objects((grid.tp_rank, grid.pp_rank, mine))
    owners: dict[str, dict[int, tuple[int, int]]] = {}
    facts: dict[str, tuple[Split, tuple[int, ...], torch.dtype]] = {}
    for rank, (tp_rank, pp_rank, entries) in enumerate(everyone):
        for name, fact in entries.items():
            held = owners.setdefault(name, {})
            if tp_rank not in held or pp_rank < held[tp_rank][0]:
                held[tp_rank] = (pp_rank, rank)
            facts[name] = fact
    return {
        name: Entry(
            *facts[name], tuple(held[t][1] for t in sorted(held)) if facts[name][0].dim is not None else (held[0][1],)
        )
        for name, held in sorted(owners.items())
    }


def _global(chunk: GPTModel, name: str) -> str:
    match = _LAYER.match(name)
    if match:
        number = chunk.decoder.layers[int(match[1])].layer_number - 1
        return f"decoder.layers.{number}.{_FUSED.sub(_unfused, match[2])}"
    if name.startswith("output_layer."):
        if chunk.share_embeddings_and_output_weights:
            return EMBEDDING
        if hasattr(chunk.output_layer, "gathers"):
            return name.replace("output_layer.", "head.")
    return name


def _unfused(match: re.Match[str]) -> str:
    return f"{_NORMS[match[1]]}.{match[2]}"
