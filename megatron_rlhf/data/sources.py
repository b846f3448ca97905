"""Where raw data comes from: the quickstart's conversations, or a folder of the user's JSONL.

A row's users are `users` (people of one conversation) or its one `user`; `conversation` ties prompts together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import chitchat, jsonl
from megatron_rlhf.data.clean import chance

Row = dict[str, Any]

CHITCHAT = "chitchat"
TURNS = 3
GOOD_RATING = 4.5
"""Ratings mix scales to 5 and to 10, and 5 is where the slider starts: below 4.5 a talk is poor on either."""
DEMONSTRATED = 0.6
"""Share of conversations whose replies are demonstrations; the others give prompts."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Raw rows before any filter, and what the filters may do with them."""

    demonstrations: list[Row]
    """{prompt, response, user, ...}"""
    prompts: list[Row]
    """{prompt, user, reference?, ...}"""
    text: list[Row]
    """{text, user, ...}"""
    counters: dict[str, int]
    """What the source itself read and dropped."""
    conversational: bool
    """Prompts are turns, a line each: too long a prompt loses its oldest; toxic replies are dropped."""


def check(source: str) -> None:
    """BadInput unless `data.source` is chitchat, and its package is there, or a folder."""
    if source == CHITCHAT:
        chitchat.file()
    elif not Path(source).is_dir():
        raise BadInput(f"data.source={source} is no folder; write chitchat, or a folder with demonstrations.jsonl")


def load(source: str, seed: int) -> Corpus:
    """The corpus named by `data.source`: chitchat, or a folder; BadInput if it is neither."""
    check(source)
    return conversations(chitchat.conversations(), seed) if source == CHITCHAT else folder(Path(source))


def conversations(talks: list[chitchat.Conversation], seed: int) -> Corpus:
    """Replies of well rated conversations as demonstrations, or as prompts with their reference; all turns as text.

    A prompt is the up to 3 turns before the reply, a line each, its newline included.
    """
    demonstrations: list[Row] = []
    prompts: list[Row] = []
    text: list[Row] = []
    poor = 0
    for talk in talks:
        shared = {"users": sorted(set(talk.speakers)), "conversation": talk.name, "source": "chitchat"}
        text += [{"text": part, "user": talk.speakers[0], **shared} for part in _parts(talk.turns)]
        if talk.rating < GOOD_RATING:
            poor += 1
            continue
        demonstrated = chance(seed, f"demonstrated {talk.name}") < DEMONSTRATED
        for place in range(1, len(talk.turns)):
            prompt = "".join(f"{turn}\n" for turn in talk.turns[max(0, place - TURNS) : place])
            row = {"prompt": prompt, "user": talk.speakers[place], **shared}
            if demonstrated:
                demonstrations.append(row | {"response": talk.turns[place]})
            else:
                prompts.append(row | {"reference": talk.turns[place]})
    turns = sum(len(talk.turns) for talk in talks)
    counters = {"conversations": len(talks), "turns": turns, "poorly_rated_conversations": poor}
    return Corpus(demonstrations, prompts, text, counters, conversational=True)


def folder(path: Path) -> Corpus:
    """`demonstrations.jsonl` of `path`, `prompts.jsonl` (else the demonstrations' prompts) and `text.jsonl` (else the
    demonstrations themselves); a row without user stands for a user of its own."""
    demonstrations = [
        _owned(row, "prompt") for row in jsonl.read(path / "demonstrations.jsonl", ["prompt", "response"])
    ]
    prompts = [_asked(row) for row in demonstrations]
    if (path / "prompts.jsonl").exists():
        prompts = [_owned(row, "prompt") for row in jsonl.read(path / "prompts.jsonl", ["prompt"])]
    text = [_told(row) for row in demonstrations]
    if (path / "text.jsonl").exists():
        text = [_owned(row, "text") for row in jsonl.read(path / "text.jsonl", ["text"])]
    counters = {"demonstrations": len(demonstrations), "prompts": len(prompts), "texts": len(text)}
    return Corpus(demonstrations, prompts, text, counters, conversational=False)


def _parts(turns: tuple[str, ...]) -> list[str]:
    """The turns as texts of a prompt and its response each.

    The end token closes a text: whole conversations would teach that a turn is followed by a newline.
    """
    size = TURNS + 1
    return ["\n".join(turns[start : start + size]) for start in range(0, len(turns), size)]


def users_of(row: Mapping[str, Any]) -> frozenset[str]:
    """All users whose data the row is."""
    return frozenset(row.get("users") or [row["user"]])


def unnamed(user: str) -> str:
    """The kind of row, "prompt" or "text", that came without user and got `user`; "" for a named user."""
    kind = user.partition(" of no user: ")
    return kind[0] if kind[1] else ""


def _owned(row: Row, key: str) -> Row:
    if "user" in row:
        return row | {"user": str(row["user"])}
    return row | {"user": f"{key} of no user: {hashlib.sha256(row[key].encode()).hexdigest()[:12]}"}


def _asked(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "response"} | {"reference": row["response"]}


def _told(row: Row) -> Row:
    joint = "" if row["prompt"][-1:].isspace() else " "
    owner: Row = {name: row[name] for name in ("user", "users") if name in row}
    return {"text": f"{row['prompt']}{joint}{row['response']}", **owner}
