"""Order of the tests, the end of the grid's processes, the operators' device, the versions of torch to fetch."""

from __future__ import annotations

import pytest

from tests.helpers import grid


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/ops tests/gpu --device cuda` runs the operators' tests on a GPU; csrc/test_other_torch.py fetches
    the versions of torch that are named, and nothing by itself."""
    parser.addoption("--torch", action="append", metavar="VERSION", help="a torch to try the kernels under; repeatable")
    help_text = "where the tests of operators compute; without a GPU those of cuda are skipped"
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help=help_text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the same number of ranks run next to each other."""
    grid.in_grid_order(items)


def pytest_sessionfinish() -> None:
    """No rank outlives the session."""
    grid.close()
