"""The work both sides do: sizes of the networks, of a rollout and of its updates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One PPO iteration: every prompt is answered with exactly `new_tokens` tokens, then `minibatches` updates."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    vocabulary: int = 2048
    context: int = 128
    episodes: int = 64
    shortest: int = 24
    longest: int = 48
    new_tokens: int = 40
    minibatches: int = 8
    rate: float = 1e-5
    kl_coef: float = 0.05
    lam: float = 0.95
    clip: float = 0.2
    beta2: float = 0.95
    epsilon: float = 1e-5

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt, evenly from the shortest to the longest."""
        span, last = self.longest - self.shortest, max(1, self.episodes - 1)
        return [self.shortest + place * span // last for place in range(self.episodes)]

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of an iteration, padding not counted."""
        return sum(self.prompt_lengths) + self.episodes * self.new_tokens

    def word(self) -> str:
        """The task as a word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, word: str) -> Task:
        """The task that `word` made."""
        return cls(**json.loads(word))


TOY = Task(
    layers=2, hidden=32, heads=2, vocabulary=256, context=32, episodes=8, shortest=4, longest=8, new_tokens=6,
    minibatches=2,
)  # fmt: skip
"""Small enough to see in seconds that everything runs; its times mean nothing."""
