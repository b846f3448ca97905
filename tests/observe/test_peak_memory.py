"""The peak is in bytes and follows what the process holds.

Not proved here: the device's peak on CUDA, but for which counter is read.
"""

import resource
import sys

import pytest
import torch

from megatron_rlhf.observe.memory import peak_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="resident memory is reported where there is no CUDA device")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_bytes_on_cpu() -> None:
    before = peak_bytes()
    pages = int(open("/proc/self/statm").read().split()[1])  # noqa: SIM115
    assert before >= 0.9 * pages * resource.getpagesize()
    held = torch.ones(before // 4 + 2**26)
    assert peak_bytes() >= before + held.nbytes // 2
    assert peak_bytes() < 2**44


def test_the_device_counter_is_read_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    assert peak_bytes() == 12345
