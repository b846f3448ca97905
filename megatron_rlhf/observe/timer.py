"""Wall seconds by name, for `seconds_by_phase` and the timeline of a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timer:
    """Adds up the seconds spent inside `with timer("name"):`; host time, a device's queue is not waited for.

    A name entered again adds to its sum, one entered inside itself counts once, one left by an exception counts too.
    """

    def __init__(self, entered: Callable[[str], None] | None = None) -> None:
        """No seconds yet; `entered` hears each name that is entered."""
        self.seconds: dict[str, float] = {}
        self._entered = entered
        self._depth: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block under `name`."""
        self._depth[name] += 1
        if self._entered is not None:
            self._entered(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._depth[name] -= 1
            if not self._depth[name]:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds by name since the last take; a block still open is counted by the take after it ends."""
        taken, self.seconds = self.seconds, {}
        return taken
