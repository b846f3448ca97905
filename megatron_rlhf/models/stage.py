"""One pipeline stage of Megatron-Core's GPTModel: the layers of its place, in the style and for the machine at hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Model
from megatron_rlhf.models import transformer_engine
from megatron_rlhf.models.attention import CoreAttention
from megatron_rlhf.models.heads import LanguageModel, ScalarModel
from megatron_rlhf.models.norm import Norm, local_layer
from megatron_rlhf.models.rope import Rotary, attention_factor
from megatron_rlhf.parallel.grid import Grid


def gelu_tanh(numbers: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""
    return F.gelu(numbers, approximate="tanh")


_GELUS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(
    model: Model, config: TransformerConfig, grid: Grid, *, rows: int, scalar: bool, chunk: int, engine: bool
) -> GPTModel:
    """The stage at this rank's place in the pipeline, its virtual stage `chunk`; `engine` takes Transformer Engine's
    layers. Its weights are allocated and not yet set."""
    assert grid.groups is not None
    last = config.virtual_pipeline_model_parallel_size or 1
    kind: Any = ScalarModel if scalar else LanguageModel
    extra = {} if scalar else {"share_embeddings_and_output_weights": model.tied}
    stage: GPTModel = kind(
        config=config,
        transformer_layer_spec=_spec(config, grid, chunk, engine),
        vocab_size=rows,
        max_sequence_length=model.context,
        pre_process=grid.first_stage and chunk == 0,
        post_process=grid.last_stage and chunk == last - 1,
        position_embedding_type="rope" if model.rotary else "learned_absolute",
        pg_collection=grid.groups,
        vp_stage=_virtual(config, chunk),
        **extra,
    )
    if model.rotary:
        stage.rotary_pos_emb = Rotary(model, config)
    # Megatron builds the position embedding in fp32 whatever `params_dtype` says.
    return stage.to(config.params_dtype)


def configuration(model: Model, layout: Layout, *, dropout: float = 0.0, recompute: str = "none") -> TransformerConfig:
    """Megatron's configuration of every stage of `model` under `layout`."""
    full = recompute == "full"
    virtual = layout.vp > 1
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_width,
        hidden_dropout=dropout,
        attention_dropout=0.0,
        normalization="RMSNorm" if model.gated else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.gated,
        activation_func=F.silu if model.gated else _GELUS[model.activation],
        add_bias_linear=model.biased,
        add_qkv_bias=model.qkv_bias,
        softmax_scale=attention_factor(model.rope) * model.head_width**-0.5 if model.rotary else None,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if virtual else None,
        # Batched sends between two interleaved stages give wrong gradients without a word (mcore 0.16.1).
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
        sequence_parallel=layout.sp and layout.tp > 1,
        params_dtype=PRECISIONS[model.precision],
        pipeline_dtype=PRECISIONS[model.precision],
        bf16=model.precision == "bf16",
        fp16=model.precision == "fp16",
        calculate_per_token_loss=True,
        # With overlapped sends over gloo the tensor would be freed while it travels.
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


def _virtual(config: TransformerConfig, chunk: int) -> int | None:
    return chunk if config.virtual_pipeline_model_parallel_size else None


def _spec(config: TransformerConfig, grid: Grid, chunk: int, engine: bool) -> TransformerBlockSubmodules:
    layer = transformer_engine.layer() if engine else local_layer(config)
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    norm: Any = transformer_engine.norm() if engine else Norm
    count = get_num_layers_to_build(config, vp_stage=_virtual(config, chunk), pp_rank=grid.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[ModuleSpec(**vars(layer))] * count, layer_norm=norm)
