"""GPT-2, Llama and Mistral: their config.json and the table of their tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import huggingface_names as names
from megatron_rlhf.convert.huggingface_config import Family, Settings, read_rope, write_rope

GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's words for the exact GELU and its tanh approximation."""


def _read_gpt2(settings: Settings) -> Model:
    layers, hidden, heads = settings.whole("n_layer"), settings.whole("n_embd"), settings.whole("n_head")
    context = settings.whole("n_positions")
    settings.neutral("n_ctx", context, why=f"it must be n_positions={context}")
    settings.neutral("scale_attn_weights", True, why="only true can be converted")
    settings.neutral("scale_attn_by_inverse_layer_idx", False, why="only false can be converted")
    settings.neutral("reorder_and_upcast_attn", False, why="only false can be converted")
    return Model(
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocabulary=settings.whole("vocab_size"),
        context=context,
        ffn=settings.whole("n_inner", 4 * hidden),
        tied=settings.flag("tie_word_embeddings", True),
        activation=settings.word("activation_function", GELUS, "gelu_new"),
        norm_epsilon=settings.number("layer_norm_epsilon", 1e-5),
        init_std=settings.number("initializer_range", 0.02),
    )


def _write_gpt2(model: Model) -> dict[str, Any]:
    return {
        "n_layer": model.layers,
        "n_embd": model.hidden,
        "n_head": model.heads,
        "vocab_size": model.vocabulary,
        "n_positions": model.context,
        "n_inner": model.ffn_width,
        "tie_word_embeddings": model.tied,
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_std,
    }


def _read_llama(settings: Settings) -> Model:
    biased = settings.flag("attention_bias", False)
    if settings.flag("mlp_bias", False) != biased:
        raise BadInput(
            f"{settings.where}: attention_bias={str(biased).lower()} and mlp_bias={str(not biased).lower()}: Megatron-"
            "Core's layers have both biases or neither, so only equal ones can be converted"
        )
    return replace(read_rotary(settings), linear_bias=biased)


def _write_llama(model: Model) -> dict[str, Any]:
    return write_rotary(model) | {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}


def _read_mistral(settings: Settings) -> Model:
    context = settings.whole("max_position_embeddings")
    # absent is 4096 to transformers, null is none
    window = settings.take("sliding_window", None if "sliding_window" in settings.values else 4096)
    if window is not None and not (type(window) is int and window >= context):
        raise BadInput(
            f"{settings.where}: sliding_window={window} is not supported, attention here sees every earlier token; "
            f"write sliding_window null if the weights were trained without, or max_position_embeddings={window} to "
            "use them within the window"
        )
    return read_rotary(settings)


def read_rotary(settings: Settings) -> Model:
    """The network of the keys that Llama, Mistral and their relatives share."""
    hidden, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    context = settings.whole("max_position_embeddings")
    settings.word("hidden_act", {"silu": "silu"}, "silu")
    return Model(
        layers=settings.whole("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=settings.whole("num_key_value_heads", heads),
        head_dim=settings.whole("head_dim") if settings.given("head_dim") else 0,
        vocabulary=settings.whole("vocab_size"),
        context=context,
        ffn=settings.whole("intermediate_size"),
        tied=settings.flag("tie_word_embeddings", False),
        style="llama",
        norm_epsilon=settings.number("rms_norm_eps", 1e-6),
        rope=read_rope(settings, context),
        init_std=settings.number("initializer_range", 0.02),
    )


def write_rotary(model: Model) -> dict[str, Any]:
    """The keys that Llama, Mistral and their relatives share."""
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_width,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.context,
        "intermediate_size": model.ffn_width,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
    } | write_rope(model.rope)


ROTARY_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
"""Buffers of rotary positions that older files hold."""

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    names.GPT2,
    _read_gpt2,
    _write_gpt2,
    prefix="transformer.",
    # the causal mask and the value behind it
    harmless=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    names.LLAMA,
    _read_llama,
    _write_llama,
    harmless=ROTARY_BUFFERS,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "MistralForSequenceClassification",
    names.LLAMA,
    _read_mistral,
    lambda model: write_rotary(model) | {"sliding_window": None},
    harmless=ROTARY_BUFFERS,
)
