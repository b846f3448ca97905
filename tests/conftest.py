"""Order of the tests, the end of the grid's processes, and the versions of torch to fetch."""

from __future__ import annotations

import pytest

from tests.helpers import grid


def pytest_addoption(parser: pytest.Parser) -> None:
    """csrc/test_other_torch.py fetches what is named, and nothing by itself."""
    parser.addoption("--torch", action="append", metavar="VERSION", help="a torch to try the kernels under; repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the same number of ranks run next to each other."""
    grid.in_grid_order(items)


def pytest_sessionfinish() -> None:
    """No rank outlives the session."""
    grid.close()
