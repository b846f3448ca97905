"""Conversations of the BYU Chit-Chat Challenge (package chitchat-dataset, MIT), normalised.

People talked in pairs about a question and rated the talk: witty, interesting, upbeat.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.clean import normalize


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns with their speakers, who alternate; the mean of its three ratings, 0 where there is none."""

    name: str
    turns: tuple[str, ...]
    speakers: tuple[str, ...]
    rating: float


def conversations() -> list[Conversation]:
    """Every conversation with at least one turn, in the order of the package.

    BadInput with the command that helps if the package is missing.
    """
    read = json.loads(file().read_text(encoding="utf-8"))
    found = (_conversation(name, entry) for name, entry in read.items())
    return [conversation for conversation in found if conversation.turns]


def file() -> Path:
    """The corpus's file in its package; BadInput with the command that helps if the package is missing."""
    spec = find_spec("chitchat_dataset")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / "dataset.json" for folder in folders]
    if not files or not files[0].is_file():
        raise BadInput(
            "data.source=chitchat needs the package chitchat-dataset: pip install --no-deps chitchat-dataset==0.9.0, "
            "or set data.source to a folder with demonstrations.jsonl"
        )
    return files[0]


def _conversation(name: str, entry: dict[str, Any]) -> Conversation:
    said = [(message["sender"], normalize(message["text"])) for group in entry["messages"] for message in group]
    turns = [
        (speaker, " ".join(text for _, text in messages))
        for speaker, messages in groupby((pair for pair in said if pair[1]), key=lambda pair: pair[0])
    ]
    ratings = list((entry.get("ratings") or {}).values())
    return Conversation(
        name=name,
        turns=tuple(text for _, text in turns),
        speakers=tuple(speaker for speaker, _ in turns),
        rating=sum(ratings) / len(ratings) if ratings else 0.0,
    )
