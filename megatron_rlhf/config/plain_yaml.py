"""YAML of settings that somebody else wrote: plain values, each key once, and no more of them than there is text for.

A few lines of aliases can stand for gigabytes, and for a list that holds itself.
"""

from __future__ import annotations

from typing import Any

import yaml

_MOST = 1_000_000
"""Values in one document, each counted as often as an alias repeats it."""


class Loader(yaml.SafeLoader):
    """Plain values; a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping of different keys."""
        keys = [key.value for key, _ in getattr(node, "value", ()) if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def load(text: str, loader: Any = Loader) -> Any:
    """The values of the one document in `text`. Raises ValueError, one line, where there is none to be read."""
    try:
        found = yaml.load(text, Loader=loader)
        if _count(found, {}) > _MOST:
            raise ValueError("its aliases make it far too long; write the values out")
    # a scalar that its tag does not fit raises nearly anything
    except (yaml.YAMLError, RecursionError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(_said(error)) from error
    return found


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values it stands for; RecursionError for one that holds itself."""
    if not isinstance(value, dict | list | tuple):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in inner)
    if known[id(value)] < 0:
        raise RecursionError("a list holds itself")
    return known[id(value)]


def _said(error: BaseException) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem[:120]}"
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
