"""The tokenizer in a GGUF's metadata as the files that Hugging Face has: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.tokenizer import SETTINGS

PREFIX = "tokenizer.ggml."
_CONTROL, _OWN = 3, 4
_SPLITS = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": lambda: [],
}
"""What cuts a text before the byte level does, by the name of the pre-tokenizer."""


def files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files; none where the metadata has none. Raises BadInput for one that is not known here."""
    if f"{PREFIX}model" not in metadata:
        return {}
    model, before = metadata[f"{PREFIX}model"], metadata.get(f"{PREFIX}pre", "missing")
    if model != "gpt2":
        raise BadInput(f"{PREFIX}model={str(model)[:40]}: only the byte-level BPE gpt2 can be rebuilt")
    if before not in _SPLITS:
        raise BadInput(f"{PREFIX}pre={str(before)[:40]} is not one of {', '.join(_SPLITS)}")
    words, merges = _strings(metadata, "tokens"), _strings(metadata, "merges")
    kinds = metadata.get(f"{PREFIX}token_type", [1] * len(words))
    if not isinstance(kinds, list) or len(kinds) != len(words) or len(set(words)) != len(words):
        raise BadInput(f"{PREFIX}tokens and token_type are not one kind for each of as many different tokens")
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    try:
        bpe = models.BPE({word: id for id, word in enumerate(words)}, pairs)
    except Exception as error:  # the library raises nothing narrower
        raise BadInput(f"{PREFIX}tokens and merges are no byte-level BPE ({str(error)[:80]})") from error
    built = tokenizers.Tokenizer(bpe)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([*_SPLITS[before](), byte_level])
    built.decoder = decoders.ByteLevel()
    named = zip(words, kinds, strict=True)
    built.add_tokens(
        [
            AddedToken(word, special=kind == _CONTROL, normalized=False)
            for word, kind in named
            if kind in (_CONTROL, _OWN)
        ]
    )
    return {
        "tokenizer.json": built.to_str(pretty=True).encode(),
        SETTINGS: json.dumps(_settings(metadata, words), indent=2, ensure_ascii=False).encode(),
    }


def _settings(metadata: Mapping[str, Any], words: list[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id = metadata.get(f"{PREFIX}{key}_token_id")
        if id is not None:
            if type(id) is not int or not 0 <= id < len(words):
                raise BadInput(f"{PREFIX}{key}_token_id={str(id)[:40]} is none of its {len(words)} tokens")
            told[f"{name}_token"] = words[id]
    told["add_bos_token"] = metadata.get(f"{PREFIX}add_bos_token", False) is True
    if metadata.get(f"{PREFIX}add_space_prefix") is True:
        raise BadInput(f"{PREFIX}add_space_prefix=true: a byte-level BPE with it cannot be rebuilt")
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        told["chat_template"] = template
    return told


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    found = metadata.get(PREFIX + key)
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise BadInput(f"{PREFIX}{key} is no list of strings, which gpt2's byte-level BPE needs")
    return found
