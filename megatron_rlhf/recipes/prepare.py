"""Raw data to what the other recipes read: tokenizer, demonstrations, prompts, indexed text (section 3.2, appendix A).

Users are on one side: train, or held out for validation and test. PPO, ranking and test prompts are disjoint.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config
from megatron_rlhf.data import clean, jsonl, pretraining, sentence_pieces, sources, tokenizer
from megatron_rlhf.data.candidates import Candidate, Judge, candidates, emptied, filtered, recent, statistics_of
from megatron_rlhf.data.sources import Corpus, Row
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.observe.log import write_bytes, write_json
from megatron_rlhf.recipes import places

RANKED = 0.4
"""Share of the prompts that is ranked, in training and held out; PPO and the test take the others."""
TOKENIZER_CHARACTERS = 4_000_000
"""Characters the tokenizer learns from; more change no piece of note."""

Counts = dict[str, dict[str, int]]


def run(config: Config) -> dict[str, Any]:
    """Prepares into `data.directory`, else <out>/data. Only one process of a job may call this."""
    return prepare(config, places.data(config))


def prepare(config: Config, directory: Path) -> dict[str, Any]:
    """Writes tokenizer, JSONL and indexed text into `directory` and returns what prepare.json says: counts of all that
    was read and dropped, sizes, users and token lengths. BadInput, with nothing written, if a part stays empty."""
    corpus = sources.load(config.data.source, config.seed)
    held = held_out(corpus, config.data.valid_share, config.seed)
    told = _sides(corpus.text, held)
    _demand({f"pretraining.{side}": len(told[side]) for side in ("train", "valid")}, config)
    with TemporaryDirectory() as made:
        return _write(config, corpus, held, told, _tokenizer(config, corpus, told["train"], Path(made)), directory)


def _write(
    config: Config, corpus: Corpus, held: frozenset[str], told: dict[str, list[Row]], source: Path, directory: Path
) -> dict[str, Any]:
    """What `prepare` returns, written with the tokenizer of the folder `source`."""
    tokens = Tokenizer.load(source, config.data.end_token)
    tokens.check_vocabulary(config.model.vocabulary)
    judge = _judge() if corpus.conversational else None

    counts: Counts = {
        "source": corpus.counters,
        "text": {"read": len(corpus.text), "mixed_users": len(told["mixed"])},
        "toxicity": {"checked": int(judge is not None)},
    }
    files = _files(corpus, held, tokens, config, judge, counts)
    _demand({f"{name}.jsonl": len(found) for name, found in files.items()}, config)
    tokenizer.copy(source, directory, config.data.end_token)
    for name, found in files.items():
        jsonl.write(directory / f"{name}.jsonl", [one.row for one in found])
    sizes = {
        name: pretraining.write((row["text"] for row in told[side]), tokens, directory / name)
        for side, name in (("train", "pretraining.train"), ("valid", "pretraining.valid"))
    }
    report = {
        "vocabulary": tokens.vocabulary,
        "counters": counts,
        "pretraining_tokens": sizes,
        "files": {name: statistics_of(found) for name, found in files.items()},
    }
    write_json(directory / "prepare.json", report)
    return report


def held_out(corpus: Corpus, share: float, seed: int) -> frozenset[str]:
    """The held-out users: by chance, or, where rows belong to several users, those who split the fewest rows.

    Rows without user are held out apart from named users, prompts apart from texts, so that each has a held-out part.
    """
    rows = [*corpus.demonstrations, *corpus.prompts, *corpus.text]
    groups = Counter(sources.users_of(row) for row in rows)
    if any(len(group) > 1 for group in groups):
        return clean.split_linked(groups, share, seed)
    pools: dict[str, set[str]] = {}
    for user in {user for group in groups for user in group}:
        pools.setdefault(sources.unnamed(user), set()).add(user)
    return frozenset(user for pool in pools.values() for user in clean.split(pool, share, seed))


def _tokenizer(config: Config, corpus: Corpus, told: Sequence[Row], made: Path) -> Path:
    """The user's folder where it has a tokenizer, else the folder `made`, with one trained on the texts."""
    own = Path(config.data.source)
    if not corpus.conversational and tokenizer.found(own):
        return own
    texts = [row["text"] for row in told]
    every = sum(map(len, texts)) // TOKENIZER_CHARACTERS + 1
    write_bytes(made / tokenizer.TRAINED, sentence_pieces.train(texts[::every], config.model.vocabulary))
    return made


