"""What a folder of weights, or of a state, says of itself; read without torch, before a network is built.

A manifest carries the digests of the folder's files and a seal, the digest of its own content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.checkpoint import form
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.observe.log import json_text, write_text

FILE = "manifest.json"
HEAD = "head.weight"
_SEAL = "seal"


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """`folder` has a manifest of these facts, sealed."""
    settled = json.loads(json_text(facts))
    write_text(folder / FILE, json_text({**settled, _SEAL: _seal(settled)}))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, with its seal. Raises BadInput where it is missing, damaged or not sealed."""
    found = _parsed(folder / FILE)
    if found.get(_SEAL) != _seal(found):
        raise BadInput(f"{folder / FILE} is damaged: its content is not what its seal says")
    return found


def manifest(folder: Path) -> dict[str, Any]:
    """What was saved with the weights in `folder`; raises BadInput where there are none, or where they are damaged."""
    if not (folder / FILE).exists():
        raise BadInput(f"no weights at {folder}: run the step that writes them first, or name another folder")
    found = _parsed(folder / FILE)
    if _SEAL in found and found[_SEAL] != _seal(found):
        raise BadInput(f"{folder / FILE} is damaged: its content is not what its seal says; write the weights again")
    lacking = [name for name in ("tensors", "digests") if not isinstance(found.get(name), dict)]
    if lacking:
        raise BadInput(f"{folder / FILE} has no {' and no '.join(lacking)}; write the weights again with this version")
    return found


def readable(folder: Path) -> dict[str, Any]:
    """`manifest`, whose tensors and digests have the form that is read of them, whoever wrote it. Raises BadInput."""
    found = manifest(folder)
    if fault := form.tensors(found["tensors"]) or form.digests(found["digests"]):
        raise BadInput(f"{folder / FILE} is damaged: {fault}; write the weights again with this version")
    return found


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


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: it is no JSON") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} is damaged: it is no table of facts")
    return found


def _seal(facts: Mapping[str, Any]) -> str:
    bare = {name: value for name, value in facts.items() if name != _SEAL}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
