"""Proves that words of the command line and files of settings, whatever is in them, make a configuration that the rules
judge, or are refused in one sentence.

Not proved here: that the sentence is the best one (test_load, test_rules); the files under configs/, which are ours.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from megatron_rlhf.config import rules
from megatron_rlhf.config.load import load
from megatron_rlhf.config.schema import Model
from tests.helpers import guard
from tests.helpers.damage import changed, damaged

KEYS = (
    *("ppo.lam", "ppo.iterations", "ppo.kl", "ppo.kl.adaptive", "seed", "model.tied", "model.layers", "model.heads"),
    *("layout.policy", "out", "data.source", "checkpoint.best", "checkpoint.allow", "adam.beta1", "sampling.top_p"),
    *("model", "layout", "experiment", "cluster", "model@reward_model"),
)
VALUES = (
    *("1", "0", "-1", "0.5", "nan", "inf", "-inf", "1e999", "1e3", "1_000", "0x10", "9" * 50, "9" * 400, "1" * 5000),
    *(
        "true",
        "null",
        "~",
        "'a",
        '"',
        "{a: 1}",
        "{",
        "[1,2]",
        "[",
        "((",
        "a,b",
        "a:b",
        "\\",
        "\0",
        "\n",
        "\x1b[2J",
        "é",
    ),
    *("${seed}", "${oc.env:HOME}", "${", "${a.b}", "${out}", "${model}", "${ppo.lam}", "\ud800", "???", "x" * 3000, ""),
    *("tp2 pp2", "tp0", f"tp{10**30}", "@3-1", "@0-99999999", "order=x", "quickstart", "cpu4", "../x", "@a", "tp２"),
    *("choice(1,2)", "range(1,9)", "glob(*)", "int(3)", "extend_list(1)", "sort(3,1)", "[" * 2000, "(" * 2000, " "),
)
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
YAML = (
    *(
        "x: !!python/object/apply:os.system ['touch ../escaped']\n",
        "layers: 1\nlayers: 2\n",
        "<<: *x\n",
        "? [a]\n: 1\n",
    ),
    *(
        "--- 1\n--- 2\n",
        "x: &x [*x]\n",
        "&x a: *x\n",
        "<<: &x {a: *x}\n",
        "hidden: ${layers}\nlayers: ${hidden}\n",
        BOMB,
    ),
    *("layers: " + "[" * 3000, "layers: " + "9" * 5000 + "\n", "init_std: " + "9" * 400 + "\n", "2020-01-01: 1\n"),
    *("layers: 2020-13-45\n", "layers: 1:60:99999999999\n", "!!binary x: 1\n", "ffn: !!int a\n", "ffn: !!float []\n"),
    *("ffn: !!timestamp x\n", "ffn: !!set {a}\n", "tied: !!bool 3\n", "1: 2\n", "null: 1\n", "ffn: ${oc.env:HOME}\n"),
)


@pytest.mark.parametrize("numbers", [range(20), pytest.param(range(20, 800), marks=pytest.mark.slow)], ids=len)
def test_words_of_the_command_line(numbers: range, tmp_path: Path) -> None:
    """One or two settings, of known keys mostly, with values that Hydra's grammar, numbers or layouts trip over."""

    def case(folder: Path, chance: random.Random) -> guard.Load:
        words = ["experiment=quickstart"]
        for _ in range(chance.randint(1, 2)):
            key, value = chance.choice(KEYS), chance.choice(VALUES)
            if chance.random() < 0.15:
                hydra = ("hydra.run.dir", "hydra/launcher", "defaults", "", "x\ny", key.upper(), key[:-1], f"{key}.x")
                key = chance.choice((f"+{key}", f"++{key}", f"~{key}", f"{key}@x", *hydra))
            if chance.random() < 0.2:
                value = damaged(value.encode("utf-8", "replace"), chance).decode("utf-8", "surrogateescape")
            words.append(f"{key}={value}" if chance.random() < 0.97 else key)
        verb = chance.choice(("ppo", "sft", "quickstart", "sample"))
        return lambda: rules.check(load(verb, words), 4, verb)

    found = guard.each("words", case, numbers, tmp_path)
    assert found["read"] and found["refused"], found


@pytest.mark.parametrize("numbers", [range(10), pytest.param(range(10, 200), marks=pytest.mark.slow)], ids=len)
def test_a_file_of_settings(numbers: range, tmp_path: Path) -> None:
    """The model.yaml of converted weights: other values, hostile YAML, damaged text."""
    base = asdict(Model(layers=4, hidden=128, heads=4, vocabulary=2048, context=128))

    def case(folder: Path, chance: random.Random) -> guard.Load:
        tree = changed(base, chance, 1) if chance.random() < 0.7 else base
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=chance.random() < 0.5).encode("utf-8", "replace")
        if chance.random() < 0.3:
            text += chance.choice(YAML).encode()
        if chance.random() < 0.3:
            text = damaged(text, chance, 2)
        (folder / "model.yaml").write_bytes(text)
        words = ["experiment=quickstart", f"model={folder}/model.yaml"]
        return lambda: rules.check(load("sft", words), 4, "sft")

    found = guard.each("settings", case, numbers, tmp_path)
    assert found["refused"] and (found["read"] or len(numbers) < 100), found
