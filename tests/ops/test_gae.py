"""Proves that the scan of advantages, kernel and reference alike, is algorithms/gae.py.

Not proved here: CUDA, and what an advantage should be (tests/algorithms/test_gae.py).
"""

from __future__ import annotations

import pytest
import torch

from megatron_rlhf.algorithms import gae as oracle
from megatron_rlhf.ops import gae


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (64, 300), (0, 5)])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (1.0, 0.0)])
def test_the_scan_is_the_oracle(path: str, rows: int, width: int, gamma: float, lam: float) -> None:
    """Responses of all lengths, NaN values behind their ends."""
    source = torch.Generator().manual_seed(rows)
    rewards, values = torch.randn(2, rows, width, generator=source)
    mask = (torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=source)).float()
    values[mask == 0] = torch.nan
    found = gae.advantages(rewards, values, mask, gamma=gamma, lam=lam)
    wanted = oracle.advantages(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not found[0][mask == 0].any() and not found[1][mask == 0].any()


def test_threads_and_strides_change_nothing(kernels: None) -> None:
    rewards, values = torch.randn(2, 500, 40).unbind(0)
    mask = (torch.rand(500, 40) > 0.3).float()
    whole = gae.advantages(rewards, values, mask, gamma=0.9, lam=0.9)
    turned = [x.t().contiguous().t() for x in (rewards, values, mask)]
    again = gae.advantages(*turned, gamma=0.9, lam=0.9)
    row = gae.advantages(rewards[:1], values[:1], mask[:1], gamma=0.9, lam=0.9)
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(row[0], whole[0][:1])


def test_opcheck(kernels: None) -> None:
    rewards, values = torch.randn(2, 5, 9).unbind(0)
    torch.library.opcheck(torch.ops.megatron_rlhf.gae, (rewards, values, torch.ones(5, 9), 1.0, 0.95))
    with pytest.raises(RuntimeError):
        torch.ops.megatron_rlhf.gae(rewards, values[:4], torch.ones(5, 9), 1.0, 0.95)
