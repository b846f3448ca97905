"""What a folder of weights says of itself; read without torch, before a network is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput

FILE = "manifest.json"
HEAD = "head.weight"


def manifest(folder: Path) -> dict[str, Any]:
    """What was saved with the weights in `folder`; raises BadInput where there are none."""
    path = folder / FILE
    if not path.exists():
        raise BadInput(f"no weights at {folder}: run the step that writes them first, or name another folder")
    return json.loads(path.read_text())


def check(found: dict[str, Any], folder: Path, *, vocabulary: int, head: bool) -> None:
    """Raises BadInput unless the weights are of a model of `vocabulary` tokens, with a scalar head where one is asked
    for."""
    if head and HEAD not in found["tensors"]:
        raise BadInput(
            f"{folder} has no tensor {HEAD}, the scalar head, it holds a language model; "
            "megatron-rlhf reward writes weights with one"
        )
    saved = found.get("vocabulary", vocabulary)
    if saved != vocabulary:
        raise BadInput(
            f"{folder} holds a model of {saved} tokens and model.vocabulary={vocabulary}; write model.vocabulary="
            f"{saved} reward_model.vocabulary={saved} and prepare with that model's tokenizer, or name other weights"
        )
