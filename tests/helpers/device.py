"""`device`: where the tests of operators compute, by `pytest --device cpu|cuda`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen = str(request.config.getoption("--device"))
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return chosen


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """The same bits on a CPU; on a GPU rows that lie otherwise are summed in another order, so rounding may differ."""
    if found.device.type == "cpu":
        assert torch.equal(found, wanted)
    else:
        eps = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found, wanted, rtol=max(2e-6, eps), atol=1e-7, equal_nan=True)
