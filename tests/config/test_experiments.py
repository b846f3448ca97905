"""Proves that the instructgpt experiments run with the numbers of arXiv 2203.02155 (section 3.5, table 6, appendix C),
and that whatever else their files set says it is open.

Not proved here: that the open choices are the authors', and that a run fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import pytest
import yaml

from megatron_rlhf.config.load import choices, directory, load
from megatron_rlhf.config.rules import check
from megatron_rlhf.config.schema import Config

SIZES = {"instructgpt_1b3": 8, "instructgpt_6b": 64, "instructgpt_175b": 1024}
"""Experiment and the ranks it is laid out for."""

PAPER: dict[str, Any] = {
    "model.vocabulary": 50257,
    "model.context": 2048,
    "reward_model.layers": 32,
    "reward_model.hidden": 4096,
    "reward_model.heads": 32,
    "reward_model.vocabulary": 50257,
    "reward_model.context": 2048,
    "adam.beta1": 0.9,
    "adam.beta2": 0.95,
    "data.max_prompt_tokens": 1024,
    "data.max_response_tokens": 1024,
    "data.prompts_per_user": 200,
    "sampling.max_tokens": 1024,
    "sampling.temperature": 1.0,
    "sft.epochs": 16,
    "sft.dropout": 0.2,
    "sft.pretraining_fraction": 0.0,
    "sft.learning.schedule": "cosine",
    "sft.learning.final": 0.1,
    "sft.learning.warmup": 0,
    "rl_start.epochs": 2,
    "rl_start.pretraining_fraction": 0.1,
    "rl_start.learning.schedule": "cosine",
    "rl_start.learning.final": 0.1,
    "rank.prompts": 33207,
    "rank.valid_prompts": 17887,
    "rank.responses_min": 4,
    "rank.responses_max": 9,
    "reward.epochs": 1,
    "reward.batch": 64,
    "reward.learning.rate": 9e-6,
    "reward.learning.schedule": "cosine",
    "reward.learning.final": 0.1,
    "ppo.iterations": 500,
    "ppo.episodes": 512,
    "ppo.minibatches": 8,
    "ppo.epochs": 1,
    "ppo.gamma": 1.0,
    "ppo.clip": 0.2,
    "ppo.average_decay": 0.992,
    "ppo.pretraining_coef": 27.8,
    "ppo.pretraining_ratio": 8,
    "ppo.kl.coef": 0.02,
    "ppo.kl.adaptive": False,
    "ppo.policy.schedule": "constant",
    "ppo.policy.warmup": 10,
    "ppo.policy.warmup_start": 0.1,
    "ppo.value.schedule": "constant",
    "evaluate.prompts": 3196,
    # GPT-3, arXiv 2005.14165, appendix B
    "pretrain.length": 2048,
    "pretrain.learning.schedule": "cosine",
    "pretrain.learning.final": 0.1,
    "pretrain.learning.warmup_start": 0.0,
}
"""The same for every size of policy."""

BY_SIZE = {
    "model.layers": (24, 32, 96),
    "model.hidden": (2048, 4096, 12288),
    "model.heads": (16, 32, 96),  # 16 of Stiennon et al. 2020: the table's 24 x 128 is not 2048
    "sft.batch": (32, 32, 8),
    "sft.learning.rate": (9.65e-6, 9.65e-6, 5.03e-6),
    "rl_start.batch": (32, 32, 8),
    "rl_start.learning.rate": (5e-6, 1.04e-5, 2.45e-6),
    "ppo.value.rate": (9e-6, 9e-6, 5e-6),
    # GPT-3, table 2.1: 1 M, 2 M and 3.2 M tokens a step, 300 B in all, 375 M of warm-up
    "pretrain.batch": (512, 1024, 1536),
    "pretrain.steps": (286_000, 143_000, 95_400),
    "pretrain.learning.rate": (2e-4, 1.2e-4, 6e-5),
    "pretrain.learning.warmup": (358, 179, 119),
}


def read(config: Config, key: str) -> Any:
    """The setting at a dotted key."""
    return reduce(getattr, key.split("."), config)


def printed(experiment: str) -> dict[str, Any]:
    """What the papers print for an experiment."""
    place = list(SIZES).index(experiment)
    return PAPER | {key: numbers[place] for key, numbers in BY_SIZE.items()}


def written(experiment: str) -> Iterator[tuple[str, bool]]:
    """Every setting of the experiment's file, and whether its line or that of a section around it says "open:"."""
    text = (directory() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, path: tuple[str, ...], open_here: bool) -> Iterator[tuple[str, bool]]:
        for key, value in node.value:
            is_open = open_here or "open:" in lines[key.start_mark.line]
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, (*path, key.value), is_open)
            else:
                yield ".".join((*path, key.value)), is_open

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return walk(root, (), False)


def test_every_size_of_the_paper_is_here() -> None:
    assert set(choices("experiment")) >= set(SIZES)


@pytest.mark.parametrize("experiment", SIZES)
def test_loads_and_validates_in_its_world(experiment: str) -> None:
    check(load("ppo", [f"experiment={experiment}"]), SIZES[experiment])


@pytest.mark.parametrize("experiment", SIZES)
def test_keeps_the_papers_numbers(experiment: str) -> None:
    config = load("ppo", [f"experiment={experiment}"])
    assert {key: read(config, key) for key in printed(experiment)} == printed(experiment)


@pytest.mark.parametrize("experiment", SIZES)
def test_derived_numbers(experiment: str) -> None:
    """256 k episodes, minibatches of 64, 4,000 updates; the open rate lies in the window that did not diverge."""
    run = load("ppo", [f"experiment={experiment}"])
    ppo = run.ppo
    assert (ppo.iterations * ppo.episodes, ppo.episodes // ppo.minibatches) == (256_000, 64)
    assert ppo.iterations * ppo.minibatches * ppo.epochs == 4000
    assert ppo.policy.rate in {"instructgpt_175b": (2.55e-6, 3.74e-6)}.get(experiment, (5e-6,))
    assert ppo.policy.rate <= 8.05e-6
    tokens = run.pretrain.steps * run.pretrain.batch * run.pretrain.length
    assert abs(tokens - 300e9) < 0.5e9
    assert abs(run.pretrain.learning.warmup * run.pretrain.batch * run.pretrain.length - 375e6) < 1e6


@pytest.mark.parametrize("experiment", SIZES)
def test_what_is_not_printed_says_open(experiment: str) -> None:
    """A setting in the file is one of the table above, or its line says where it is from."""
    settings = dict(written(experiment))
    assert {"compute.micro_batch", "data.source", "ppo.policy.rate", "ppo.policy.epsilon"} <= set(settings)
    silent = {key for key, is_open in settings.items() if not is_open} - set(printed(experiment))
    assert silent == {"defaults", "out"}
