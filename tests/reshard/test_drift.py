"""Proves that the layer whose weights or inputs differ between the two networks is the one that is named, in every kind
of layout, and the quantiles of what was drawn against what training computes.

Not proved here: differences that only decoding through the cache makes, which running whole rows does not show.
"""

from __future__ import annotations

import pytest
import torch

from megatron_rlhf.models import names
from megatron_rlhf.reshard import drift
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


@on_grid(4)
@pytest.mark.parametrize(
    ("train", "generate"),
    [("tp2 dp2 sp", "pp2 dp2"), ("pp2 @2-3", "dp4"), pytest.param("pp2 vp2 tp2", "tp4", marks=pytest.mark.slow)],
)
def test_the_first_layer_that_differs_is_named(train: str, generate: str) -> None:
    """Equal networks agree; then one is changed from its end to its start, and each time the new place is named."""
    policy, network = tiny.engine(train), tiny.network(generate)
    rows = tiny.rows(3)
    assert "every layer's output agrees on whole rows" in drift.bisect(policy, network, rows)
    before = policy.forward(rows)
    for place, name in (
        ("layer 3", "decoder.layers.3.mlp.linear_fc2.bias"),
        ("layer 1", "decoder.layers.1.self_attention.linear_proj.weight"),
        ("the embedding", names.EMBEDDING),
    ):
        if name in network.parameters:
            torch.nn.init.constant_(network.parameters[name], 0.3)
        assert drift.bisect(policy, network, rows).startswith(f"{place} is the first whose output differs, by ")
    assert torch.equal(policy.forward(rows), before), "hooks are gone and weights are as they were"


@on_grid(4)
def test_outputs_are_those_of_one_rank() -> None:
    """Shards of the sequence, stages and replicas put together are what one rank computes."""
    row = tiny.rows(1)
    expected_LKh = drift.outputs(tiny.engine(tiny.ONE), row)
    assert expected_LKh.shape == (5, 16, 32)
    assert all(place_Kh.abs().max() > 0.1 for place_Kh in expected_LKh)
    for words in ("tp2 dp2 sp", "pp2 vp2 tp2", "tp2 @1-2"):
        torch.testing.assert_close(drift.outputs(tiny.engine(words), row), expected_LKh, rtol=0, atol=1e-4)


def test_quantiles_leave_padding_out() -> None:
    apart_BR = torch.arange(102.0).flip(0).view(2, 51)
    mask_BR = torch.ones(2, 51)
    mask_BR[0, 0] = 0
    found = drift.quantiles(apart_BR, mask_BR)
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert drift.quantiles(apart_BR, 0 * mask_BR) == {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
