"""The other implementation: a tiny random GPT-2 of transformers, run here and not on the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", params=["gelu", "gelu_new"])
def gpt2(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Its weights by name, right-padded tokens with their lengths, and its logits at every position."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=64,
        vocab_size=100,
        n_positions=32,
        activation_function=request.param,
        initializer_range=0.2,
    )
    generator = torch.Generator().manual_seed(2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        lengths = torch.randint(3, 20, (6,), generator=generator)
        tokens = torch.randint(1, 100, (6, int(lengths.max())), generator=generator)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        tokens = tokens.masked_fill(~real, 0)
        logits = model(tokens, attention_mask=real.long()).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    activation = "gelu" if request.param == "gelu" else "gelu_tanh"
    return {"activation": activation, "weights": weights, "tokens": tokens, "lengths": lengths, "logits": logits}
