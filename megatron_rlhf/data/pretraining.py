"""Pretraining text as a Megatron indexed dataset, read back as rows without padding.

The file holds one document a text, its tokens (behind the tokenizer's opening) and the end token; rows cut the
documents' concatenation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_rlhf.batch import Rows
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.cursor import Resumable
from megatron_rlhf.data.tokenizer import Tokenizer


def write(texts: Iterable[str], tokenizer: Tokenizer, prefix: Path) -> int:
    """Writes `texts` to `prefix`.bin and .idx, each whole or absent, and returns the number of tokens.

    BadInput if there is no text.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = prefix.with_name(f".{prefix.name}.{os.getpid()}.tmp")
    builder = IndexedDatasetBuilder(f"{temporary}.bin", dtype=DType.optimal_dtype(tokenizer.vocabulary))
    tokens = 0
    try:
        for text in texts:
            ids = [*tokenizer.encode_prompt(text), tokenizer.end]
            builder.add_document(torch.tensor(ids), [len(ids)])
            tokens += len(ids)
        builder.finalize(f"{temporary}.idx")
        if not tokens:
            raise BadInput(f"there is no text for {prefix}; give at least one (data.source)")
        for suffix in (".bin", ".idx"):
            _publish(Path(f"{temporary}{suffix}"), Path(f"{prefix}{suffix}"))
    finally:
        for suffix in (".bin", ".idx"):
            Path(f"{temporary}{suffix}").unlink(missing_ok=True)
    return tokens


class PretrainingStream(Resumable):
    """Rows of exactly `length` tokens in an endless resumable order; row i is tokens [i length, (i + 1) length)."""

    def __init__(self, prefix: Path, length: int, seed: int) -> None:
        """Maps `prefix`.bin and .idx; BadInput if they are missing or hold less than one row."""
        if not IndexedDataset.exists(str(prefix)):
            raise BadInput(f"{prefix}.bin and {prefix}.idx are missing; megatron-rlhf prepare writes them")
        self._documents = IndexedDataset(str(prefix), mmap=True)
        self._length = length
        self._ends = numpy.cumsum(self._documents.sequence_lengths, dtype=numpy.int64)
        tokens = int(self._ends[-1])
        if tokens < length:
            raise BadInput(
                f"{prefix} has {tokens} tokens, less than one row of {length}; pretrain.length={tokens} fits"
            )
        super().__init__(tokens // length, seed)

    def take(self, number: int) -> Rows:
        """The next `number` rows of the order: a prompt of one token, no padding. Modifies: the place in it."""
        return self._rows(self._cursor.take(number).tolist())

    def first(self, number: int) -> Rows:
        """The first `number` rows of the text; BadInput if it has fewer."""
        if number > len(self):
            raise BadInput(f"the text has {len(self)} rows of {self._length} tokens, {number} are asked for")
        return self._rows(list(range(number)))

    def _rows(self, places: list[int]) -> Rows:
        tokens = numpy.stack([self._row(place) for place in places]) if places else numpy.zeros((0, self._length))
        return Rows(
            tokens_BT=torch.from_numpy(tokens.astype(numpy.int64)),
            prompt_lengths_B=torch.ones(len(places), dtype=torch.int64),
            lengths_B=torch.full((len(places),), self._length, dtype=torch.int64),
        )

    def _row(self, place: int) -> numpy.ndarray:
        start, end = place * self._length, (place + 1) * self._length
        parts = []
        document = int(numpy.searchsorted(self._ends, start, side="right"))
        while start < end:
            stop = min(int(self._ends[document]), end)
            begin = int(self._ends[document] - self._documents.sequence_lengths[document])
            parts.append(self._documents.get(document, offset=start - begin, length=stop - start))
            start, document = stop, document + 1
        return numpy.concatenate(parts)


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
