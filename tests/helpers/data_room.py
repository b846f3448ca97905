"""A tiny data room for PPO: tokenizer, prompts and pretraining text of made-up sentences, without a corpus."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rlhf.data import jsonl, pretraining, sentence_pieces, tokenizer

VOCABULARY = 96
SETTINGS = (
    *("experiment=quickstart", "data.source=people"),
    *(f"{model}.vocabulary={VOCABULARY}" for model in ("model", "reward_model")),
    *(f"{model}.{size}" for model in ("model", "reward_model") for size in ("layers=2", "hidden=32", "heads=4")),
    *("data.max_prompt_tokens=16", "sampling.max_tokens=8", "sampling.batch=8", "pretrain.length=16"),
    *("ppo.iterations=3", "ppo.policy.warmup=1"),
)
"""Settings of a run that reads it."""
_WORDS = ["the", "cat", "dog", "sees", "likes", "a", "red", "house", "and", "why", "runs", "sleeps", "here", "today"]


def write(folder: Path) -> None:
    """Fills `folder`, in half a second."""
    picks = torch.randint(len(_WORDS), (200, 6), generator=torch.Generator().manual_seed(6)).tolist()
    sentences = [" ".join(_WORDS[place] for place in row) + "." for row in picks]
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(sentence_pieces.train(sentences, VOCABULARY))
    tokens = tokenizer.Tokenizer.load(folder)
    jsonl.write(folder / "prompts.train.jsonl", [{"prompt": sentence[:12]} for sentence in sentences])
    pretraining.write(sentences, tokens, folder / "pretraining.train")
