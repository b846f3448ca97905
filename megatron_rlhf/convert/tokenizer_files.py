"""The files of a tokenizer that travel with weights, and what Hugging Face needs beside them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.sentence_pieces import SentencePieces
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

    A bare tokenizer.model gets the tokenizer_config.json that says which of transformers' classes reads it.
    """
    if not complete([path.name for path in folder.iterdir()]):
        return {"bos_token_id": None, "eos_token_id": None}
    try:
        tokenizer = Tokenizer.load(folder)
    except BadInput:  # one without an end token
        return {"bos_token_id": None, "eos_token_id": None}
    only_pieces = (folder / TRAINED).is_file() and not (folder / KINDS[0][0]).is_file()
    if only_pieces and not (folder / SETTINGS).is_file():
        pieces = SentencePieces(folder / TRAINED)
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": False,
            "add_eos_token": False,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": None,
            "eos_token": pieces.text(tokenizer.end),
            "unk_token": "<unk>",
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {"bos_token_id": next(iter(tokenizer.opening), None), "eos_token_id": tokenizer.end}