def _demand(sizes: dict[str, int], config: Config) -> None:
    """BadInput for a part that stays empty."""
    for name, size in sizes.items():
        if not size:
            raise BadInput(
                f"nothing of {config.data.source} is left for {name}, as held-out users are apart from the others; "
                f"give several rows of each of 2 users or more, or change data.valid_share={config.data.valid_share}"
            )


def _judge() -> Judge | None:
    """The toxicity classifier, or None where its package is missing."""
    if find_spec("profanity_check") is None:
        return None
    from megatron_rlhf.eval.toxicity import probabilities

    return probabilities


def _files(
    corpus: Corpus, held: frozenset[str], tokens: Tokenizer, config: Config, judge: Judge | None, counts: Counts
) -> dict[str, list[Candidate]]:
    """What every JSONL file holds. Modifies: counts."""
    train: dict[str, list[Candidate]] = {}
    valid: dict[str, list[Candidate]] = {}
    for name, reply in (("demonstrations", "response"), ("prompts", "reference")):
        rows = corpus.demonstrations if name == "demonstrations" else corpus.prompts
        counts[name] = count = {"read": len(rows)}
        found = candidates(_dealt_to_sides(rows, held, config, count), reply, tokens)
        if corpus.conversational:
            long, most = found, config.data.max_prompt_tokens
            found = [recent(one, tokens.newline, most) for one in long]
            count["prompt_shortened"] = sum(new is not old for new, old in zip(found, long, strict=True))
        whole, found = found, filtered(found, config.data, judge, count)
        if whole and not found:
            raise BadInput(f"{config.data.source}: {emptied(name, whole, config.data, count)}")
        train[name] = [one for one in found if not one.is_held(held)]
        valid[name] = [one for one in found if one.is_held(held)]

    prefix = config.data.shared_prefix_tokens
    seen = {tuple(one.prompt[:prefix]) for found in train.values() for one in found}
    for name, found in valid.items():
        valid[name] = [one for one in found if tuple(one.prompt[:prefix]) not in seen]
        counts[name]["held_out_but_seen_in_training"] = len(found) - len(valid[name])
    rank, ppo = _ranked(train["prompts"], config.seed)
    rank_valid, test = _ranked(valid["prompts"], config.seed)
    return {
        "demonstrations.train": train["demonstrations"],
        "demonstrations.valid": valid["demonstrations"],
        "prompts.train": ppo,
        "prompts.rank": rank,
        "prompts.rank_valid": rank_valid,
        "prompts.test": test,
    }


def _dealt_to_sides(rows: list[Row], held: frozenset[str], config: Config, count: dict[str, int]) -> list[Row]:
    """The rows in random order, without those of users on both sides and those over a user's cap. Modifies: count."""
    sides = _sides(random.Random(config.seed).sample(rows, len(rows)), held)
    whole = sides["train"] + sides["valid"]
    kept, over = clean.cap([row["user"] for row in whole], config.data.prompts_per_user)
    count |= {"mixed_users": len(sides["mixed"]), "over_user_cap": over}
    return [whole[place] for place in kept]


def _sides(rows: Iterable[Row], held: frozenset[str]) -> dict[str, list[Row]]:
    """The rows whose users are all in training, all held out ("valid"), or on both sides ("mixed")."""
    sides: dict[str, list[Row]] = {"train": [], "valid": [], "mixed": []}
    for row in rows:
        inside = {user in held for user in sources.users_of(row)}
        sides["mixed" if len(inside) > 1 else "valid" if True in inside else "train"].append(row)
    return sides


def _ranked(found: list[Candidate], seed: int) -> tuple[list[Candidate], list[Candidate]]:
    """What is ranked and the others; a conversation is in one of them, and neither is empty where there are two."""
    sizes = Counter(one.conversation for one in found)
    ranked: set[str] = set()
    rows = 0
    for name in sorted(sizes, key=lambda name: clean.chance(seed, f"ranked {name}"))[:-1]:
        if ranked and rows >= RANKED * len(found):
            break
        ranked.add(name)
        rows += sizes[name]
    others = [one for one in found if one.conversation not in ranked]
    return [one for one in found if one.conversation in ranked], others
