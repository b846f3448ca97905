"""Files of `torch.save` that hold a flat dict of tensors, read through a map and without running what they pickle."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import torch_file


class PickledFile:
    """The tensors of one file by name.

    The file is mapped anew for every tensor: pages of a tensor that was read leave memory with its map.
    """

    def __init__(self, path: Path) -> None:
        """Reads the names. Raises BadInput where the file holds anything but a dict of dense tensors."""
        self.path = path
        self.tensors = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._load().items()}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped; it must be dropped before the next one is read."""
        return self._load()[name]

    def _load(self) -> dict[str, Tensor]:
        try:
            found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError,
                OSError, MemoryError, OverflowError, AssertionError, NotImplementedError) as error:  # fmt: skip
            raise BadInput(
                f"{self.path} is no file of weights that torch.load(weights_only=True, mmap=True) reads "
                f"({_first(error)}); save it again with torch.save, or as safetensors"
            ) from error
        if not isinstance(found, dict):
            raise BadInput(f"{self.path} holds no dict of tensors")
        for name, tensor in found.items():
            if not isinstance(name, str) or not torch_file.dense(tensor):
                raise BadInput(f"{self.path}: {str(name)[:80]!r} is no dense tensor with all its data in the file")
        return found


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
