"""What a Megatron or NeMo checkpoint says of itself beside its tensors: architecture, role, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rlhf.config import plain_yaml
from megatron_rlhf.config.load import build
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import architecture, megatron_args, tokenizer_files
from megatron_rlhf.convert.logical import Card

_LARGEST = 1 << 24


def of(
    where: Path,
    settings: Mapping[str, Any],
    *,
    rows: int,
    precision: str,
    scalar: bool,
    role: str | None,
    said: object = None,
    model: Path | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
) -> Card:
    """The card of the checkpoint `where`: its architecture from the YAML file `model`, else from Megatron-LM's words.

    `rows` is what its word embedding has, `said` the role it was saved with, `role` the one asked for. Raises BadInput
    where the architecture is not said or the role is of the other kind of head.
    """
    if model is not None:
        network = read_model(model)
    elif settings:
        network = megatron_args.model_of(settings, str(where), rows=rows, precision=precision)
    else:
        raise BadInput(f"{where} does not say its architecture (it holds no args); give --model FILE.yaml")
    if network.vocabulary > rows:
        raise BadInput(f"{where} has {rows} rows of words, the model has {network.vocabulary} tokens")
    files = near(where) if tokenizer is None else tokenizer
    return Card(replace(network, precision=precision), _role(where, said, scalar, role), files)


def read_model(path: Path) -> Model:
    """The Model of a YAML file as `model=` takes it. Raises BadInput where it is none."""
    content = text(path)
    try:
        values = plain_yaml.load(content)
    except ValueError as error:
        raise BadInput(f"{path} is no YAML of a model ({error}); write for example layers: 12") from error
    model = build(Model, values, "model")
    architecture.check(model, str(path))
    return model


def section(path: Path, name: str) -> dict[str, Any]:
    """A section of the settings that a framework saved with the weights.

    Tags that name Python objects are read as their text: nothing is imported or called for them.
    """
    content = text(path)
    try:
        found = plain_yaml.load(content, _Inert)
    except ValueError as error:
        raise BadInput(f"{path} is no YAML that can be read ({error}); give --model FILE.yaml") from error
    inner = found.get(name) if isinstance(found, dict) else None
    if not isinstance(inner, dict):
        raise BadInput(f"{path} has no section {name}; give --model FILE.yaml")
    return inner


def near(where: Path) -> dict[str, bytes]:
    """The tokenizer's files in the folder, above it, or in a folder `tokenizer` of either."""
    for place in (where, where.parent, where / "tokenizer", where.parent / "tokenizer"):
        if found := tokenizer_files.collect(place):
            return found
    return {}


def text(path: Path) -> str:
    """The text of a small file. Raises BadInput where it is large, no text or not there."""
    try:
        if path.stat().st_size > _LARGEST:
            raise BadInput(f"{path} is larger than {_LARGEST >> 20} MiB, no settings are")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text; name another file") from error


class _Inert(plain_yaml.Loader):
    """YAML whose unknown tags are text."""


_Inert.add_multi_constructor("", lambda loader, tag, node: tag)


def _role(where: Path, said: object, scalar: bool, asked: str | None) -> str:
    if asked is None:
        if not scalar:
            return "policy"
        return "value" if said == "value" else "reward"
    if scalar and asked == "policy":
        raise BadInput(f"{where}: the weights end in a scalar head and have no output layer; write --role reward")
    if not scalar and asked != "policy":
        raise BadInput(
            f"{where}: the weights are of a language model without a scalar head, which the role {asked} ends in; "
            "write --fresh-head SEED to begin one on it"
        )
    return asked
