"""A sentencepiece model: one trained here, whose lines are encoded one by one, or any other.

In a model trained here a newline is one token of its own and every line starts like a word after a space, so that a
response gets the same tokens behind a prompt that ends in a newline as the same line gets inside a text.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import sentencepiece

from megatron_rlhf.config.rules import BadInput

PAD, UNKNOWN, END, NEWLINE = range(4)
"""Ids of a model trained here."""
BYTES = 256
LEAST_COVERAGE = 0.98
"""Of sentencepiece; below it training fails."""
LONGEST_LINE = 1 << 20


class SentencePieces:
    """A sentencepiece model: its `vocabulary` size, the id `end` that it closes a text with, the ids `control` that
    no text has, and `newline`; -1 where it has none."""

    def __init__(self, path: Path) -> None:
        """Reads the model file; BadInput if it is none."""
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(path.read_bytes())
        except RuntimeError as error:
            raise BadInput(f"{path} is no sentencepiece model; megatron-rlhf prepare writes one") from error
        self.vocabulary: int = self._processor.get_piece_size()
        self.end: int = self._processor.eos_id()
        self.opening: list[int] = []
        self.control = frozenset(id for id in range(self.vocabulary) if self._processor.is_control(id))
        self.newline: int = NEWLINE if self._is_trained_here() else -1

    def id(self, text: str) -> int | None:
        """The id of the piece `text`, None where there is none."""
        found = self._processor.piece_to_id(text)
        return found if self._processor.id_to_piece(found) == text else None

    def text(self, id: int) -> str:
        """The piece of an id."""
        return str(self._processor.id_to_piece(id))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; a line that several texts share is encoded once."""
        if self.newline < 0:
            return [list(ids) for ids in self._processor.encode(list(texts))]
        split = [text.split("\n") for text in texts]
        lines = list({line: None for lines in split for line in lines if line})
        encoded = dict(zip(lines, self._processor.encode(lines), strict=True)) | {"": []}
        return [_joined([encoded[line] for line in lines], self.newline) for lines in split]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, none of them a control token."""
        lines: list[list[int]] = [[]]
        for token in ids:
            if token == self.newline:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self._processor.decode(line) for line in lines)

    def _is_trained_here(self) -> bool:
        processor = self._processor
        ids = (processor.pad_id(), processor.unk_id(), processor.eos_id(), processor.piece_to_id("\n"))
        return ids == (PAD, UNKNOWN, END, NEWLINE) and processor.bos_id() < 0


def train(texts: Iterable[str], vocabulary: int) -> bytes:
    """A model file with a BPE of exactly `vocabulary` pieces, trained on `texts`.

    Every character of the texts is a piece; where these would fill more than half the vocabulary, the rarest are
    spelled in bytes instead. BadInput if the texts are too short, or the vocabulary too small, with one that works.
    """
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    coverage, spelled = _coverage(lines, vocabulary)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short(lines),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocabulary,
            character_coverage=coverage,
            byte_fallback=spelled,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            pad_id=PAD,
            unk_id=UNKNOWN,
            eos_id=END,
            bos_id=-1,
            max_sentence_length=4 * LONGEST_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BadInput(_reason(str(error), len(lines), vocabulary)) from error
    return written.getvalue()


def _joined(lines: Sequence[Sequence[int]], newline: int) -> list[int]:
    ids = list(lines[0])
    for line in lines[1:]:
        ids.append(newline)
        ids += line
    return ids


def _coverage(lines: Sequence[str], vocabulary: int) -> tuple[float, bool]:
    """The share of the text whose characters get a piece, and whether the others are spelled in bytes.

    BadInput if the pieces left beside those of the bytes cover less than sentencepiece takes.
    """
    counts = Counter(character for line in lines for character in line)
    if len(counts) <= vocabulary // 2:
        return 1.0, False
    covered = list(accumulate(count for _, count in counts.most_common()))
    room = vocabulary // 2 - BYTES
    if room >= 1 and covered[room - 1] >= LEAST_COVERAGE * covered[-1]:
        return covered[room - 1] / covered[-1], True
    needed = 1 + next(place for place, count in enumerate(covered) if count >= LEAST_COVERAGE * covered[-1])
    raise BadInput(
        f"the text has {len(counts)} different characters, too many for model.vocabulary={vocabulary}; "
        f"model.vocabulary={2 * min(len(counts), needed + BYTES)} would do"
    )


def _short(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        for start in range(0, len(line), LONGEST_LINE):
            yield line[start : start + LONGEST_LINE]


def _reason(error: str, lines: int, vocabulary: int) -> str:
    largest = re.search(r"value <= (\d+)", error)
    if largest:
        return (
            f"{lines} lines of text give no {vocabulary} pieces; "
            f"model.vocabulary={largest[1]} would work, or more text (data.source)"
        )
    return f"no tokenizer of {vocabulary} pieces from {lines} lines of text; give more text ({error.strip()})"
