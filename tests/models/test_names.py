"""Proves that a tensor has one name and one way to be cut, whatever modules and layout hold it.

Not proved here: moving tensors between layouts (tests/reshard).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rlhf.models import names
from megatron_rlhf.models.names import Split


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_parts_join_to_the_whole(tp: int, dim: int, blocks: int) -> None:
    """Cut for one tp and joined, it is what it was, whatever the other tp."""
    whole = torch.arange(16.0 * 8).view(16, 8)
    split = Split(dim, blocks)
    parts = [split.part(whole, tp, place) for place in range(tp)]
    assert all(split.whole_shape(part.shape, tp) == whole.shape for part in parts)
    assert torch.equal(split.join(parts), whole)


def test_each_block_is_cut_for_itself() -> None:
    """A shard of gate and up is a part of the gate and the same part of the up."""
    gate, up = torch.zeros(4, 2), torch.ones(4, 2)
    part = Split(0, 2).part(torch.cat([gate, up]), 2, 1)
    assert part[:2].eq(0).all() and part[2:].eq(1).all()
    assert Split(None).part(gate, 2, 1) is gate


def test_transformer_engines_fused_norms_have_our_names() -> None:
    """It keeps a norm in the projection behind it; the name says what it is, with the layer's number of the model."""
    weights = torch.nn.Parameter(torch.zeros(2))
    inner = (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
        ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
    )
    chunk = SimpleNamespace(
        decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=7)]),
        share_embeddings_and_output_weights=False,
        named_parameters=lambda: [(f"decoder.layers.0.{theirs}", weights) for theirs, _ in inner],
    )
    assert list(names.local([chunk])) == [f"decoder.layers.6.{ours}" for _, ours in inner]  # type: ignore[list-item]
