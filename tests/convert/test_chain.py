"""Proves that weights come back to the bit through every format one after the other.

Not proved here: each format's own reader against others' programs (its own test file).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import huggingface, megatron, nemo, run, weights
from megatron_rlhf.convert.logical import Card
from tests.helpers import checkpoints as tiny

GPT, LLAMA, NEOX = tiny.GPT, tiny.LLAMA, tiny.NEOX


@pytest.mark.parametrize(
    ("model", "role"),
    [
        (GPT, "policy"),
        (replace(GPT, tied=True), "reward"),
        (replace(GPT, activation="gelu_tanh"), "policy"),
        (LLAMA, "policy"),
        (replace(LLAMA, qkv_bias=True), "policy"),
        (replace(LLAMA, linear_bias=True, head_dim=6), "policy"),
        (replace(LLAMA, tied=True), "policy"),
        (NEOX, "policy"),
        (replace(NEOX, tied=True, activation="gelu_tanh"), "value"),
        (LLAMA, "value"),
    ],
)
def test_a_chain_through_every_format_comes_back_to_the_bit(model: Model, role: str, tmp_path: Path) -> None:
    """Hugging Face, Megatron (tp2 pp2), NeMo, a folder of weights, Megatron, Hugging Face: an odd vocabulary, two
    shards, a head, every tensor bit for bit and the two config.json alike."""
    card = Card(replace(model, ffn=64 if model.gated else 128), role)
    expected = tiny.tensors(card)
    hf, last = tmp_path / "0", tmp_path / "5"
    huggingface.write(hf, card, tiny.stream(expected), torch.float32)
    asked = role if role == "value" else None
    chain = [
        (huggingface.open_source, partial(megatron.write, layout="tp2 pp2")),
        (megatron.open_source, nemo.write),
        (nemo.open_source, weights.write),
        (weights.open_source, megatron.write),
        (megatron.open_source, huggingface.write),
    ]
    for place, (reader, writer) in enumerate(chain):
        run.convert(reader(tmp_path / str(place), asked), writer, tmp_path / str(place + 1), quiet=True)
    assert tiny.same(tiny.everything(huggingface.open_source(last, asked)), expected)
    assert (last / "config.json").read_text() == (hf / "config.json").read_text()
