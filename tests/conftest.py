"""Order of the tests and the end of the grid's processes."""

from __future__ import annotations

import pytest

from tests.helpers import grid


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the same number of ranks run next to each other."""
    grid.in_grid_order(items)


def pytest_sessionfinish() -> None:
    """No rank outlives the session."""
    grid.close()
