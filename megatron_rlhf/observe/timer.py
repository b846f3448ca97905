"""Wall seconds by name, for `seconds_by_phase` and the timeline of a run, and a rank's own: not spent waiting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _never() -> float:
    return 0.0


def _nobody(name: str) -> None:
    return None


class Timer:
    """Adds up the seconds spent inside `with timer("name"):`; host time, a device's queue is not waited for.

    A name entered again adds to its sum, one entered inside itself counts once, one left by an exception counts too.
    """

    def __init__(self, waited: Callable[[], float] = _never, entered: Callable[[str], None] = _nobody) -> None:
        """No seconds yet. `waited` says how long this process has waited for others since it started; `entered` is told
        of every name that is entered from outside itself."""
        self.seconds: dict[str, float] = {}
        self.own: dict[str, float] = {}
        """Seconds by name without what was spent waiting for other ranks."""
        self._depth: Counter[str] = Counter()
        self._waited, self._entered = waited, entered

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block under `name`."""
        self._depth[name] += 1
        if self._depth[name] == 1:
            self._entered(name)
        start, before = time.perf_counter(), self._waited()
        try:
            yield
        finally:
            self._depth[name] -= 1
            if not self._depth[name]:
                passed = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + passed
                self.own[name] = self.own.get(name, 0.0) + max(0.0, passed - self._waited() + before)

    def take(self) -> dict[str, float]:
        """The seconds by name since the last take; a block still open is counted by the take after it ends."""
        taken, self.seconds = self.seconds, {}
        return taken

    def take_own(self) -> dict[str, float]:
        """This process's own seconds by name since the last call."""
        taken, self.own = self.own, {}
        return taken
