"""The prompts that PPO, ranking and evaluation answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhf.batch import Prompts
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import jsonl
from megatron_rlhf.data.cursor import Resumable
from megatron_rlhf.data.rows import pad_rows
from megatron_rlhf.data.tokenizer import Tokenizer


class PromptStream(Resumable):
    """Prompts of a file in an endless resumable order; those over the limit are `dropped`.

    `texts[i]` and `fields[i]` are the text and the whole object of the file's prompt i, dropped or not; `ids_B` of
    what is taken index them.
    """

    def __init__(self, path: Path, fields: list[dict[str, Any]], tokens: list[list[int]], limit: int, seed: int):
        """Prompts with their tokens; BadInput if none has at most `limit` tokens."""
        self._path, self._tokens = path, tokens
        self.fields = fields
        self.texts: list[str] = [row["prompt"] for row in fields]
        self._kept = [place for place, row in enumerate(tokens) if len(row) <= limit]
        self.dropped = len(tokens) - len(self._kept)
        if not self._kept:
            shortest = min(map(len, tokens), default=0)
            raise BadInput(
                f"{path}: none of its {len(tokens)} prompts has at most {limit} tokens; "
                f"data.max_prompt_tokens={shortest} would keep the shortest"
            )
        super().__init__(len(self._kept), seed)

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer, *, max_tokens: int, seed: int) -> PromptStream:
        """The prompts `{prompt, ...}` of the JSONL file `path` with at most `max_tokens` tokens."""
        fields = jsonl.read(path, ["prompt"])
        return cls(path, fields, [tokenizer.encode_prompt(row["prompt"]) for row in fields], max_tokens, seed)

    def take(self, number: int) -> Prompts:
        """The next `number` prompts of the order. Modifies: the place in it."""
        return self._prompts(self._cursor.take(number).tolist())

    def first(self, number: int) -> Prompts:
        """The first `number` prompts of the file; BadInput if it has fewer."""
        if number > len(self):
            raise BadInput(f"{self._path} has {len(self)} prompts, {number} are asked for; ask for {len(self)}")
        return self._prompts(range(number))

    def _prompts(self, places: Sequence[int]) -> Prompts:
        ids = [self._kept[place] for place in places]
        rows = pad_rows([self._tokens[place] for place in ids], [()] * len(ids))
        ids_B: Tensor = torch.tensor(ids, dtype=torch.int64)
        return Prompts(tokens_BT=rows.tokens_BT, lengths_B=rows.lengths_B, ids_B=ids_B)
