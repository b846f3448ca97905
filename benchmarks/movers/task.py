"""The work all sides do: the model, its two layouts, the staging memory ours may use, and how often it is moved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from megatron_rlhf.config.schema import Model

SIDES = ("ours", "megatron", "gathered")
FLOOR = "loopback"
"""Not a side: the machine without any program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Weights of one GPT model (tied embeddings) from the layout `source` into `target`, `turns` times."""

    source: str
    target: str
    ranks: int
    precision: str = "fp32"
    layers: int = 16
    hidden: int = 1024
    heads: int = 16
    vocabulary: int = 8192
    context: int = 1024
    staging: int = 64 << 20
    turns: int = 7

    @property
    def model(self) -> Model:
        """The architecture."""
        return Model(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            vocabulary=self.vocabulary,
            context=self.context,
            precision=self.precision,
        )

    def word(self) -> str:
        """The task as a word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, word: str) -> Task:
        """The task that `word` made."""
        return cls(**json.loads(word))
