"""How many ranks the layouts of a run ask for. Pure, no torch."""

from __future__ import annotations

import math
import re
from dataclasses import astuple

from megatron_rlhf.config.schema import Layouts

_DEGREE = re.compile(r"^(?:tp|pp|dp)(\d+)$")
_SPAN = re.compile(r"^@\d+-(\d+)$")


def needed(layouts: Layouts) -> int:
    """The ranks of the largest role: what its degrees multiply to, or the end of its range of ranks."""
    return max(ranks(words) for words in astuple(layouts))


def ranks(words: str) -> int:
    """What the degrees of `words` multiply to, or the end of its range of ranks."""
    spans = [int(match[1]) + 1 for word in words.split() if (match := _SPAN.match(word))]
    degrees = [int(match[1]) for word in words.split() if (match := _DEGREE.match(word))]
    return max(1, *spans, math.prod(degrees))
