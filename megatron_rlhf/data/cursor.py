"""The resumable place in a data order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput

EPOCHS = 1_000_003
"""Seeds of neighbouring runs share no permutation within this many epochs."""


class Cursor:
    """An endless order of `size` elements: epoch e is a permutation drawn from (`seed`, e), one after the other."""

    def __init__(self, size: int, seed: int) -> None:
        """Stands before the first element of epoch 0; BadInput if there is no element."""
        if size < 1:
            raise BadInput(f"an order of {size} elements has nothing to take; give at least 1")
        self._size, self._seed = size, seed
        self._epoch, self._place = 0, 0
        self._order = self._permutation()

    def take(self, number: int) -> Tensor:
        """The next `number` indices, int64; each element comes once an epoch.

        Modifies: the cursor, which then stands behind them.
        """
        parts = []
        while number > 0:
            if self._place == self._size:
                self._epoch, self._place = self._epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self._place : self._place + number]
            self._place += len(part)
            number -= len(part)
            parts.append(part)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def state(self) -> dict[str, int]:
        """All that `restore` needs."""
        return {"size": self._size, "seed": self._seed, "epoch": self._epoch, "place": self._place}

    def restore(self, state: Mapping[str, int]) -> None:
        """Stands where `state` was taken; BadInput if that was an order of another size or seed."""
        for name, mine in (("size", self._size), ("seed", self._seed)):
            if state[name] != mine:
                raise BadInput(
                    f"the saved data order has {name} {state[name]}, this one {mine}; "
                    f"go on with the data and the seed of the saved run, or start in a new folder (out=...)"
                )
        self._epoch, self._place = state["epoch"], state["place"]
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * EPOCHS + self._epoch)
        return torch.randperm(self._size, generator=generator)


class Resumable:
    """A data set read in the order of a cursor; what it owes to saving and resuming."""

    def __init__(self, size: int, seed: int) -> None:
        """Stands before the first of `size` elements."""
        self._size = size
        self._cursor = Cursor(size, seed)

    def __len__(self) -> int:
        """The number of elements of one epoch."""
        return self._size

    def state(self) -> dict[str, int]:
        """The place in the order."""
        return self._cursor.state()

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on from `state`; BadInput if it belongs to other data or another seed."""
        self._cursor.restore(state)
