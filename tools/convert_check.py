"""Whether two sides of a conversion compute the same: logits or scores of the same tokens, and what they greedily say.

One side is transformers', the other this project's network on one rank, filled tensor by tensor. Weights of the side
with more digits are rounded as the conversion rounded them; both compute in float32.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.batch import Prompts
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert.logical import Card, Source
from megatron_rlhf.convert.precision import DTYPES
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.models import transformer, vocabulary
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import cpu, grid

LARGEST = 1e-4
"""Largest difference of a logit allowed, as a share of the logits' spread: float32 sums in another order."""
_ROWS, _LENGTH, _NEW = 3, 24, 12

Readers = Mapping[str, Callable[[Path, str | None], Source]]


def possible(of: str, to: str) -> None:
    """Raises BadInput where there is nothing to compare with."""
    if "hf" not in (of, to):
        raise BadInput("--check compares with transformers, so one side must be hf; convert to hf to check it")
    if importlib.util.find_spec("transformers") is None:
        raise BadInput("--check needs transformers, which is not installed; pip install transformers")


def check(source: Path, of: str, target: Path, to: str, card: Card, readers: Readers) -> str:
    """What was compared and how close it is. Raises BadInput where the two differ."""
    theirs = source if of == "hf" else target
    ours, format = (target, to) if of == "hf" else (source, of)
    # first: where there is no GPU, what parallel/cpu.py puts in torch's place leaves buffers of transformers unset
    rival = _theirs(theirs, card)
    built = network(readers[format](ours, card.role), DTYPES[card.model.precision])
    generator = torch.Generator().manual_seed(1)
    length = min(_LENGTH, card.model.context // 2)
    tokens = torch.randint(0, card.model.vocabulary, (_ROWS, length), generator=generator)
    with torch.no_grad():
        mine, other = outputs(built, tokens), rival(tokens).logits.float()
    if card.role != "policy":
        # theirs is read at the last token and has no bias
        mine = mine[:, -1] - built.parameters["head.bias"].detach().cpu()
    spread = max(float(other.std()), 1e-6)
    apart = float((mine - other).abs().max())
    if not apart <= LARGEST * max(spread, float(other.abs().max())):
        raise BadInput(f"the two sides differ: logits of {theirs} and {ours} are up to {apart:g} apart")
    said = f"logits are within {apart:.1e} of each other, their spread is {spread:.2g}"
    return said if card.role != "policy" else f"{said}; {_generated(built, rival, tokens, card)}"


@torch.no_grad()
def network(source: Source, dtype: torch.dtype = torch.float32) -> Network:
    """The network of a source on this one rank in float32, its weights rounded to `dtype`."""
    cpu.install()
    grid.connect()
    model = dataclasses.replace(source.card.model, precision="fp32")
    place = grid.build(Layout.parse("tp1", 1))
    scalar = source.card.role != "policy"
    built = transformer.build(model, place, rows=model.vocabulary, seed=0, scalar=scalar, engine="never")
    for name, parameter in built.parameters.items():
        parameter.copy_(source.read(name).to(dtype))
    return built


def outputs(built: Network, tokens: Tensor) -> Tensor:
    """Logits [b, S, V] of a language model, or values [b, S, 1], in float32."""
    (stage,) = built.chunks
    stage.eval()
    device = next(stage.parameters()).device
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    hidden = stage(tokens.to(device), positions, attention_mask=None)
    return (hidden if built.scalar else vocabulary.logits(built, hidden)).float().cpu()


def _theirs(path: Path, card: Card) -> Any:
    import transformers

    kind = (
        transformers.AutoModelForCausalLM if card.role == "policy" else transformers.AutoModelForSequenceClassification
    )
    model = kind.from_pretrained(path, dtype=DTYPES[card.model.precision], trust_remote_code=False).float().eval()
    if card.role != "policy":
        model.config.pad_token_id = -1  # no token is padding here
    return model


def _generated(built: Network, rival: Any, tokens: Tensor, card: Card) -> str:
    """What both say greedily. Raises BadInput where they part although neither wavers between two tokens."""
    length = min(_NEW, card.model.context - tokens.shape[1])
    prompts = Prompts(tokens, torch.full((len(tokens),), tokens.shape[1]), torch.arange(len(tokens)))
    rollout = Generator(built, end=-1, rows=len(tokens)).sample(prompts, Draw(temperature=0.0), length)
    mine = rollout.rows.tokens_BT[:, tokens.shape[1] :].cpu()
    row = tokens
    for place in range(length):
        with torch.no_grad():
            logits = rival(row).logits[:, -1].float()
        best = logits.topk(2).values
        sure = best[:, 0] - best[:, 1] > LARGEST * logits.abs().max()
        token = logits.argmax(-1)
        if bool((sure & (token != mine[:, place])).any()):
            raise BadInput(f"the two sides differ: greedy generation parts at token {place}")
        row = torch.cat([row, mine[:, place : place + 1]], 1)
    return f"both say the same {length} tokens greedily to {len(tokens)} prompts"
