"""Layout words, `tp2 pp2 dp1`: the degrees of one role's grid and the ranks it spans. Pure, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

ORDERS = ("tp-dp-pp", "tp-pp-dp")
PLANNED = "planned"
"""What the order of a layout with `places` is printed as."""
_WORD = re.compile(r"^(?:(tp|pp|dp|vp)(\d+)|(sp)|@(\d+)-(\d+)|order=([a-z-]+))$")


class LayoutError(ValueError):
    """Layout words that cannot be read or do not match the world."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees an axis (`tp`, `pp`, `dp`), virtual stages `vp`, sequence parallelism `sp`, first rank, rank order, and
    whether the world has other ranks beside it (`partial`).

    `places`, where it is not empty, is the world rank of every slot in the order tp-dp-pp and stands in for `order`.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vp: int = 1
    sp: bool = False
    first: int = 0
    order: str = "tp-dp-pp"
    partial: bool = False
    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises LayoutError unless `places` deals every rank of the grid once."""
        if self.places and sorted(self.places) != list(range(self.first, self.first + self.size)):
            raise LayoutError(f"the places of '{self}' must be each of its {self.size} ranks once")

    @classmethod
    def parse(cls, words: str, world: int) -> Layout:
        """The layout that `words` name in a world of `world` ranks; a missing dp fills the ranks that are left.

        Raises LayoutError with one sentence when a word is unknown or the ranks do not match.
        """
        degrees: dict[str, int] = {}
        sp, span, order = False, None, ORDERS[0]
        for word in words.split():
            match = _WORD.match(word)
            if not match:
                raise LayoutError(f"layout word '{word}' in '{words}' is unknown; write for example 'tp2 pp2 dp1 sp'")
            axis, degree, sequence, start, end, wanted = match.groups()
            if axis:
                if int(degree) < 1:
                    raise LayoutError(f"layout word '{word}' in '{words}' must be at least {axis}1")
                degrees[axis] = int(degree)
            elif sequence:
                sp = True
            elif start is not None:
                span = (int(start), int(end))
            elif wanted in ORDERS:
                order = wanted
            elif wanted == PLANNED:
                raise LayoutError(
                    f"'order={PLANNED}' in '{words}' is what a planned layout is printed as and cannot be asked for; "
                    f"leave it out, or write order={ORDERS[0]}"
                )
            else:
                raise LayoutError(f"rank order '{wanted}' in '{words}' is unknown; write one of {', '.join(ORDERS)}")
        first, ranks = (span[0], span[1] - span[0] + 1) if span else (0, world)
        if first + ranks > world or ranks < 1:
            raise LayoutError(f"'{words}' spans ranks {first}-{first + ranks - 1}, the world has {world}")
        tp, pp = degrees.get("tp", 1), degrees.get("pp", 1)
        dp = degrees.get("dp", max(1, ranks // (tp * pp)))
        layout = cls(tp, pp, dp, degrees.get("vp", 1), sp, first, order, ranks < world)
        if layout.size != ranks:
            where = f"the range @{span[0]}-{span[1]}" if span else "the world"
            raise LayoutError(f"tp{tp} pp{pp} dp{dp} is {layout.size} ranks, {where} has {ranks}")
        return layout

    @property
    def size(self) -> int:
        """Ranks in the grid."""
        return self.tp * self.pp * self.dp

    def rank(self, tp: int, pp: int, dp: int) -> int:
        """The world rank at a coordinate."""
        if self.places:
            return self.places[tp + self.tp * (dp + self.dp * pp)]
        if self.order == "tp-dp-pp":
            return self.first + tp + self.tp * (dp + self.dp * pp)
        return self.first + tp + self.tp * (pp + self.pp * dp)

    def coordinate(self, rank: int) -> tuple[int, int, int] | None:
        """(tp, pp, dp) of a world rank, None outside the grid."""
        place = rank - self.first
        if not 0 <= place < self.size:
            return None
        if self.places:
            place = self.places.index(rank)
        tp, rest = place % self.tp, place // self.tp
        if self.places or self.order == "tp-dp-pp":
            return tp, rest // self.dp, rest % self.dp
        return tp, rest % self.pp, rest // self.pp

    def __str__(self) -> str:
        """The words again, in the order every log prints them."""
        words = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}"]
        words += [f"vp{self.vp}"] if self.vp > 1 else []
        words += ["sp"] if self.sp else []
        words += [f"@{self.first}-{self.first + self.size - 1}"] if self.partial else []
        order = PLANNED if self.places else self.order
        words += [f"order={order}"] if order != ORDERS[0] else []
        return " ".join(words)
