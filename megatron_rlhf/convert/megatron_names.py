"""What Megatron-Core, Transformer Engine and the Megatron-LM and NeMo of before call a tensor, and what we call it.

Ours are the names of Megatron-Core's local layers (`reshard/layout.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HEAD = "head.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Tensors of a row a token, which Megatron pads."""

HARMLESS = re.compile(r".*(_extra_state(/.*)?|inv_freq|(local|core)_attention\.norm_factor)")
"""What holds no weights: state of Transformer Engine's number formats, and buffers that follow from the settings."""
TRAINING = re.compile(r"(chained_\d+\.)?optimizer\..*|rng_state.*|rerun_state.*|opt_param_scheduler.*|consumed_.*")
"""What a checkpoint has for going on with the training: optimizer, random numbers, cursors."""

_PREFIX = re.compile(r"(module\.|model\d*\.|state_dict\.)*")
_OLD = re.compile(r"language_model\.(encoder|transformer)\.")
_LAYER = re.compile(r"decoder\.layers\.(\d+\.)?(.*)")
# first match counts; those of the layers, behind their number
_LAYERS = (
    (r"self_attention\.linear_qkv\.layer_norm_", "input_layernorm."),
    (r"mlp\.linear_fc1\.layer_norm_", "pre_mlp_layernorm."),
    (r"input_norm\.", "input_layernorm."),
    (r"post_attention_(layernorm|norm)\.", "pre_mlp_layernorm."),
    (r"(self_)?attention\.query_key_value\.", "self_attention.linear_qkv."),
    (r"(self_)?attention\.dense\.", "self_attention.linear_proj."),
    (r"mlp\.dense_h_to_4h\.", "mlp.linear_fc1."),
    (r"mlp\.dense_h_to_4h_2\.(\w+)", r"mlp.linear_fc1.\1_v"),
    (r"mlp\.dense_4h_to_h\.", "mlp.linear_fc2."),
)
# how a distributed checkpoint calls what Transformer Engine's fused layers hold
_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def logical(key: str) -> tuple[str, str]:
    """Our name of a key, and which half of the tensor it is: "", or "w" (gate) or "v" (up) of a gated projection.

    A key of stacked layers has no number in its name either: `decoder.layers.mlp.linear_fc2.weight`.
    """
    name = key[_PREFIX.match(key).end() :]  # type: ignore[union-attr]
    name = _OLD.sub("decoder.", name)
    name = re.sub(r"^language_model\.", "", name)
    name = re.sub(r"^decoder\.final_norm\.", "decoder.final_layernorm.", name)
    match = _LAYER.fullmatch(name)
    if match:
        inner = match[2]
        for pattern, ours in _LAYERS:
            inner, count = re.subn(rf"^{pattern}", ours, inner)
            if count:
                break
        name = f"decoder.layers.{match[1] or ''}{inner}"
    half = re.fullmatch(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])", name)
    return (half[1], half[2]) if half else (name, "")


def stacked(name: str) -> tuple[str, int | None]:
    """The key of a distributed checkpoint that holds our tensor `name`, and the layer that it is of, None outside."""
    match = _LAYER.fullmatch(name)
    if not match or not match[1]:
        return name, None
    return f"decoder.layers.{_fused(match[2])}", int(match[1][:-1])


def numbered(name: str) -> str:
    """Our tensor `name` as Transformer Engine's layers call it, with the layer's number."""
    match = _LAYER.fullmatch(name)
    return f"decoder.layers.{match[1]}{_fused(match[2])}" if match and match[1] else name


def weights(keys: Iterable[str]) -> list[str]:
    """The keys that may be weights: neither harmless nor there for the training."""
    return [key for key in keys if not HARMLESS.fullmatch(key) and not TRAINING.fullmatch(key)]


def _fused(inner: str) -> str:
    for ours, theirs in _FUSED.items():
        inner = inner.replace(ours, theirs, 1) if inner.startswith(ours) else inner
    return inner
