"""`path`: a test runs on the compiled kernels and on their Python reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_rlhf.ops import library


@pytest.fixture(params=["kernels", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        with library.references():
            yield request.param
    elif library.loaded():
        yield request.param
    else:
        pytest.skip(library.WHY_NOT)


@pytest.fixture
def kernels() -> None:
    if not library.loaded():
        pytest.skip(library.WHY_NOT)
