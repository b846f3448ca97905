"""Proves that our llama style computes what Llama of transformers computes from the same weights, tensor-, pipeline-
and sequence-parallel, with every scaling of the rotary positions: each logit of each word at each position.

Not proved here: converting published weights; tokenizers; decoding (tests/generate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.config.schema import Compute, Model, Rope
from megatron_rlhf.models.rope import attention_factor, frequencies
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid
from tests.helpers.logits import all_logits

MODEL = Model(
    layers=2,
    hidden=64,
    heads=8,
    kv_heads=4,
    ffn=96,
    vocabulary=100,
    context=64,
    style="llama",
    tied=False,
    norm_epsilon=1e-6,
)
ROPES = {
    "none": Rope(base=500.0),
    "linear": Rope(base=500.0, scaling="linear", factor=4.0),
    "llama3": Rope(base=500.0, scaling="llama3", factor=8.0, low=1.0, high=4.0, original_context=16),
    "yarn": Rope(base=500.0, scaling="yarn", factor=4.0, original_context=16),
}
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


def theirs(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of transformers."""
    known = {"rope_type": "default" if rope.scaling == "none" else rope.scaling, "rope_theta": rope.base}
    if rope.scaling != "none":
        known["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        known["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        known |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    return known


@pytest.fixture(scope="session", params=ROPES)
def llama(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A tiny random Llama: its weights by name, right-padded tokens with their lengths, and its logits in float64.

    Its weights are small but for the head's, so that float32 itself errs by a third of what the test allows: on a
    sharper network the logits of transformers' own float32 move by 2e-5 from one CPU to the next.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=MODEL.layers,
        num_attention_heads=MODEL.heads,
        num_key_value_heads=MODEL.kv_heads,
        hidden_size=MODEL.hidden,
        intermediate_size=MODEL.ffn,
        vocab_size=MODEL.vocabulary,
        max_position_embeddings=MODEL.context,
        rms_norm_eps=MODEL.norm_epsilon,
        rope_parameters=theirs(ROPES[request.param]),
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(2)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if name == "lm_head.weight" else 0.08
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(mean + torch.randn(parameter.shape, generator=generator) * spread)
        lengths = torch.randint(30, 60, (4,), generator=generator)
        tokens = torch.randint(1, MODEL.vocabulary, (4, int(lengths.max())), generator=generator)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rotary = model.model.rotary_emb
        inverse = rotary.inv_freq.clone()
        logits = model.double()(tokens, attention_mask=real.long()).logits.float()
    return {
        "rope": request.param,
        "weights": weights,
        "tokens": tokens.masked_fill(~real, 0),
        "lengths": lengths,
        "logits": logits,
        "frequencies": inverse,
        "factor": float(rotary.attention_scaling),
    }


def mapped(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Our full tensor `name` from Llama's weights."""
    if name in OUTER:
        return weights[OUTER[name]]
    _, _, number, inner = name.split(".", 3)
    layer = f"model.layers.{number}"
    if inner == "mlp.linear_fc1.weight":
        return torch.cat([weights[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    if inner == "self_attention.linear_qkv.weight":
        # ours: the queries of a group, its key, its value, group after group
        split = [
            weights[f"{layer}.self_attn.{part}_proj.weight"].reshape(MODEL.groups, -1, MODEL.hidden) for part in "qkv"
        ]
        return torch.cat(split, 1).reshape(-1, MODEL.hidden)
    return weights[f"{layer}.{LAYER[inner]}"]


@torch.no_grad()
def fill(network: Network, weights: Mapping[str, Tensor]) -> None:
    """Llama's weights into our slices; the padded words keep theirs."""
    grid = network.grid
    for name, parameter in network.parameters.items():
        full = mapped(weights, name)
        if full.shape[0] == MODEL.vocabulary:
            full = torch.cat([full, torch.ones(network.rows - len(full), full.shape[1])])
        parameter.copy_(network.directory[name].split.part(full, grid.layout.tp, grid.tp_rank))


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp2 dp2 sp"])
def test_every_logit_is_llamas(words: str, llama: dict[str, Any]) -> None:
    """At every real position of right-padded rows, to 1e-5 of the logits' spread."""
    built = tiny.network(words, replace(MODEL, rope=ROPES[llama["rope"]]))
    fill(built, llama["weights"])
    rows = Rows(llama["tokens"], torch.ones_like(llama["lengths"]), llama["lengths"])
    read = all_logits(rows.tokens_BT.shape[1], MODEL.vocabulary)
    found = Engine(built, read, Compute(forward_micro_batch=2)).forward(rows)
    real = torch.arange(found.shape[1]) < rows.lengths_B[:, None]
    expected = llama["logits"]
    assert float(expected[real].std()) > 1
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_frequencies_are_theirs(llama: dict[str, Any]) -> None:
    """The inverse frequencies and the factor on the attention logits of every scaling."""
    rope = ROPES[llama["rope"]]
    torch.testing.assert_close(frequencies(rope, MODEL.hidden // MODEL.heads), llama["frequencies"])
    assert attention_factor(rope) == pytest.approx(llama["factor"] ** 2)
    changed = frequencies(rope, 8) != frequencies(ROPES["none"], 8)
    assert bool(changed.any()) == (llama["rope"] != "none")
