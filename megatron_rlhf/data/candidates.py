"""Rows on their way through the filters, each encoded once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import Any

from megatron_rlhf.config.schema import Data
from megatron_rlhf.data import clean
from megatron_rlhf.data.sources import Row, users_of
from megatron_rlhf.data.tokenizer import Tokenizer

Judge = Callable[[Sequence[str]], list[float]]
"""The probability of each text to be toxic."""

TOXIC = 0.3
"""Probability from which a reply of a conversation is toxic."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row, the tokens of its prompt, and the reply with its number of tokens (end token included, 0: no reply)."""

    row: Row
    prompt: list[int]
    reply: str
    reply_tokens: int

    @property
    def conversation(self) -> str:
        """What ties prompts together: the conversation, else the prompt itself."""
        return str(self.row.get("conversation", self.row["prompt"]))

    def is_held(self, held: Collection[str]) -> bool:
        """Whether its users are held out, all of them."""
        return all(user in held for user in users_of(self.row))


def candidates(rows: Sequence[Row], reply: str, tokenizer: Tokenizer) -> list[Candidate]:
    """The rows with their tokens; field `reply` holds the reply where there is one."""
    texts = [str(row.get(reply, "")) for row in rows]
    encoded = tokenizer.encode_all([row["prompt"] for row in rows] + texts)
    return [
        Candidate(row, [*tokenizer.opening, *prompt], text, len(answer) + 1 if reply in row else 0)
        for row, prompt, text, answer in zip(rows, encoded[: len(rows)], texts, encoded[len(rows) :], strict=True)
    ]


def recent(candidate: Candidate, newline: int, most: int) -> Candidate:
    """The candidate with the last whole lines of its prompt that have at most `most` tokens, one line at least."""
    prompt = candidate.prompt
    if len(prompt) <= most or newline not in prompt[:-1]:
        return candidate
    ends = [place + 1 for place, token in enumerate(prompt[:-1]) if token == newline]
    lines = next((line for line, end in enumerate(ends) if len(prompt) - end <= most), len(ends) - 1)
    text = candidate.row["prompt"].split("\n", lines + 1)[-1]
    return Candidate(candidate.row | {"prompt": text}, prompt[ends[lines] :], candidate.reply, candidate.reply_tokens)


def filtered(found: list[Candidate], limits: Data, judge: Judge | None, count: dict[str, int]) -> list[Candidate]:
    """The candidates within the limits of lengths, duplicates and toxicity; without `judge` that is not looked at.

    Modifies: count, by what each filter dropped.
    """

    def keep(name: str, kept: clean.Kept) -> None:
        nonlocal found
        found, count[name] = [found[place] for place in kept[0]], kept[1]

    def replies() -> list[int]:
        return [one.reply_tokens or limits.min_response_tokens for one in found]

    keep("prompt_too_long", clean.drop_long([len(one.prompt) for one in found], most=limits.max_prompt_tokens))
    keep("response_too_long", clean.drop_long(replies(), most=limits.max_response_tokens))
    keep(
        "response_too_short",
        clean.drop_long(replies(), least=limits.min_response_tokens, most=limits.max_response_tokens),
    )
    keep("shared_prefix", clean.drop_shared_prefix([one.prompt for one in found], limits.shared_prefix_tokens))
    if judge:
        harmless = [probability < TOXIC for probability in judge([one.reply for one in found])]
        keep("toxic", ([place for place, fine in enumerate(harmless) if fine], harmless.count(False)))
    return found


def emptied(name: str, whole: Sequence[Candidate], limits: Data, count: dict[str, int]) -> str:
    """The sentence for rows of which `filtered` left none: what dropped most of them, and a limit that keeps half."""
    replies = [one.reply_tokens or limits.min_response_tokens for one in whole]
    remedies = {
        "prompt_too_long": f"write for example data.max_prompt_tokens={median_high(len(one.prompt) for one in whole)}",
        "response_too_long": f"write for example data.max_response_tokens={median_high(replies)}",
        "response_too_short": f"write for example data.min_response_tokens={median_low(replies)}",
        "toxic": "give other replies",
    }
    most = max(remedies, key=lambda reason: count.get(reason, 0))
    return f"none of its {len(whole)} {name} is left ({most.replace('_', ' ')}: {count[most]}); {remedies[most]}"


def statistics_of(found: Sequence[Candidate]) -> dict[str, Any]:
    """Rows, users and rows a user, and the token lengths of prompts and replies (the paper's tables 6, 8, 9)."""
    users = {one.row["user"] for one in found}
    sizes = {
        "prompt_tokens": [len(one.prompt) for one in found],
        "reply_tokens": [one.reply_tokens for one in found if one.reply_tokens],
    }
    return {
        "rows": len(found),
        "users": len(users),
        "rows_per_user": round(len(found) / max(1, len(users)), 2),
        **{name: clean.spread(values) for name, values in sizes.items() if values},
    }
