"""Demonstrations: prompts with a written response, for supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path

from megatron_rlhf.batch import Rows
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import jsonl
from megatron_rlhf.data.cursor import Resumable
from megatron_rlhf.data.rows import pad_rows
from megatron_rlhf.data.tokenizer import Tokenizer


class DemonstrationStream(Resumable):
    """Demonstrations in an endless resumable order; every response closes with the end token.

    `prompts[i]` and `responses[i]` are the texts of row i of `all_rows()`; those over a limit are `dropped`.
    """

    def __init__(
        self,
        prompts: list[str],
        responses: list[str],
        tokens: list[tuple[list[int], list[int]]],
        dropped: int,
        seed: int,
    ) -> None:
        """The kept demonstrations, their tokens (prompt, response) and how many were dropped."""
        super().__init__(len(tokens), seed)
        self.prompts, self.responses, self.dropped = prompts, responses, dropped
        self._tokens = tokens

    @classmethod
    def load(
        cls, path: Path, tokenizer: Tokenizer, *, max_prompt: int, max_response: int, limit: int = 0, seed: int
    ) -> DemonstrationStream:
        """The demonstrations `{prompt, response, ...}` of the JSONL file `path`, the first `limit` of them (0: all).

        Prompts over `max_prompt` tokens and responses over `max_response`, the end token included, are dropped;
        BadInput if nothing is left.
        """
        prompts, responses, tokens, dropped = [], [], [], 0
        for row in jsonl.read(path, ["prompt", "response"]):
            prompt = tokenizer.encode_prompt(row["prompt"])
            response = [*tokenizer.encode(row["response"]), tokenizer.end]
            if len(prompt) > max_prompt or len(response) > max_response:
                dropped += 1
                continue
            prompts.append(row["prompt"])
            responses.append(row["response"])
            tokens.append((prompt, response))
            if len(tokens) == limit:
                break
        if not tokens:
            raise BadInput(
                f"{path}: none of its {dropped} demonstrations has at most {max_prompt} prompt and {max_response} "
                f"response tokens; raise data.max_prompt_tokens or data.max_response_tokens"
            )
        return cls(prompts, responses, tokens, dropped, seed)

    def take(self, number: int) -> Rows:
        """The next `number` demonstrations of the order. Modifies: the place in it."""
        return self._rows([self._tokens[place] for place in self._cursor.take(number).tolist()])

    def all_rows(self) -> Rows:
        """Every demonstration once, in the order of the file."""
        return self._rows(self._tokens)

    def _rows(self, tokens: list[tuple[list[int], list[int]]]) -> Rows:
        return pad_rows([prompt for prompt, _ in tokens], [response for _, response in tokens])
