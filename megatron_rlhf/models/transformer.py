"""A role's network: Megatron-Core stages of one layout, with weights that do not depend on the layout."""

from __future__ import annotations

import math
import zlib
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlhf.config.schema import Model
from megatron_rlhf.models import names, stage, transformer_engine
from megatron_rlhf.parallel.collectives import device
from megatron_rlhf.parallel.grid import Grid


@dataclass(frozen=True, slots=True)
class Network:
    """The stages of one role on this rank (none outside its grid) and the directory of its logical tensors.

    `rows` is the padded vocabulary; columns from `model.vocabulary` on are never sampled nor part of a softmax.
    """

    model: Model
    grid: Grid
    rows: int
    scalar: bool
    chunks: list[GPTModel]
    parameters: dict[str, torch.nn.Parameter]
    directory: dict[str, names.Entry] = field(repr=False)

    @property
    def config(self) -> TransformerConfig:
        """Megatron's configuration of the stages."""
        return self.chunks[0].config

    @property
    def vocab_start(self) -> int:
        """Global id of this shard's first vocabulary column."""
        return self.rows // self.grid.layout.tp * max(0, self.grid.tp_rank)


def padded(vocabulary: int, multiple: int) -> int:
    """The vocabulary rounded up, so that every layout's tp divides its rows."""
    return math.ceil(vocabulary / multiple) * multiple


def build(
    model: Model,
    grid: Grid,
    *,
    rows: int,
    seed: int,
    scalar: bool = False,
    dropout: float = 0.0,
    recompute: str = "none",
    engine: str = "auto",
) -> Network:
    """The network of `model` under `grid`; its weights depend on `seed` and their names alone. Collective: world.

    `engine` "auto" takes Transformer Engine's layers where they can run, "never" leaves them out.
    """
    chunks: list[GPTModel] = []
    if grid.inside:
        grid.seed(seed)
        config = stage.configuration(model, grid.layout, dropout=dropout, recompute=recompute)
        fused = engine == "auto" and transformer_engine.usable()
        chunks = [
            stage.build(model, config, grid, rows=rows, scalar=scalar, chunk=chunk, engine=fused).to(device())
            for chunk in range(grid.layout.vp)
        ]
    parameters, gated = names.local(chunks), model.gated
    for name, parameter in parameters.items():
        _initialise(name, parameter, model, grid, seed, names.split_of(name, parameter, gated=gated))
    return Network(model, grid, rows, scalar, chunks, parameters, names.directory(parameters, grid, gated=gated))


def outline(model: Model, grid: Grid, *, rows: int, scalar: bool = False) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global name on the meta device: `build`'s stages without memory, weights or talk."""
    if grid.groups is None:
        return {}
    # without the group of first and last stage Megatron does not fill a tied output layer from the embedding
    groups = copy(grid.groups)
    groups.embd = None
    config = stage.configuration(model, grid.layout)
    config.use_cpu_initialization = True  # which names no device, so torch's default holds
    quiet = replace(grid, groups=groups)
    with torch.device("meta"):
        return names.local(
            [
                stage.build(model, config, quiet, rows=rows, scalar=scalar, chunk=chunk, engine=False)
                for chunk in range(grid.layout.vp)
            ]
        )


@torch.no_grad()
def _initialise(
    name: str, parameter: torch.nn.Parameter, model: Model, grid: Grid, seed: int, split: names.Split
) -> None:
    if name.endswith("layernorm.weight"):
        parameter.fill_(1.0)
        return
    if name.endswith(".bias"):
        parameter.zero_()
        return
    std = model.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * model.layers)
    if name == "head.weight":
        std = 1 / math.sqrt(model.hidden + 1)
    shape, tp = split.whole_shape(parameter.shape, grid.layout.tp), grid.layout.tp
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    parameter.copy_(split.part(torch.normal(0.0, std, shape, generator=generator), tp, grid.tp_rank))
