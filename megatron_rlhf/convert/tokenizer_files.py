"""The files of a tokenizer that travel with weights, and what Hugging Face needs beside them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import tokenizer_json
from megatron_rlhf.data.sentence_pieces import PAD, UNKNOWN, SentencePieces
from megatron_rlhf.data.tokenizer import KINDS, SETTINGS, TRAINED, Tokenizer

NAMES = (
    *(name for kind in KINDS for name in kind),
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What is copied, where it is there."""
LARGEST = 1 << 27
"""Bytes of one such file; the largest vocabularies have some ten MiB."""


def collect(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in `folder` by name. Raises BadInput for one that is far too large."""
    found = {}
    for name in NAMES:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > LARGEST:
                raise BadInput(f"{path} is larger than {LARGEST >> 20} MiB, no tokenizer's file is")
            found[name] = path.read_bytes()
    return found


def complete(files: Collection[str]) -> bool:
    """Whether the named files make a tokenizer."""
    return any(all(name in files for name in kind) for kind in KINDS)


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write them into `folder`."""
    for name, data in files.items():
        if name != Path(name).name:
            raise BadInput(f"a tokenizer's file is called {name!r}; it must be a plain name")
        (folder / name).write_bytes(data)


def for_hugging_face(folder: Path) -> dict[str, Any]:
    """The begin and end token ids that config.json names, from the tokenizer in `folder`; none where there is none.

    A tokenizer that `prepare` trained gets the tokenizer.json and tokenizer_config.json with which transformers reads
    it, as it would read the bare tokenizer.model otherwise.
    """
    if not complete([path.name for path in folder.iterdir()]):
        return {"bos_token_id": None, "eos_token_id": None}
    try:
        tokenizer = Tokenizer.load(folder)
    except BadInput:  # one without an end token
        return {"bos_token_id": None, "eos_token_id": None}
    if _trained_here(folder):
        pieces = SentencePieces(folder / TRAINED)
        text = tokenizer_json.of_sentencepiece((folder / TRAINED).read_bytes())
        (folder / KINDS[0][0]).write_text(text, encoding="utf-8")
        known = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        names = {
            "pad_token": pieces.text(PAD),
            "unk_token": pieces.text(UNKNOWN),
            "eos_token": pieces.text(tokenizer.end),
        }
        (folder / SETTINGS).write_text(json.dumps(known | names, indent=2) + "\n", encoding="utf-8")
    return {"bos_token_id": next(iter(tokenizer.opening), None), "eos_token_id": tokenizer.end}


def _trained_here(folder: Path) -> bool:
    """Whether a bare tokenizer.model is one of `prepare`'s."""
    if not (folder / TRAINED).is_file() or (folder / KINDS[0][0]).exists():
        return False
    return SentencePieces(folder / TRAINED).newline >= 0
