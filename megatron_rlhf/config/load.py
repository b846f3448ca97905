"""From a recipe's name and `key=value` words to a Config: the one place that knows Hydra.

Hydra composes the YAML files under configs/; what comes out is a plain dict, and frozen dataclasses are built from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Config

T = TypeVar("T")
# what a setting of each type is called, and a value of it
_KINDS = {
    int: ("a whole number", "1"),
    float: ("a number", "0.1"),
    str: ("text", "name"),
    bool: ("true or false", "true"),
}

# groups that stand in no file's defaults: the schema's own values are one of their choices
_ADDED = ("cluster", "slurm", "scaling")
# groups that take a file of settings too, by its path
_FILES = ("model", "slurm")


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The Config that configs/<recipe>.yaml and the `key=value` words make.

    Raises BadInput with one sentence that names the key when a word, a key or a value is wrong.
    """
    groups, settings = _sorted(recipe, overrides)
    texts = {key: value for key, value in settings if _leaves(Config).get(key) is str}
    values = [f"++{key}={value}" for key, value in settings if key not in texts]
    try:
        with initialize_config_dir(str(directory()), version_base="1.3"):
            composed = compose(recipe, overrides=[*groups, *values])
        return build(Config, _plain(composed, texts))
    except (HydraException, OmegaConfBaseException) as error:
        raise BadInput(f"{recipe}: {_sentence(error)}") from error


def hydra_words(word: str) -> list[str]:
    """A `key=value` word as Hydra's own grammar takes it, several for a file of settings.

    Raises BadInput for an unknown key or choice.
    """
    groups, settings = _kinds([word])
    return groups + [
        f"++{key}={_quoted(value) if _leaves(Config).get(key) is str else value}" for key, value in settings
    ]


def directory() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def choices(group: str) -> list[str]:
    """The names a group such as `layout` offers, sorted; with their folder those of `scaling`."""
    folder = directory() / group
    nested = folder.rglob("*.yaml") if group == "scaling" else folder.glob("*.yaml")
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in nested)


def resolved(config: Config) -> dict[str, Any]:
    """Every setting of the run, defaults included, as a plain dict that JSON and YAML can hold."""
    return asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its key, `ppo.kl.coef` and the like."""
    return _flat(resolved(config))


def _flat(settings: Mapping[Any, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = _join(path, str(name))
        found.update(_flat(value, key) if isinstance(value, Mapping) else {key: value})
    return found


def build(kind: type[T], values: object, path: str = "") -> T:
    """`values` as the dataclass `kind`; a section that is left out takes its defaults.

    Raises BadInput for an unknown key (naming the nearest), a missing one and a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise BadInput(f"'{path}' is {values!r}, it must be a group of settings, for example {path}.{_some_leaf(kind)}")
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise BadInput(_unknown(_join(path, str(name))))
    hints = get_type_hints(kind)
    given = {name: _value(hints[name], known[name], values, path) for name in known if _is_given(known[name], values)}
    return kind(**given)


def _is_given(item: Field[Any], values: Mapping[Any, Any]) -> bool:
    return item.name in values or (item.default is MISSING and item.default_factory is MISSING)


