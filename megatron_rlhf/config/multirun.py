"""Hydra's --multirun: which points a sweep's words make, and running them through a launcher of Hydra's.

A word such as `seed=1,2` or `ppo.episodes=choice(8,16)` has several values in Hydra's grammar; the points are their
product, in Hydra's order. With `load.py` the one place that knows Hydra.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, Transformer
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher

from megatron_rlhf.config.load import choices, directory, hydra_words
from megatron_rlhf.config.rules import BadInput

GROUP = "scaling"
"""The group whose folders are sweeps: `scaling=laptop` is every file of configs/scaling/laptop."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point: its words as a verb takes them."""

    words: tuple[str, ...]


def points(words: Sequence[str]) -> list[Point]:
    """The product of what the words' values are; one point where each has a single value.

    Raises BadInput where Hydra's grammar does not take a word that has a comma or a bracket.
    """
    with initialize_config_dir(str(directory()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        values = [_values(word, parser) for word in map(_whole, words)]
    return [Point(tuple(chosen)) for chosen in itertools.product(*values)]


def together(points: Sequence[Point]) -> list[list[int]]:
    """The numbers of the points in parts that each are a product again, since that is all that Hydra sweeps over."""
    columns = [list(dict.fromkeys(column)) for column in zip(*(point.words for point in points), strict=True)]
    if math.prod(len(column) for column in columns) == len(points):
        return [list(range(len(points)))]
    return [[number] for number in range(len(points))]


def run(
    recipe: str, points: Sequence[Point], hydra_words: Sequence[str], folder: Path, task: Callable[[int], object]
) -> None:
    """Calls `task` with the place of each of the points, which are a product, wherever Hydra's launcher runs them.

    `folder` takes what Hydra writes. Exits with 1 where Hydra or its launcher fails.
    """
    columns = [list(dict.fromkeys(column)) for column in zip(*(point.words for point in points), strict=True)]
    sys.argv = [
        "megatron-rlhf",
        "--multirun",
        *(word for column in columns for word in _joined(column)),
        *(f"hydra.sweep.dir={folder}", f"hydra.job.name={recipe}", "hydra.sweep.subdir=${hydra.job.num}"),
        *hydra_words,
    ]

    def point(_composed: object) -> object:
        return task(int(HydraConfig.get().job.num))

    hydra.main(config_path=str(directory()), config_name=recipe, version_base="1.3")(point)()


def launchers() -> list[str]:
    """Names of Hydra's launchers that are installed."""
    found = {item.__module__ for item in Plugins.instance().discover(Launcher)}
    return [name for name, module in _LAUNCHERS.items() if any(module in item for item in found)]


_LAUNCHERS: Mapping[str, str] = {
    "basic": "basic_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "slurm": "hydra_submitit_launcher",
}


def _whole(word: str) -> str:
    """A sweep's name is all its files."""
    key, sign, value = word.partition("=")
    if key.lstrip("+") != GROUP or not sign or any(letter in value for letter in ",(/"):
        return word.removeprefix("+") if key == f"+{GROUP}" else word
    if value not in sweeps():
        raise BadInput(
            f"scaling={value} is unknown; there are {', '.join(sweeps())}, for example scaling={sweeps()[0]}"
        )
    return f"{GROUP}={','.join(f'{value}/{name}' for name in choices(f'{GROUP}/{value}'))}"


def sweeps() -> list[str]:
    """The sweeps of configs/scaling."""
    return sorted(folder.name for folder in (directory() / GROUP).iterdir() if folder.is_dir())


def _values(word: str, parser: OverridesParser) -> list[str]:
    """`key=value` words, one a value."""
    key, sign, value = word.partition("=")
    if not sign or not any(letter in value for letter in ",("):
        return [word]
    try:
        override: Override = parser.parse_overrides([word])[0]  # this one knows the groups that glob looks into
        if not override.is_sweep_override():
            return [f"{key}={_text(override.value())}"]
        if not override.is_discrete_sweep():
            raise BadInput(f"'{word}' is an interval; a sweep needs its values, for example {key}=1,2")
        return [f"{key}={_text(item)}" for item in override.sweep_iterator(transformer=Transformer.identity)]
    except HydraException as error:
        first = str(error).splitlines()[0]
        raise BadInput(f"'{word}' is no list of values ({first}); write for example {key}=1,2") from error


def _text(value: Any) -> str:
    if isinstance(value, QuotedString):
        return str(value.text)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(words: Sequence[str]) -> list[str]:
    """One override of Hydra's with the values of all `words`, which share their key."""
    first, *others = (hydra_words(word) for word in words)
    if not others:
        return first
    return [",".join([first[0], *(other[0].partition("=")[2] for other in others)])]
