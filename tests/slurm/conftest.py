"""A SLURM of two nodes on this machine for the tests of this folder; without its programs they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.slurm import Slurm, cluster, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running cluster; at the end nothing of it is left, or the last test fails."""
    if names := missing():
        pytest.skip(f"{', '.join(names)} not found: install slurmctld, slurmd, slurm-client and munge")
    with cluster() as running:
        yield running
