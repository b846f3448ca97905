"""Proves that the scan of advantages, kernel and reference alike, is algorithms/gae.py.

Not proved here: what an advantage should be (tests/algorithms/test_gae.py).
"""

from __future__ import annotations

import pytest
import torch

from megatron_rlhf.algorithms import gae as oracle
from megatron_rlhf.ops import gae
from tests.helpers.device import assert_same


@pytest.mark.sanitized
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (64, 300), (0, 5), (9, 33)])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (1.0, 0.0)])
def test_the_scan_is_the_oracle(path: str, device: str, rows: int, width: int, gamma: float, lam: float) -> None:
    """Responses of all lengths, NaN values behind their ends."""
    source = torch.Generator().manual_seed(rows)
    rewards, values = torch.randn(2, rows, width, generator=source)
    mask = (torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=source)).float()
    values[mask == 0] = torch.nan
    given = [x.to(device) for x in (rewards, values, mask)]
    found = [x.cpu() for x in gae.advantages(*given, gamma=gamma, lam=lam)]
    wanted = oracle.advantages(rewards, values, mask, gamma=gamma, lam=lam)
    # a GPU adds in another order
    torch.testing.assert_close(found, list(wanted), rtol=1e-6, atol=1e-5 if device == "cuda" else 1e-6)
    assert not found[0][mask == 0].any() and not found[1][mask == 0].any()


@pytest.mark.sanitized
def test_no_positions(path: str, device: str) -> None:
    nothing = torch.empty(5, 0, device=device)
    found = gae.advantages(nothing, nothing, nothing, gamma=1.0, lam=0.95)
    assert [x.shape for x in found] == [(5, 0)] * 2


def test_threads_and_strides_change_nothing(kernels: None, device: str) -> None:
    source = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 500, 40, generator=source).to(device).unbind(0)
    mask = (torch.rand(500, 40, generator=source) > 0.3).float().to(device)
    whole = gae.advantages(rewards, values, mask, gamma=0.9, lam=0.9)
    turned = [x.t().contiguous().t() for x in (rewards, values, mask)]
    again = gae.advantages(*turned, gamma=0.9, lam=0.9)
    row = gae.advantages(rewards[:1], values[:1], mask[:1], gamma=0.9, lam=0.9)
    assert_same(torch.stack(again), torch.stack(whole))
    assert torch.equal(row[0], whole[0][:1])


def test_opcheck(kernels: None, device: str) -> None:
    rewards, values = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).to(device).unbind(0)
    mask = torch.ones(5, 9, device=device)
    torch.library.opcheck(torch.ops.megatron_rlhf.gae, (rewards, values, mask, 1.0, 0.95))
    with pytest.raises(RuntimeError):
        torch.ops.megatron_rlhf.gae(rewards, values[:4], mask, 1.0, 0.95)
