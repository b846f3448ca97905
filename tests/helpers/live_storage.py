"""Bytes of live tensors: those that exist, by walking, and the most that an operation ever saw alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage behind the tensors, once, by address; empty ones are left out."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return {place: size for place, size in found.items() if size}


class Live(TorchDispatchMode):
    """Counts the storages that operations make inside `with Live(there) as live`, until their last tensor is gone.

    `peak` is the most bytes alive together. Storages of the tensors `there` do not count, and what a kernel allocates
    and frees inside itself is not seen.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        """Nothing has been made yet."""
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        self._there = set(storages(there))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or storage.data_ptr() in self._there:
            return
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)
