"""Proves that models of the families that differ from plain GPT-2 and Llama, converted as published folders are,
compute under sequence parallelism what transformers computes, and answer greedily, through the cache, what it answers.

Not proved here: published checkpoints; tp2 pp2 and the way back (tests/convert/test_huggingface.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlhf.batch import Prompts
from megatron_rlhf.checkpoint import weights as stage
from megatron_rlhf.config.schema import Compute
from megatron_rlhf.convert import huggingface, run, weights
from megatron_rlhf.generate.engine import Generator
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid
from tests.helpers.logits import all_logits
from tests.helpers.published import VOCABULARY, publish

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, as trained": ("GPT2", {"activation_function": "gelu_new"}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama, biases and wide heads": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "gpt-neox, a quarter of a head": ("GPTNeoX", {}),
    "gpt-neox, whole heads": ("GPTNeoX", {"rotary_pct": 1.0, "hidden_size": 96}),
}
SLOW = {"llama, biases and wide heads", "gpt-neox, whole heads"}
ANSWER = 10
"""Tokens drawn for each prompt."""
CLEAR = 1e-4
"""How far the best word of the oracle leads, so that no order of addition decides."""


@torch.no_grad()
def answered(path: Path, prompts: Prompts) -> Tensor:
    """What transformers answers in float64, without a cache, the best word each time; [b, ANSWER]."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).double().eval()
    answers = []
    for row, length in zip(prompts.tokens_BT, prompts.lengths_B.tolist(), strict=True):
        tokens = row[:length]
        for _ in range(ANSWER):
            best = model(tokens[None]).logits[0, -1].topk(2)
            assert float(best.values[0] - best.values[1]) > CLEAR
            tokens = torch.cat([tokens, best.indices[:1]])
        answers.append(tokens[length:])
    return torch.stack(answers)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES]
)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder's weights here, what transformers computes of it and what it answers."""
    family, settings = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("families")
    made = publish(folder / "theirs", family, **settings)
    run.convert(huggingface.open_source(made.path, None), weights.write, folder / "weights", quiet=True)
    asked = tiny.prompts(4, vocabulary=VOCABULARY)
    return {"weights": folder / "weights", "made": made, "asked": asked, "answers": answered(made.path, asked)}


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 dp2 sp"])
def test_every_logit_is_theirs(words: str, converted: dict[str, Any]) -> None:
    """At every real position of right-padded rows, to 1e-5."""
    made = converted["made"]
    built = tiny.network(words, weights.open_source(converted["weights"], None).card.model)
    stage.load(built, converted["weights"])
    read = all_logits(made.rows.tokens_BT.shape[1], VOCABULARY)
    found = Engine(built, read, Compute(forward_micro_batch=2)).forward(made.rows)
    real = torch.arange(found.shape[1]) < made.rows.lengths_B[:, None]
    torch.testing.assert_close(found[real], made.logits[real], rtol=1e-5, atol=1e-5)


@on_grid(4)
@pytest.mark.parametrize("words", ["tp2 pp2", "tp4"])
def test_every_answer_is_theirs(words: str, converted: dict[str, Any]) -> None:
    """Ragged prompts, token by token through the cache, up to the end token if one is drawn."""
    built = tiny.network(words, weights.open_source(converted["weights"], None).card.model)
    stage.load(built, converted["weights"])
    end = VOCABULARY - 1
    rows = Generator(built, end=end, rows=8).sample(converted["asked"], Draw(temperature=0.0), ANSWER).rows
    bounds = zip(rows.prompt_lengths_B.tolist(), rows.lengths_B.tolist(), strict=True)
    for row, (start, stop) in enumerate(bounds):
        expected = converted["answers"][row].tolist()
        expected = expected[: expected.index(end) + 1] if end in expected else expected
        assert rows.tokens_BT[row, start:stop].tolist() == expected