def _value(kind: Any, item: Field[Any], values: Mapping[Any, Any], path: str) -> Any:
    key = _join(path, item.name)
    if is_dataclass(kind):
        return build(kind, values.get(item.name, {}), key)  # type: ignore[arg-type]
    value = values.get(item.name, "???")
    noun, example = _KINDS[kind]
    example = example if item.default is MISSING else str(item.default).lower() if kind is bool else str(item.default)
    if value == "???":
        raise BadInput(f"'{key}' is missing; write for example {key}={example}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise BadInput(f"'{key}' is {value!r}, it must be {noun}, for example {key}={example or _KINDS[kind][1]}")
    return value


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _kinds(overrides: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words that choose a group's file, as Hydra writes them, and the settings."""
    groups: list[str] = []
    settings: list[tuple[str, str]] = []
    for word in overrides:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise BadInput(f"'{word}' is no setting; write key=value, for example ppo.iterations=20")
        group, _, section = key.partition("@")
        if group in _FILES and value.endswith(".yaml"):
            settings.extend(_settings(group, section or group, Path(value)))
        elif group in _groups():
            groups.append(_chosen(key, group, value))
        elif key in _leaves(Config) or key in _sections(Config):
            settings.append((key, value))
        else:
            raise BadInput(_unknown(key))
    return groups, settings


def _sorted(recipe: str, overrides: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    groups, settings = _kinds(overrides)
    if recipe not in choices("."):
        raise BadInput(f"recipe '{recipe}' is unknown; there are {', '.join(choices('.'))}")
    if _asks_for_experiment(recipe) and not any(word.startswith("experiment=") for word in groups):
        raise BadInput(
            f"{recipe} needs an experiment; write {recipe} experiment=quickstart (there are "
            f"{', '.join(choices('experiment'))})"
        )
    return groups, settings


def _chosen(key: str, group: str, value: str) -> str:
    if value not in choices(group):
        near = _nearest(value, choices(group))
        raise BadInput(f"{key}={value} is unknown; the nearest is {key}={near} (there are {', '.join(choices(group))})")
    # Hydra knows a group whose package has its own name by the bare name; one no recipe names is added
    added = "+" if group in _ADDED else ""
    return f"{added}{group if key == f'{group}@{group}' else key}={value}"


def _settings(group: str, section: str, path: Path) -> list[tuple[str, str]]:
    """The settings of a file such as the model.yaml beside converted weights, as words of `section`."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
    except (OmegaConfBaseException, YAMLError, UnicodeError, OSError) as error:
        raise BadInput(f"{path} is no YAML of settings: {_sentence(error)}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} is no file of settings; write {section}={choices(group)[0]}, or a file's path")
    leaves, found = _leaves(Config), _flat(values, section)
    for key, value in found.items():
        if key not in leaves:
            raise BadInput(f"{path}: {_unknown(key)}")
        if leaves[key] is str and not isinstance(value, str):
            # 24:00:00 is a number of seconds in YAML
            raise BadInput(f"{path}: '{key}' is read as {value!r}, it must be text; write it in quotes")
    return [(key, _word(value)) for key, value in found.items()]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _asks_for_experiment(recipe: str) -> bool:
    defaults = OmegaConf.to_container(OmegaConf.load(directory() / f"{recipe}.yaml"))
    assert isinstance(defaults, dict)
    return {"experiment": "???"} in defaults.get("defaults", [])


def _groups() -> list[str]:
    return sorted(folder.name for folder in directory().iterdir() if folder.is_dir() and folder.name != "hydra")


def _plain(composed: DictConfig, texts: Mapping[str, str]) -> object:
    OmegaConf.set_struct(composed, False)
    # text goes in as it was typed: layout words and paths may hold what Hydra's grammar of values refuses
    for key, text in texts.items():
        OmegaConf.update(composed, key, text, force_add=True)
    return OmegaConf.to_container(composed, resolve=True)


def _leaves(kind: Any, path: str = "") -> dict[str, type]:
    hints = get_type_hints(kind)
    found: dict[str, type] = {}
    for item in fields(kind):
        key, hint = _join(path, item.name), hints[item.name]
        found.update(_leaves(hint, key) if is_dataclass(hint) else {key: hint})
    return found


def _some_leaf(kind: Any) -> str:
    key, value = next(iter(_leaves(kind).items()))
    return f"{key}={_KINDS[value][1]}"


def _sections(kind: Any) -> set[str]:
    return {key[:place] for key in _leaves(kind) for place, letter in enumerate(key) if letter == "."}


def _unknown(key: str) -> str:
    names = [*_leaves(Config), *_groups()]
    return f"setting '{key}' is unknown; the nearest is '{_nearest(key, names)}'"


def _nearest(name: str, names: Sequence[str]) -> str:
    """The name that is nearly the same, else one of the same last word, else the most alike."""
    last = name.rpartition(".")[2]
    same = [known for known in names if known.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    return [*alike, *same, *difflib.get_close_matches(name, names, n=1, cutoff=0.0)][0]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
