"""What one row of a rankings file must hold; no torch."""

from __future__ import annotations

from typing import Any

from megatron_rlhf.config.rules import BadInput

FIELDS = ("prompt", "responses", "ranks")
MOST = 1 << 20
"""The largest rank."""


def check(row: dict[str, Any], where: str) -> None:
    """Raises BadInput for one response, ranks that do not fit, and a response without any token."""
    responses, ranks = row["responses"], row["ranks"]
    ended = row.get("ended", [True] * len(responses))
    if len(responses) < 2:
        raise BadInput(
            f"{where} has {len(responses)} response; a comparison needs at least 2, write a second one or drop the line"
        )
    if not all(isinstance(text, str) for text in responses):
        raise BadInput(f'{where}: a response is not text; write "responses": ["one", "another"]')
    if len(ranks) != len(responses):
        raise BadInput(f"{where} has {len(responses)} responses and {len(ranks)} ranks; give one rank a response")
    if not all(type(rank) is int and 1 <= rank <= MOST for rank in ranks):
        raise BadInput(f"{where} has ranks {str(ranks)[:200]}; write whole numbers from 1, the best (equal: a tie)")
    if not isinstance(ended, list) or len(ended) != len(responses) or not all(type(end) is bool for end in ended):
        raise BadInput(f'{where}: "ended" is {ended}; write true or false for each of the {len(responses)} responses')
    if any(not text and not end for text, end in zip(responses, ended, strict=True)):
        raise BadInput(f"{where} has a response without any token; drop it or let it be ended")
