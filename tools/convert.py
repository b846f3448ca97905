"""python tools/convert.py --from FORMAT --to FORMAT SRC DST: weights and tokenizer from one format into another.

Every tensor of the source is used and every tensor of the target filled, or it fails and names them; DST appears whole
or not at all. Needs no GPU; memory stays below twice the largest tensor and 1 GiB.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import gguf, huggingface, megatron, nemo, run, tokenizer_files, weights
from megatron_rlhf.convert.logical import ROLES, Card, Source
from megatron_rlhf.convert.precision import DTYPES

READERS: dict[str, Callable[..., Source]] = {
    "gguf": gguf.open_source,
    "hf": huggingface.open_source,
    "megatron": megatron.open_source,
    "nemo": nemo.open_source,
    "weights": weights.open_source,
}
WRITERS: dict[str, Callable[..., None]] = {
    "hf": huggingface.write,
    "megatron": megatron.write,
    "nemo": nemo.write,
    "weights": weights.write,
}
LAID_OUT = ("megatron", "nemo")
"""Formats that are written under a layout, and that may not say their architecture."""


def main(words: Sequence[str] | None = None) -> int:
    """Convert as the words say; the exit code, 2 with one sentence on stderr for bad input."""
    asked = _parser().parse_args(words)
    try:
        # the check alone needs megatron and transformers
        comparison = importlib.import_module("convert_check") if asked.check else None
        if comparison:
            comparison.possible(asked.of, asked.to)
        card = convert(asked)
        print(told(asked.target, asked.to, card))
        if comparison:
            print(comparison.check(asked.source, asked.of, asked.target, asked.to, card, READERS))
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or asked.target}: {error.strerror or error}; nothing was written", file=sys.stderr)
        return 2
    return 0


def convert(asked: argparse.Namespace) -> Card:
    """What was written. Raises BadInput."""
    if asked.layout and asked.to not in LAID_OUT:
        raise BadInput(f"--layout is for {' and '.join(LAID_OUT)}: {asked.to} is read under every layout; leave it out")
    if asked.shard_gib is not None and not 0 < asked.shard_gib < 1 << 20:
        raise BadInput(f"--shard-gib {asked.shard_gib:g} must be above 0; write for example --shard-gib 5")
    if asked.shard_gib is not None and asked.to != "hf":
        raise BadInput("--shard-gib is the size of Hugging Face's files; leave it out")
    if asked.model and asked.of not in LAID_OUT:
        raise BadInput(f"--model is for {' and '.join(LAID_OUT)}: {asked.of} says its architecture; leave it out")
    fresh = asked.fresh_head is not None
    said = {"model": asked.model} if asked.model else {}
    source = READERS[asked.of](asked.source, None if fresh else asked.role, **said)
    if fresh:
        source = run.headed(source, asked.role or "reward", asked.fresh_head)
    extra: dict[str, Any] = {}
    if asked.layout:
        extra["layout"] = asked.layout
    if asked.shard_gib is not None:
        extra["largest_shard"] = int(asked.shard_gib * (1 << 30))
    write = partial(WRITERS[asked.to], **extra)
    dtype = DTYPES[asked.dtype] if asked.dtype else None
    return run.convert(source, write, asked.target, dtype, tokenizer=_tokenizer(asked.tokenizer))


def _tokenizer(folder: Path | None) -> dict[str, bytes] | None:
    files = tokenizer_files.collect(folder) if folder else None
    if files is not None and not tokenizer_files.complete(files):
        raise BadInput(f"{folder} holds no tokenizer; write --tokenizer FOLDER with one")
    return files


def told(target: Path, to: str, card: Card) -> str:
    """What is at `target` now, and the words that use it."""
    files = target.rglob("*") if target.is_dir() else [target]
    size = sum(file.stat().st_size for file in files if file.is_file())
    said = [f"{target}: a {card.role} model of {len(card.shapes())} tensors in {card.model.precision}, {size:,} bytes"]
    if not tokenizer_files.complete(card.tokenizer):
        said.append("the source has no tokenizer: --tokenizer FOLDER takes one along")
    if to == "weights":
        use = f"model={target / weights.MODEL} checkpoint.pretrained={target}"
        scalar = f"model@reward_model={target / weights.MODEL}, with the folder as OUT/reward/weights"
        said.append(
            f"use it: megatron-rlhf sft experiment=NAME {use}"
            if card.role == "policy"
            else f"use it: megatron-rlhf ppo experiment=NAME out=OUT {scalar}"
        )
    return "\n".join(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--from", dest="of", required=True, choices=sorted(READERS), help="what SRC is")
    parser.add_argument("--to", required=True, choices=sorted(WRITERS), help="what DST becomes")
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--dtype", choices=list(DTYPES), help="what the weights are written in; as they are stored")
    parser.add_argument("--layout", default="", help='the layout of a distributed checkpoint, such as "tp2 pp2"')
    parser.add_argument("--model", type=Path, metavar="FILE.yaml", help="the architecture; as the source says")
    parser.add_argument("--role", choices=ROLES, help="what the network ends in; as the source says")
    parser.add_argument("--fresh-head", type=int, metavar="SEED", help="begin a scalar head on a language model's body")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="where the tokenizer is; with the source")
    parser.add_argument("--shard-gib", type=float, metavar="GIB", help="largest safetensors file; 5")
    parser.add_argument("--check", action="store_true", help="generate with both sides and compare logits")
    return parser


if __name__ == "__main__":
    sys.exit(main())
