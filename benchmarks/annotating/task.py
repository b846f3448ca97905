"""The forward pass all sides make: a GPT with a wide vocabulary, rows of one length, and what its memory should be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from megatron_rlhf.config.schema import Model

NOW = "now"
SIDES = (NOW, "kernels only", "before", "eager")
FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """`rows` rows of `length` tokens, the first `prompt` of them the prompt, through `tp` ranks in one micro-batch."""

    side: str = NOW
    tp: int = 1
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    vocabulary: int = 50304
    rows: int = 32
    length: int = 256
    prompt: int = 128

    @property
    def model(self) -> Model:
        """The architecture."""
        return Model(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            vocabulary=self.vocabulary,
            context=self.length,
        )

    def predicted(self, at_once: int) -> int:
        """Bytes a rank holds at the peak of the pass above its weights; the positions the head takes `at_once`."""
        states = self.rows * self.length * self.hidden * FLOAT
        if self.side == NOW:
            responses = self.rows * (self.length - self.prompt)
            picked = responses * self.hidden * FLOAT
            return min(at_once, responses) * self.vocabulary // self.tp * FLOAT + states + 2 * picked
        return 2 * self.rows * self.length * self.vocabulary // self.tp * FLOAT + 2 * states

    @property
    def name(self) -> str:
        """The case as a table names it."""
        return f"tp{self.tp}, {self.rows} x {self.length} of {self.vocabulary}"

    def word(self) -> str:
        """The task as one word, read by `parse`."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(word: str) -> Task:
        """The task of a word."""
        return Task(**json.loads(word))
