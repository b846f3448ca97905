"""Proves that `compute.head_rows` reaches what every language model of a recipe that trains reads.

Not proved here: what it does there (models/test_vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest

from megatron_rlhf.config.load import load
from megatron_rlhf.models import roles
from megatron_rlhf.recipes import ppo, pretrain, sft

RECIPES: dict[str, tuple[Any, tuple[str, ...], Callable[[Any], object]]] = {
    "pretrain": (pretrain, ("PretrainingStream",), pretrain.pretrain),
    "sft": (
        sft,
        ("PretrainingStream", "demonstrations_of", "weights"),
        lambda run: sft.tune(run, "sft", run.config.sft),
    ),
    "ppo": (ppo, (), ppo.prepared),
}


@pytest.mark.parametrize("verb", RECIPES)
def test_the_setting_is_the_read_s(verb: str) -> None:
    """The recipe runs up to where it asks for log-probs, on a session that has no world."""
    recipe, absent, run = RECIPES[verb]
    session = mock.MagicMock(config=load(verb, ["experiment=quickstart", "compute.head_rows=77"]))
    asked = mock.Mock(side_effect=InterruptedError)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(roles, "logprobs", asked))
        for name in absent:
            stack.enter_context(mock.patch.object(recipe, name))
        with pytest.raises(InterruptedError):
            run(session)
    assert asked.call_args.kwargs == {"head_rows": 77}
