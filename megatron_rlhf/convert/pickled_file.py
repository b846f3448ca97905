"""Files of `torch.save` that hold a flat dict of tensors, read through a map and without running what they pickle."""

from __future__ import annotations

from pathlib import Path

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
        found = torch_file.load(self.path)
        if not isinstance(found, dict):
            raise BadInput(f"{self.path} holds no dict of tensors")
        for name, tensor in found.items():
            if not isinstance(name, str) or not torch_file.dense(tensor):
                raise BadInput(f"{self.path}: {str(name)[:80]!r} is no dense tensor with all its data in the file")
        return found
