"""What a benchmark of an operator asks of its sides: sizes, dtype and device, as words of a command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """N rows and V columns, or positions of GAE; `operator` is the name of a benchmark, `side` of a contestant."""

    operator: str
    side: str = ""
    rows: int
    columns: int
    dtype: str = "float32"
    device: str = "cpu"

    def word(self) -> str:
        """The task as one word, read by `parse`."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(word: str) -> Task:
        """The task of a word."""
        return Task(**json.loads(word))

    @property
    def name(self) -> str:
        """The case as a table names it."""
        return f"{self.rows} x {self.columns} {self.dtype}"
