"""Which rows lie end to end in one longer row, and which micro-batches share a length. Pure integers: the same on every
rank."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Lines of at most `capacity` tokens that hold each row once, by first-fit decreasing; rows of no token are left
    out.

    At most 11/9 of the fewest lines and 6/9 (Dósa 2007). Equal rows keep their order. Raises ValueError for a row above
    the capacity.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"a row of {lengths[order[0]]} tokens does not fit a line of {capacity}")
    lines: list[list[int]] = []
    room: dict[int, int] = {}
    for row in order:
        line = next((line for line, left in room.items() if left >= lengths[row]), len(lines))
        if line == len(lines):
            lines.append([])
            room[line] = capacity
        lines[line].append(row)
        room[line] -= lengths[row]
        if room[line] < lengths[order[-1]]:  # full: full lines are not searched again
            del room[line]
    return lines


def groups(lengths: Sequence[int], most: int, step: int = 1) -> list[int]:
    """How many neighbouring micro-batches each of at most `most` groups holds, such that the fewest tokens pass when
    every group has the length of its longest member.

    `lengths` of the micro-batches, which have equal rows, falls. Exact, by dynamic programming over the places where
    the length falls; of equal answers the one with the fewest groups. All groups but the last are multiples of `step`.
    """
    end = len(lengths)
    cuts = [place for place in range(step, end, step) if lengths[place] < lengths[place - step]]
    # (tokens, groups, where they start) of the first micro-batches up to each cut
    best = {place: (place * lengths[0], 1, [0]) for place in [*cuts, end]}
    for _ in range(most - 1):
        best = {place: min([answer, *_split(best, cuts, lengths, place)]) for place, answer in best.items()}
    starts = best[end][2]
    return [stop - start for start, stop in zip(starts, [*starts[1:], end], strict=True)]


def _split(
    best: dict[int, tuple[int, int, list[int]]], cuts: list[int], lengths: Sequence[int], place: int
) -> list[tuple[int, int, list[int]]]:
    """The answers for the first micro-batches up to `place` whose last group starts at a cut before it."""
    found = []
    for cut in cuts:
        if cut < place:
            tokens, count, starts = best[cut]
            found.append((tokens + (place - cut) * lengths[cut], count + 1, [*starts, cut]))
    return found
