"""A role's network: GPT-style Megatron-Core stages of one layout, with weights that do not depend on the layout."""

from __future__ import annotations

import math
import zlib
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlhf.config.schema import Model
from megatron_rlhf.models import names
from megatron_rlhf.models.attention import CoreAttention
from megatron_rlhf.models.heads import ScalarModel
from megatron_rlhf.models.norm import Norm
from megatron_rlhf.parallel.collectives import device
from megatron_rlhf.parallel.grid import Grid

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
) -> Network:
    """The network of `model` under `grid`; its weights depend on `seed` and their names alone. Collective: world."""
    chunks: list[GPTModel] = []
    if grid.inside:
        grid.seed(seed)
        chunks.append(_stage(model, grid, rows, scalar, dropout, recompute))
    parameters = names.local(chunks)
    for name, parameter in parameters.items():
        _initialise(name, parameter, model, grid, seed)
    return Network(model, grid, rows, scalar, chunks, parameters, names.directory(parameters, grid))


def outline(model: Model, grid: Grid, *, rows: int, scalar: bool = False) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global name on the meta device: `build`'s stages without memory, weights or talk."""
    if grid.groups is None:
        return {}
    # without the group of first and last stage Megatron does not fill a tied output layer from the embedding
    groups = copy(grid.groups)
    groups.embd = None
    with torch.device("meta"):
        return names.local([_stage(model, replace(grid, groups=groups), rows, scalar, 0.0, "none", meta=True)])


def _stage(
    model: Model, grid: Grid, rows: int, scalar: bool, dropout: float, recompute: str, *, meta: bool = False
) -> GPTModel:
    assert grid.groups is not None
    config = _config(model, grid, dropout, recompute)
    config.use_cpu_initialization = meta  # which names no device, so torch's default holds
    kind = ScalarModel if scalar else GPTModel
    extra = {} if scalar else {"share_embeddings_and_output_weights": model.tied}
    stage = kind(
        config=config,
        transformer_layer_spec=_spec(config, grid),
        vocab_size=rows,
        max_sequence_length=model.context,
        pre_process=grid.first_stage,
        post_process=grid.last_stage,
        position_embedding_type="learned_absolute",
        pg_collection=grid.groups,
        **extra,
    )
    # Megatron builds the position embedding in fp32 whatever `params_dtype` says.
    stage = stage.to(config.params_dtype)
    return stage if meta else stage.to(device())


def _spec(config: TransformerConfig, grid: Grid) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    count = get_num_layers_to_build(config, pp_rank=grid.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[ModuleSpec(**vars(layer))] * count, layer_norm=Norm)


def _config(model: Model, grid: Grid, dropout: float, recompute: str) -> TransformerConfig:
    layout = grid.layout
    full = recompute == "full"
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        ffn_hidden_size=model.ffn or 4 * model.hidden,
        hidden_dropout=dropout,
        attention_dropout=0.0,
        normalization="LayerNorm",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp and layout.tp > 1,
        params_dtype=PRECISIONS[model.precision],
        pipeline_dtype=PRECISIONS[model.precision],
        bf16=model.precision == "bf16",
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
    )


@torch.no_grad()
def _initialise(name: str, parameter: torch.nn.Parameter, model: Model, grid: Grid, seed: int) -> None:
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
    dim = names.split_dim(parameter)
    shape = list(parameter.shape)
    if dim is not None:
        shape[dim] *= grid.layout.tp
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    whole = torch.normal(0.0, std, shape, generator=generator)
    part = whole if dim is None else whole.chunk(grid.layout.tp, dim)[grid.tp_rank]
    parameter.copy_(part)
