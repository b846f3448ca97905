"""Proves that our network computes what GPT-2 of transformers computes from the same weights, tensor- and
pipeline-parallel: every logit of every word at every position, with the tanh approximation of GELU that GPT-2 was
trained with and with the exact one.

Not proved here: converting published weights; tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.config.schema import Compute, Model
from megatron_rlhf.models import roles
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid
from tests.helpers.logits import all_logits

MODEL = Model(layers=2, hidden=64, heads=4, vocabulary=100, context=32)
LAYER = {
    "input_layernorm.weight": "ln_1.weight",
    "input_layernorm.bias": "ln_1.bias",
    "self_attention.linear_qkv.weight": "attn.c_attn.weight",
    "self_attention.linear_qkv.bias": "attn.c_attn.bias",
    "self_attention.linear_proj.weight": "attn.c_proj.weight",
    "self_attention.linear_proj.bias": "attn.c_proj.bias",
    "pre_mlp_layernorm.weight": "ln_2.weight",
    "pre_mlp_layernorm.bias": "ln_2.bias",
    "mlp.linear_fc1.weight": "mlp.c_fc.weight",
    "mlp.linear_fc1.bias": "mlp.c_fc.bias",
    "mlp.linear_fc2.weight": "mlp.c_proj.weight",
    "mlp.linear_fc2.bias": "mlp.c_proj.bias",
}
OUTER = {
    "embedding.word_embeddings.weight": "wte.weight",
    "embedding.position_embeddings.weight": "wpe.weight",
    "decoder.final_layernorm.weight": "ln_f.weight",
    "decoder.final_layernorm.bias": "ln_f.bias",
}


def mapped(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Our full tensor `name` from GPT-2's weights."""
    if name in OUTER:
        return weights[f"transformer.{OUTER[name]}"]
    _, _, number, inner = name.split(".", 3)
    theirs = weights[f"transformer.h.{number}.{LAYER[inner]}"]
    if inner.endswith("weight") and "layernorm" not in inner:
        theirs = theirs.T  # their Conv1D is [in, out]
    if "linear_qkv" in inner:
        # theirs: all queries, all keys, all values; ours: query, key, value of one head after the other
        split = theirs.reshape(3, MODEL.heads, MODEL.hidden // MODEL.heads, *theirs.shape[1:])
        theirs = split.transpose(0, 1).reshape(theirs.shape)
    return theirs


@torch.no_grad()
def fill(network: Network, weights: Mapping[str, Tensor]) -> None:
    """GPT-2's weights into our slices; the padded words keep theirs."""
    grid = network.grid
    for name, parameter in network.parameters.items():
        full = mapped(weights, name)
        if name == "embedding.word_embeddings.weight":
            full = torch.cat([full, torch.ones(network.rows - len(full), full.shape[1])])
        parameter.copy_(network.directory[name].split.part(full, grid.layout.tp, grid.tp_rank))


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp2 pp2 sp", "tp4"])
def test_every_logit_is_gpt2s(words: str, gpt2: dict[str, Any]) -> None:
    """At every real position of right-padded rows, to 1e-5."""
    built = tiny.network(words, replace(MODEL, activation=gpt2["activation"]))
    fill(built, gpt2["weights"])
    rows = Rows(gpt2["tokens"], torch.ones_like(gpt2["lengths"]), gpt2["lengths"])
    read = all_logits(rows.tokens_BT.shape[1], MODEL.vocabulary)
    found = Engine(built, read, Compute(forward_micro_batch=2)).forward(rows)
    real = torch.arange(found.shape[1]) < rows.lengths_B[:, None]
    expected = gpt2["logits"]
    assert float(expected[real].std()) > 1
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    logprobs = Engine(built, roles.logprobs(), Compute(forward_micro_batch=2)).forward(rows)
    theirs = expected.log_softmax(-1)[:, :-1].gather(2, rows.tokens_BT[:, 1:, None]).squeeze(2)
    mask = rows.response_mask_BR(rows.width)
    torch.testing.assert_close(logprobs, theirs * mask, rtol=1e-5, atol=1e-5)


def test_no_weight_is_left_over(gpt2: dict[str, Any]) -> None:
    """The mapping reads every tensor of GPT-2 but the tied head."""
    read = {f"transformer.{name}" for name in OUTER.values()}
    read |= {f"transformer.h.{number}.{name}" for number in range(MODEL.layers) for name in LAYER.values()}
    assert set(gpt2["weights"]) - read == {"lm_head.weight"}
