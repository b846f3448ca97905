"""Tiny checkpoints for conversion tests: cards, random tensors of their shapes, a tokenizer, and pickles that bite."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert import megatron
from megatron_rlhf.convert.logical import Card, Source

GPT = Model(layers=4, hidden=32, heads=4, vocabulary=101, context=64)
LLAMA = replace(GPT, style="llama", heads=8, kv_heads=4, ffn=64, tied=False)
NEOX = replace(GPT, style="neox", tied=False, rope=Rope(base=500.0, fraction=0.5))


def tensors(card: Card, seed: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of the card, filled with noise."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in card.shapes().items()}


def stream(found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, as a writer gets them."""
    yield from found.items()


def interrupted(found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Three of the tensors; then reading fails with an OSError, planted."""
    yield from list(found.items())[:3]
    raise OSError("planted")


def everything(source: Source) -> dict[str, Tensor]:
    """What a source holds, after the checks that a conversion makes; AssertionError where it would be refused."""
    assert source.missing() == []
    assert source.leftover() == []
    return {name: source.read(name) for name in source.card.shapes()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes and every bit are equal."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def refused(call: Any, *arguments: Any, **named: Any) -> str:
    """The one sentence with which the call is refused."""
    try:
        call(*arguments, **named)
    except BadInput as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 600, said
        return said
    raise AssertionError("it was not refused")


def pieces(tokens: int = 64) -> bytes:
    """A SentencePiece model of about so many tokens."""
    model = io.BytesIO()
    text = iter(["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_writer=model,
        vocab_size=tokens,
        model_type="bpe",
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def old_name(name: str) -> str:
    """A name as Megatron-LM before Megatron-Core's models has it."""
    for ours, theirs in (
        ("decoder.final_layernorm", "encoder.final_norm"),
        ("decoder.layers", "encoder.layers"),
        ("input_layernorm", "input_norm"),
        ("pre_mlp_layernorm", "post_attention_norm"),
        ("self_attention.linear_qkv", "self_attention.query_key_value"),
        ("self_attention.linear_proj", "self_attention.dense"),
        ("mlp.linear_fc1", "mlp.dense_h_to_4h"),
        ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
    ):
        name = name.replace(ours, theirs)
    return name


class Bite:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.victim}",)


def megatron_folder(folder: Path, card: Card, found: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A checkpoint of ours; the folder that Megatron-Core would be given."""
    megatron.write(folder, card, stream(found), next(iter(found.values())).dtype, **settings)
    return folder / "release"
