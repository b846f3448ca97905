"""GPT-NeoX whose layers add attention, then the feed-forward block: GPT-2 with rotary positions in part of a head."""

from __future__ import annotations

from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import huggingface_names as names
from megatron_rlhf.convert.huggingface_config import Family, Settings, read_rope, write_rope
from megatron_rlhf.convert.huggingface_families import GELUS


def _read(settings: Settings) -> Model:
    if settings.flag("use_parallel_residual", True):
        raise BadInput(
            f"{settings.where}: use_parallel_residual=true, as it is where the key is missing, adds attention and "
            "feed-forward block of a layer to the same residual, which Megatron's layers do not; only false can be "
            "converted"
        )
    settings.neutral("attention_bias", True, why="only true can be converted")
    context = settings.whole("max_position_embeddings")
    base = _agreed(settings, 10000.0, "rotary_emb_base", "rope_theta")
    fraction = _agreed(settings, 0.25, "rotary_pct", "partial_rotary_factor")
    return Model(
        layers=settings.whole("num_hidden_layers"),
        hidden=settings.whole("hidden_size"),
        heads=settings.whole("num_attention_heads"),
        vocabulary=settings.whole("vocab_size"),
        context=context,
        ffn=settings.whole("intermediate_size"),
        tied=settings.flag("tie_word_embeddings", False),
        style="neox",
        activation=settings.word("hidden_act", GELUS, "gelu"),
        norm_epsilon=settings.number("layer_norm_eps", 1e-5),
        rope=read_rope(settings, context, base, fraction),
        init_std=settings.number("initializer_range", 0.02),
    )


def _write(model: Model) -> dict[str, Any]:
    rope = write_rope(model.rope)
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.context,
        "intermediate_size": model.ffn_width,
        "tie_word_embeddings": model.tied,
        "hidden_act": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
        "layer_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rotary_pct": model.rope.fraction,
        "rotary_emb_base": rope["rope_theta"],
        "rope_scaling": rope["rope_scaling"],
    }


def _agreed(settings: Settings, default: float, old: str, new: str) -> float:
    """The number of two keys of different ages for the same. Raises BadInput where both are there and differ."""
    first = settings.number(old, default)
    second = settings.number(new, first)
    if settings.given(old) and first != second:
        raise BadInput(f"{settings.where}: {old}={first:g} and {new}={second:g} disagree; write one of them")
    return second


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "GPTNeoXForSequenceClassification",
    names.GPT_NEOX,
    _read,
    _write,
    prefix="gpt_neox.",
    # the causal mask, the value behind it, and frequencies of the rotary positions
    harmless=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
