"""What a recipe reads is looked at before any rank is started or any network is built; no torch.

A wrong line of held-out data is found here and not when the training it was to measure is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rlhf.checkpoint import manifest
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config
from megatron_rlhf.data import comparison, jsonl, sources
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.observe import boards
from megatron_rlhf.recipes import places

SCALAR = "reward"
"""The stage whose weights have a scalar head."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a recipe reads of the data room and of earlier stages, and the stages that it writes."""

    rows: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def check(verb: str, config: Config, *, made: tuple[str, ...] = ()) -> None:
    """Raises BadInput for what `verb` will read and is missing, malformed, empty or of another vocabulary, and for a
    board that is not installed.

    The weights of the stages in `made` will be there by then and are not looked at. Nothing is looked at where its
    results stand already; `prepare` itself reads the source before it writes.
    """
    boards.check(config.observe)
    room = places.data(config)
    prepared = config.checkpoint.resume == "auto" and (room / "prepare.json").exists()
    if verb == "prepare" or (verb == "quickstart" and not prepared):
        sources.check(config.data.source)
    needs = _needs(config).get(verb)
    if needs is None or _done(needs, config):
        return
    Tokenizer.load(room, config.data.end_token).check_vocabulary(config.model.vocabulary)
    for name in needs.rows:
        _rows(room / f"{name}.jsonl")
    for name in needs.text:
        for path in (room / f"pretraining.{name}.bin", room / f"pretraining.{name}.idx"):
            if not path.is_file():
                raise BadInput(f"{path} is missing; megatron-rlhf prepare writes it")
    for stage in (stage for stage in needs.weights if stage not in made):
        folder = places.weights(config, stage)
        found = manifest.manifest(folder)
        manifest.check(found, folder, vocabulary=config.model.vocabulary, head=stage == SCALAR)


def _needs(config: Config) -> dict[str, Needs]:
    held_out, untrained = ("prompts.test", "demonstrations.valid"), config.checkpoint.untrained
    return {
        "pretrain": Needs(text=("train", "valid"), writes=("pretrain",)),
        "sft": Needs(
            ("demonstrations.train", "demonstrations.valid"), ("train", "valid"), ("pretrain",), ("sft", "rl_start")
        ),
        "rank": Needs(("prompts.rank", "prompts.rank_valid"), weights=(config.rank.policy,)),
        "reward": Needs(
            ("rankings.train", "rankings.valid", "demonstrations.train"), weights=("sft",), writes=("reward",)
        ),
        "ppo": Needs(("prompts.train",), ("train",), () if untrained else ("rl_start", SCALAR), ("ppo",)),
        "sample": Needs(("prompts.test",), weights=("ppo",)),
        "evaluate": Needs(held_out, ("valid",), ("pretrain", "sft", "ppo", SCALAR)),
    }


def _done(needs: Needs, config: Config) -> bool:
    standing = [(places.weights(config, stage) / manifest.FILE).exists() for stage in needs.writes]
    return config.checkpoint.resume == "auto" and bool(standing) and all(standing)


def _rows(path: Path) -> None:
    kind = path.name.partition(".")[0]
    if kind == "rankings":
        jsonl.read(path, comparison.FIELDS, comparison.check)
    elif not path.is_file():
        raise BadInput(f"{path} is missing; megatron-rlhf prepare writes it")
    else:
        jsonl.read(path, ("prompt", "response") if kind == "demonstrations" else ("prompt",))
