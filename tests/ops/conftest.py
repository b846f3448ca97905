"""`path`: a test runs on the compiled kernels and on their Python reference; `device`: pytest --device cpu|cuda."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_rlhf.ops import library
from tests.helpers.device import device

__all__ = ["device"]


@pytest.fixture(params=["kernels", "reference"])
def path(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    if request.param == "reference":
        with library.references():
            yield request.param
    else:
        _need_kernels(device)
        yield request.param


@pytest.fixture
def kernels(device: str) -> None:
    _need_kernels(device)


def _need_kernels(device: str) -> None:
    if not library.serves(torch.zeros(1, 1, device=device)):
        pytest.skip(library.WHY_NOT or f"the kernels were built without {device.upper()}")
