"""What every Model that a file describes is checked for before anything is made from its numbers, and when two are the
same network."""

from __future__ import annotations

from dataclasses import replace

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert.precision import DTYPES

_LAYERS, _SIZE = 1 << 14, 1 << 40
_WORDS = {"style": ("gpt", "llama", "neox"), "activation": ("gelu", "gelu_tanh"), "precision": tuple(DTYPES)}


def check(model: Model, where: str) -> None:
    """Raises BadInput, naming `where`, for numbers that no network has."""
    for name in ("layers", "hidden", "heads", "vocabulary", "context", "groups", "ffn_width", "head_width"):
        most = _LAYERS if name == "layers" else _SIZE
        if not 0 < getattr(model, name) <= most:
            raise BadInput(f"{where}: {name}={getattr(model, name)}; it must be from 1 to {most}")
    if (not model.head_dim and model.hidden % model.heads) or model.heads % model.groups:
        raise BadInput(
            f"{where}: {model.heads} heads do not divide {model.hidden} hidden numbers, or {model.groups} key-value "
            "heads do not divide them"
        )
    for name, words in _WORDS.items():
        if getattr(model, name) not in words:
            raise BadInput(f"{where}: {name}={getattr(model, name)} is not one of {', '.join(words)}")
    if not 0 < model.rope.fraction <= 1:
        raise BadInput(f"{where}: rope.fraction={model.rope.fraction:g}; it must be above 0 and at most 1")
    if model.rotary and (model.rotary_width < 2 or model.rotary_width % 2):
        raise BadInput(
            f"{where}: {model.rotary_width} of the {model.head_width} numbers of a head turn "
            f"(rope.fraction={model.rope.fraction:g}); it must be an even number above 0"
        )


def normal(model: Model) -> Model:
    """The same network with every default spelled out and what it does not use at its default."""
    return replace(
        model,
        ffn=model.ffn_width,
        kv_heads=model.groups,
        head_dim=model.head_width,
        rope=_used(model),
        activation="gelu" if model.gated else model.activation,
        qkv_bias=model.qkv_bias and not model.biased,
        linear_bias=model.linear_bias and model.gated,
    )


def _used(model: Model) -> Rope:
    rope = model.rope
    if not model.rotary:
        return Rope()
    plain = Rope(base=rope.base, scaling=rope.scaling, fraction=rope.fraction)
    if rope.scaling == "none":
        return plain
    plain = replace(plain, factor=rope.factor)
    if rope.scaling == "linear":
        return plain
    plain = replace(plain, original_context=rope.original_context)
    return replace(plain, low=rope.low, high=rope.high) if rope.scaling == "llama3" else plain
