"""The quickstart's gold preference as recipes use it: on rank 0, over texts that are decoded there."""

from __future__ import annotations

from megatron_rlhf.batch import Rollout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import jsonl
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.eval.gold import GoldPreference
from megatron_rlhf.eval.words import lexicon
from megatron_rlhf.recipes.session import Session

CHITCHAT = "chitchat"


def gold_preference(run: Session) -> GoldPreference | None:
    """The gold preference with the words of the training text, on rank 0; None elsewhere.

    Raises BadInput for a corpus it was not made for: rankings then come from people, by JSONL.
    """
    if run.config.data.source != CHITCHAT:
        raise BadInput(
            f"there is no gold preference for data.source={run.config.data.source}: put the labelers' rankings into "
            f"{run.data}/rankings.train.jsonl and rankings.valid.jsonl"
        )
    if not run.first:
        return None
    told = jsonl.read(run.data / "demonstrations.train.jsonl", ["prompt", "response"])
    return GoldPreference(lexicon([f"{row['prompt']}\n{row['response']}" for row in told]))


def texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The responses as text."""
    rows = rollout.rows
    spans = zip(rows.tokens_BT.tolist(), rows.prompt_lengths_B.tolist(), rows.lengths_B.tolist(), strict=True)
    return [tokenizer.decode(tokens[start:end]) for tokens, start, end in spans]
