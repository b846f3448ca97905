"""`model_config.yaml` of a NeMo GPT and Megatron-LM's words for the same settings, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import megatron_args

_NORMS = {"layernorm": "LayerNorm", "low_precision_layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
_GATED = {"gelu": False, "openai-gelu": False, "swiglu": True, "fast-swiglu": True}
# settings of NeMo that are Megatron-LM's under another name
_RENAMED = {
    "num_moe_experts": "num_experts",
    "qkv_bias": "add_qkv_bias",
    "rotary_percentage": "rotary_percent",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "scale_positional_embedding": "use_rope_scaling",
    "encoder_seq_length": "seq_length",
    "override_vocab_size": "vocab_size",
}
_SAME = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
         "max_position_embeddings", "layernorm_epsilon", "init_method_std", "rotary_base", "position_embedding_type",
         "window_size", "rotary_interleaved", "qk_layernorm", "openai_gelu")  # fmt: skip
_NEUTRAL = {"transformer_block_type": "pre_ln", "headscale": False, "multi_query_attention": False}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def args_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of the config under Megatron-LM's words. Raises BadInput naming one that is not known here."""
    for name, value in _NEUTRAL.items():
        if config.get(name) not in (None, value):
            raise BadInput(f"{where}: {name}={str(config[name])[:60]} is a network that is not known here")
    args = {name: _plain(config[name]) for name in _SAME if config.get(name) is not None}
    args |= {ours: _plain(config[name]) for name, ours in _RENAMED.items() if config.get(name) is not None}
    # a reference to another setting, as the training's YAML has it
    args = {name: value for name, value in args.items() if not (isinstance(value, str) and value.startswith("${"))}
    args["normalization"] = _word(config, "normalization", "layernorm", _NORMS, where)
    args["swiglu"] = _word(config, "activation", "gelu", _GATED, where)
    args["add_bias_linear"] = config.get("bias", True) is not False
    args["bias_gelu_fusion"] = (
        config.get("activation", "gelu") == "openai-gelu" or config.get("bias_activation_fusion", True) is not False
    )
    args["untie_embeddings_and_output_weights"] = config.get("share_embeddings_and_output_weights", True) is False
    args.setdefault("max_position_embeddings", args.get("seq_length"))
    return args


def config_of(model: Model) -> dict[str, Any]:
    """The config of a Megatron-Core GPT in NeMo (`mcore_gpt`). Raises BadInput naming what it cannot say.

    It names no `target`: NeMo 3 refuses the class of NeMo 1 and 2, and without one restores what it is asked for.
    """
    args = megatron_args.args_of(model, model.vocabulary)
    if args["position_embedding_type"] == "yarn" or (args["use_rope_scaling"] and args["rope_scaling_factor"] != 8.0):
        raise BadInput(f"NeMo has no rope.scaling={model.rope.scaling} of {model.rope.factor:g}; write --to megatron")
    config = {name: args[name] for name in _SAME if args.get(name) is not None}
    config |= {name: args[ours] for name, ours in _RENAMED.items() if args.get(ours) is not None}
    return config | {
        "mcore_gpt": True,
        "encoder_seq_length": model.context,
        "normalization": "rmsnorm" if model.gated else "layernorm",
        "activation": "fast-swiglu" if model.gated else "gelu",
        "bias": model.biased,
        "bias_activation_fusion": args["bias_gelu_fusion"],
        "bias_dropout_add_fusion": False,
        "share_embeddings_and_output_weights": model.tied,
        "make_vocab_size_divisible_by": 1,
        "pre_process": True,
        "post_process": True,
        "megatron_amp_O2": False,
        "transformer_engine": True,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "precision": {"fp32": 32, "bf16": "bf16", "fp16": 16}[model.precision],
    }


def _word(config: Mapping[str, Any], name: str, default: str, words: Mapping[str, Any], where: str) -> Any:
    value = config.get(name) or default
    if not isinstance(value, str) or value not in words:
        raise BadInput(f"{where}: {name}={str(value)[:60]} is not one of {', '.join(words)}")
    return words[value]


def _plain(value: Any) -> Any:
    """A number that YAML 1.1 reads as text, as 1e-5, is one."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
