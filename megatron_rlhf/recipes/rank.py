"""Comparison data: K samples a prompt from the SFT policy, ranked by the labeler, written as rankings JSONL."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy
import torch

from megatron_rlhf.config.schema import Config
from megatron_rlhf.data import jsonl
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.eval import labeler
from megatron_rlhf.eval.gold import GoldPreference
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.observe.log import write_json
from megatron_rlhf.parallel import collectives
from megatron_rlhf.recipes import session
from megatron_rlhf.recipes.generation import answers
from megatron_rlhf.recipes.judge import CHITCHAT, gold_preference, texts
from megatron_rlhf.recipes.session import Session


def run(config: Config) -> None:
    """Write `rankings.train.jsonl` and `rankings.valid.jsonl` into the data folder, or for a corpus of the user's the
    same without ranks as `comparisons.*.jsonl`, for people to rank. Collective: world."""
    rank(session.start(config))


def rank(run: Session) -> None:
    """Sample both splits and rank them; `rank.json` beside them says what a perfect reward model could reach.

    Collective: world.
    """
    settings = run.config.rank
    preference = gold_preference(run) if run.config.data.source == CHITCHAT else None
    found = {}
    splits = (("train", "prompts.rank", settings.prompts), ("valid", "prompts.rank_valid", settings.valid_prompts))
    for place, (split, file, count) in enumerate(splits):
        seed = run.config.seed * 2 + place
        comparisons = _sampled(run, file, count, seed)
        if preference is not None:
            found[split] = _ranked(run, preference, comparisons, split, seed)
        elif run.first and run.config.data.source != CHITCHAT:
            jsonl.write(run.data / f"comparisons.{split}.jsonl", comparisons)
    if run.first and preference is not None:
        write_json(run.data / "rank.json", found)
    if run.config.data.source != CHITCHAT:
        run.log.say(
            f"rank: add `ranks` (1 is best, equal is a tie) to each line of {run.data}/comparisons.*.jsonl "
            "and save them as rankings.*.jsonl"
        )
    collectives.wait_for_all()


def _sampled(run: Session, file: str, count: int, seed: int) -> list[dict[str, Any]]:
    """K responses to each of the file's first prompts, K drawn anew for each, as rows without ranks.

    Collective: world.
    """
    settings = run.config.rank
    tokenizer = run.tokenizer()
    stream = PromptStream.load(
        run.data / f"{file}.jsonl", tokenizer, max_tokens=run.config.data.max_prompt_tokens, seed=seed
    )
    prompts = stream.first(min(count, len(stream)))
    k_P = numpy.random.default_rng(seed).integers(settings.responses_min, settings.responses_max + 1, len(prompts))
    repeated = prompts.select(torch.arange(len(prompts)).repeat_interleave(torch.from_numpy(k_P)))
    rollout = answers(run, run.weights(settings.policy), repeated, Draw(settings.temperature, seed=seed))
    responses, ended = iter(texts(rollout, tokenizer)), iter(rollout.ended_B.bool().tolist())
    return [
        {
            **stream.fields[place],
            "responses": list(islice(responses, k)),
            "ended": list(islice(ended, k)),
            "policies": [settings.policy] * k,
        }
        for k, place in zip(k_P.tolist(), prompts.ids_B.tolist(), strict=True)
    ]


def _ranked(
    run: Session, preference: GoldPreference, comparisons: list[dict[str, Any]], split: str, seed: int
) -> dict[str, float]:
    """Write one split's rankings; the gold scores and the oracle's accuracy on them."""
    golds = [_golds(preference, row) for row in comparisons]
    ranks = [
        labeler.rank(golds_K, noise=run.config.rank.noise, generator=seed * 1_000_003 + place)
        for place, golds_K in enumerate(golds)
    ]
    rows = [{**row, "ranks": ranks_K, "labeler": "gold"} for row, ranks_K in zip(comparisons, ranks, strict=True)]
    jsonl.write(run.data / f"rankings.{split}.jsonl", rows)
    count = sum(map(len, golds))
    return {
        "prompts": len(rows),
        "responses": count,
        "gold_mean": sum(map(sum, golds)) / count,
        "gold_best": sum(map(max, golds)) / len(golds),
        "oracle_accuracy": labeler.oracle_accuracy(golds, ranks),
    }


def _golds(preference: GoldPreference, row: dict[str, Any]) -> list[float]:
    asked = [row["prompt"]] * len(row["responses"])
    return [gold.total for gold in preference.scores(asked, row["responses"], row["ended"])]
