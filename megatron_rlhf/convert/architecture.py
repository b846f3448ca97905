"""What every Model that a file describes is checked for before anything is made from its numbers."""

from __future__ import annotations

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert.precision import DTYPES

_LAYERS, _SIZE = 1 << 14, 1 << 40
_WORDS = {"style": ("gpt", "llama"), "activation": ("gelu", "gelu_tanh"), "precision": tuple(DTYPES)}


def check(model: Model, where: str) -> None:
    """Raises BadInput, naming `where`, for numbers that no network has."""
    for name in ("layers", "hidden", "heads", "vocabulary", "context", "groups", "ffn_width"):
        most = _LAYERS if name == "layers" else _SIZE
        if not 0 < getattr(model, name) <= most:
            raise BadInput(f"{where}: {name}={getattr(model, name)}; it must be from 1 to {most}")
    if model.hidden % model.heads or model.heads % model.groups:
        raise BadInput(
            f"{where}: {model.heads} heads do not divide {model.hidden} hidden numbers, or {model.groups} key-value "
            "heads do not divide them"
        )
    for name, words in _WORDS.items():
        if getattr(model, name) not in words:
            raise BadInput(f"{where}: {name}={getattr(model, name)} is not one of {', '.join(words)}")
