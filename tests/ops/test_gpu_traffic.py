"""Proves, without a GPU, that what is computed for tensors of a device other than the CPU stays there and never waits
for it, forward and backward, by kernels and references: their fakes, followed on a device that is none.

Not proved here: any number; log-probs straight from hidden states, which wait once: how many rows have a target?
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made in Python",
)
def test_nothing_leaves_the_device_and_nothing_waits() -> None:
    """In a process of its own: the device stays for as long as a process lives."""
    command = [sys.executable, "-m", "tests.helpers.fake_gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing waited" in done.stdout
