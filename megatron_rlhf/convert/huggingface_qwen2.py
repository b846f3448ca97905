"""Qwen2: Llama with biases on the projections to queries, keys and values, and without its sliding window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import huggingface_names as names
from megatron_rlhf.convert.huggingface_config import Family, Settings
from megatron_rlhf.convert.huggingface_families import ROTARY_BUFFERS, read_rotary, write_rotary

_FULL = "full_attention"


def _read(settings: Settings) -> Model:
    if settings.flag("use_sliding_window", False):
        raise BadInput(
            f"{settings.where}: use_sliding_window=true is not supported, attention here sees every earlier token; "
            "write use_sliding_window false if the weights were trained without"
        )
    # both say where the window would be
    settings.take("sliding_window")
    settings.take("max_window_layers")
    kinds = settings.take("layer_types", [])
    if not isinstance(kinds, list) or any(kind != _FULL for kind in kinds):
        raise BadInput(f"{settings.where}: layer_types={str(kinds)[:60]}: only {_FULL} in every layer can be converted")
    return replace(read_rotary(settings), qkv_bias=True)


def _write(model: Model) -> dict[str, Any]:
    window = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.layers}
    return write_rotary(model) | window


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "Qwen2ForSequenceClassification",
    names.LLAMA,
    _read,
    _write,
    harmless=ROTARY_BUFFERS,
)
