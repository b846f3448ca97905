"""Global names: what a parameter is called and which slice of it a rank holds, whatever the layout.

Layers are counted over the whole model, a tied output layer is the word embedding, a scalar head is `head.*`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rlhf.parallel import collectives
from megatron_rlhf.parallel.grid import Grid

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Entry:
    """One logical tensor: the dimension tp splits (None where replicated), a shard's shape, and the world rank that
    hands out each tp shard."""

    dim: int | None
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


def split_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that tensor parallelism splits, None where the parameter is replicated."""
    split = getattr(parameter, "tensor_model_parallel", False)
    return parameter.partition_dim if split else None  # type: ignore[attr-defined]


def directory(named: dict[str, torch.nn.Parameter], grid: Grid) -> dict[str, Entry]:
    """Every logical tensor of the model with its owners, replica 0's first stage that has it. Collective: world."""
    mine = {
        name: (split_dim(parameter), tuple(parameter.shape), parameter.dtype)
        for name, parameter in named.items()
        if grid.dp_rank == 0
    }
    everyone = collectives.gather_objects((grid.tp_rank, grid.pp_rank, mine))
    owners: dict[str, dict[int, tuple[int, int]]] = {}
    facts: dict[str, tuple[int | None, tuple[int, ...], torch.dtype]] = {}
    for rank, (tp_rank, pp_rank, entries) in enumerate(everyone):
        for name, fact in entries.items():
            held = owners.setdefault(name, {})
            if tp_rank not in held or pp_rank < held[tp_rank][0]:
                held[tp_rank] = (pp_rank, rank)
            facts[name] = fact
    return {
        name: Entry(
            *facts[name], tuple(held[t][1] for t in sorted(held)) if facts[name][0] is not None else (held[0][1],)
        )
        for name, held in sorted(owners.items())
    }


def _global(chunk: GPTModel, name: str) -> str:
    match = _LAYER.match(name)
    if match:
        number = chunk.decoder.layers[int(match[1])].layer_number - 1
        return f"decoder.layers.{number}.{match[2]}"
    if name.startswith("output_layer."):
        if chunk.share_embeddings_and_output_weights:
            return EMBEDDING
        if hasattr(chunk.output_layer, "gathers"):
            return name.replace("output_layer.", "head.")
    return name
