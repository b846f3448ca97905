"""A stop signal whose moment a test chooses, in the place of `session.Stop`."""

from __future__ import annotations

from megatron_rlhf.parallel.collectives import any_rank


class Signals:
    """A signal that comes before a run asks for the `at`-th time; 0 never."""

    def __init__(self, at: int = 0) -> None:
        self.left = at

    def over(self) -> None:
        """Nothing to take away."""

    def requested(self) -> bool:
        """Whether it has come. Collective: world."""
        self.left -= 1
        return any_rank(self.left == 0)
