"""Raw data to what the other recipes read: tokenizer, demonstrations, prompts, indexed text (section 3.2, appendix A).

Users are on one side: train, or held out for validation and test. PPO, ranking and test prompts are disjoint.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config
from megatron_rlhf.data import clean, jsonl, pretraining, sources, tokenizer
from megatron_rlhf.data.candidates import Candidate, Judge, candidates, filtered, recent, statistics_of
from megatron_rlhf.data.sources import Corpus, Row
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.observe.log import write_bytes, write_json

RANKED = 0.4
"""Share of the prompts that is ranked, in training and held out; PPO and the test take the others."""
TOKENIZER_CHARACTERS = 4_000_000
"""Characters the tokenizer learns from; more change no piece of note."""

Counts = dict[str, dict[str, int]]


def run(config: Config) -> dict[str, Any]:
    """Prepares into `data.directory`, else <out>/data. Only one process of a job may call this."""
    return prepare(config, Path(config.data.directory or Path(config.out) / "data"))


def prepare(config: Config, directory: Path) -> dict[str, Any]:
    """Writes tokenizer, JSONL and indexed text into `directory` and returns what prepare.json says: counts of all that
    was read and dropped, sizes, users and token lengths. BadInput if a part stays empty."""
    corpus = sources.load(config.data.source, config.seed)
    held = held_out(corpus, config.data.valid_share, config.seed)
    told = _sides(corpus.text, held)
    tokens = _tokenizer(config, [row["text"] for row in told["train"]], directory / "tokenizer.model")
    judge = _judge() if corpus.conversational else None

    counts: Counts = {
        "source": corpus.counters,
        "text": {"read": len(corpus.text), "mixed_users": len(told["mixed"])},
        "toxicity": {"checked": int(judge is not None)},
    }
    files = _files(corpus, held, tokens, config, judge, counts)
    for name, found in files.items():
        if not found:
            raise BadInput(
                f"nothing is left for {name}.jsonl ({counts}); give more users, or less strict data.* limits"
            )
        jsonl.write(directory / f"{name}.jsonl", [one.row for one in found])
    sizes = {f"pretraining.{side}": _write_text(told[side], side, tokens, directory) for side in ("train", "valid")}
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


def _tokenizer(config: Config, texts: Sequence[str], path: Path) -> Tokenizer:
    """The tokenizer of the user's folder where it has one, else one trained on `texts`; it stands at `path` then."""
    own = Path(config.data.source) / "tokenizer.model"
    if own.is_file():
        write_bytes(path, own.read_bytes())
    else:
        every = sum(map(len, texts)) // TOKENIZER_CHARACTERS + 1
        tokenizer.train(texts[::every], path, config.model.vocabulary)
    loaded = Tokenizer.load(path)
    if loaded.vocabulary != config.model.vocabulary:
        raise BadInput(f"{own} has {loaded.vocabulary} pieces; set model.vocabulary={loaded.vocabulary}")
    return loaded


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
            whole, most = found, config.data.max_prompt_tokens
            found = [recent(one, tokens.newline, most) for one in whole]
            count["prompt_shortened"] = sum(new is not old for new, old in zip(found, whole, strict=True))
        found = filtered(found, config.data, judge, count)
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


def _write_text(rows: list[Row], side: str, tokens: Tokenizer, directory: Path) -> int:
    if not rows:
        raise BadInput(f"no text is left for pretraining.{side}; give more texts or users, or change data.valid_share")
    return pretraining.write((row["text"] for row in rows), tokens, directory / f"pretraining.{side}")
