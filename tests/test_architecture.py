"""Proves the arrows between the rooms: who imports whom, who may see megatron, torch.distributed and the environment.

Not proved here: that a room does only what its name says, and what code does with objects that were handed in.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_rlhf"
FILES = sorted(PACKAGE.rglob("*.py"))

_GROUND = {"batch", "config", "observe"}
_GRID = _GROUND | {"parallel", "ops"}
_ROLES = _GRID | {"models", "checkpoint", "data"}
_PHASES = _ROLES | {"generate", "train", "reshard"}
# room: the rooms it may import besides itself; a room that is not here may not exist
MAY_IMPORT = {
    "config": set(),
    "observe": {"config"},
    "batch": set(),
    "algorithms": {"observe"},  # its stats only, see below
    "ops": set(),
    "parallel": _GROUND | {"ops"},
    "models": _GRID,
    "checkpoint": _GRID | {"models"},
    "data": _GRID,
    "generate": _ROLES,
    "train": _ROLES,
    "reshard": _ROLES | {"generate", "train"},
    "eval": _PHASES,
    "rollout": _PHASES | {"algorithms"},
    "convert": _ROLES | {"reshard"},  # of reshard its layout only, see below
    "plan": {"config", "observe", "reshard"},
    "doctor": {"config", "observe"},
    "status": {"config", "observe", "checkpoint"},  # of checkpoint the lock's names, which run without torch
    "sweep": {"config", "observe", "launch", "plan"},
    "launch": {"config"},
    "submit": {"config", "observe", "plan"},
    "recipes": _PHASES | {"algorithms", "rollout", "eval", "plan"},
    # what is heavier is imported by name, at dispatch
    "cli": {"config", "observe", "launch", "doctor", "status", "plan"},
    "__main__": {"cli"},
    "__init__": set(),
}
_LIGHT = {"config", "plan", "submit", "cli", "launch", "doctor", "status", "sweep"}
# Files outside the rooms without torch that are without it too.
_PURE = {f"reshard/{name}.py" for name in (
    "layout", "message", "topology", "shares", "deal", "routes", "rounds", "grouping", "bound", "plan")}  # fmt: skip
# Files outside those rooms that import megatron: its indexed datasets, its checkpoints.
_MEGATRON = ("data/pretraining.py", "convert/megatron.py")
# Files that import inside a function, and the optional package it is for.
LATE_IMPORTS = {
    "observe/board.py": "tensorboard, whose import pulls in torch",
    "observe/wandb.py": "wandb, an extra",
    "observe/mlflow.py": "mlflow, an extra",
    "observe/nemo.py": "nemo-toolkit, whose import takes ten seconds",
    "eval/gold.py": "vaderSentiment and profanity_check, of the quickstart only",
    "recipes/prepare.py": "profanity_check, of the quickstart only",
}


def name_of(file: Path) -> str:
    """The file's path inside the package."""
    return file.relative_to(PACKAGE).as_posix()


def room(name: str) -> str:
    """The room of a file's path inside the package."""
    return name.partition("/")[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Every module, and every name taken from a module, that `source` imports anywhere, dotted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def has(modules: set[str], *prefixes: str) -> bool:
    """Whether a module of `modules` is one of `prefixes` or inside it."""
    return any(module == prefix or module.startswith(f"{prefix}.") for module in modules for prefix in prefixes)


def faults(name: str, source: str) -> Iterator[str]:
    """A sentence for every arrow that the file of this name and source breaks."""
    modules, here = imports(source), room(name)
    ours = {module.split(".")[1] for module in modules if module.startswith("megatron_rlhf.")} - {"__version__"}
    if here not in MAY_IMPORT:
        yield f"{name}: there is no room '{here}' on the floor plan"
        return
    for other in sorted(ours - MAY_IMPORT[here] - {here}):
        yield f"{name}: {here} may not import {other}"
    if any(module.startswith(".") for module in modules):
        yield f"{name}: imports are absolute"
    yield from _foreign(name, here, modules)
    yield from _inner(name, source)


def _foreign(name: str, here: str, modules: set[str]) -> Iterator[str]:
    megatron = {"models", "train", "parallel", "checkpoint"}
    if has(modules, "megatron") and here not in megatron and name not in _MEGATRON:
        yield f"{name}: megatron is imported in {', '.join(sorted(megatron))} and {' and '.join(_MEGATRON)} only"
    if has(modules, "megatron.core.parallel_state") and name != "parallel/grid.py":
        yield f"{name}: parallel_state is imported in parallel/grid.py only"
    if any(module.endswith(".get_forward_backward_func") for module in modules) and name != "train/schedule.py":
        yield f"{name}: the schedule is imported in train/schedule.py only"
    distributed = here in {"parallel", "reshard", "train", "checkpoint"} or name == "convert/megatron.py"
    if has(modules, "torch.distributed") and not distributed:
        yield f"{name}: torch.distributed is imported in parallel, reshard, train, checkpoint, convert/megatron.py only"
    if here == "convert" and any(_beyond_layout(module) for module in modules):
        yield f"{name}: of reshard, convert sees reshard.layout only"
    if has(modules, "torch") and (here in _LIGHT or name in _PURE):
        yield f"{name}: {here} runs without torch"
    if has(modules, "hydra", "omegaconf") and name not in ("config/load.py", "config/multirun.py"):
        yield f"{name}: Hydra is known in config/load.py and multirun.py only"
    whole = {"config", "cli", "sweep", "recipes", "plan", "submit"}
    if has(modules, "megatron_rlhf.config.schema.Config") and here not in whole:
        yield f"{name}: the whole Config is seen by {', '.join(sorted(whole))} only; take the part that is needed"
    if here == "algorithms":
        allowed = ("torch", "math", "dataclasses", "collections", "typing", "__future__", "functools")
        foreign = {module for module in modules if not has({module}, *allowed, "megatron_rlhf.algorithms")}
        for module in sorted(foreign - {"megatron_rlhf.observe.stats.Stats"}):
            yield f"{name}: algorithms import torch and Stats only, not {module}"


def _beyond_layout(module: str) -> bool:
    reshard = "megatron_rlhf.reshard"
    return has({module}, reshard) and module != reshard and not has({module}, f"{reshard}.layout")


def _inner(name: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and name not in LATE_IMPORTS:
            late = [inner for inner in ast.walk(node) if isinstance(inner, (ast.Import, ast.ImportFrom))]
            if late:
                yield f"{name}:{late[0].lineno}: an import inside the function {node.name}"
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
        if reads and name not in ("config/env.py", "launch.py"):
            yield f"{name}: the environment is read in config/env.py only"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{name}:{node.lineno}: print; the one who talks is observe/log.py"
    if any(word in source for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X")):
        yield f"{name}: an unfinished thing is an issue, not a comment"
    if name.endswith("/__init__.py") and source.strip():
        yield f"{name}: an __init__ is empty"


def test_files_keep_to_the_arrows() -> None:
    assert len(FILES) > 20
    broken = [fault for file in FILES for fault in faults(name_of(file), file.read_text(encoding="utf-8"))]
    assert not broken, "\n" + "\n".join(broken)


def test_no_two_rooms_import_each_other() -> None:
    arrows: set[tuple[str, str]] = set()
    for file in FILES:
        here = room(name_of(file))
        modules = imports(file.read_text(encoding="utf-8"))
        arrows |= {(here, module.split(".")[1]) for module in modules if module.startswith("megatron_rlhf.")}
    assert not [f"{here} and {other}" for here, other in arrows if here < other and (other, here) in arrows]


def test_the_table_itself_has_no_circle() -> None:
    left = {here: set(others) for here, others in MAY_IMPORT.items()}
    while free := [here for here, others in left.items() if not others & set(left)]:
        for here in free:
            del left[here]
    assert not left, f"these rooms wait for each other: {sorted(left)}"


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("algorithms/x.py", "from megatron_rlhf.config.schema import Ppo", "may not import config"),
        ("algorithms/x.py", "import numpy", "torch and Stats only"),
        ("algorithms/x.py", "from megatron_rlhf.observe.log import write_text", "torch and Stats only"),
        ("train/x.py", "from megatron_rlhf.generate.engine import Generator", "may not import generate"),
        ("generate/x.py", "from megatron_rlhf import train", "may not import train"),
        ("train/x.py", "from megatron_rlhf.algorithms import gae", "may not import algorithms"),
        ("train/x.py", "from megatron_rlhf.config.schema import Config", "whole Config"),
        ("generate/x.py", "import megatron.core", "megatron is imported in"),
        ("generate/x.py", "from torch import distributed as dist", "torch.distributed is imported"),
        ("models/x.py", "from megatron.core import parallel_state", "parallel/grid.py only"),
        ("parallel/cpu.py", "import megatron.core.parallel_state", "parallel/grid.py only"),
        ("models/x.py", "from megatron.core.pipeline_parallel import get_forward_backward_func", "train/schedule.py"),
        ("convert/x.py", "import megatron.core", "megatron is imported in"),
        ("convert/x.py", "import torch.distributed", "torch.distributed is imported"),
        ("convert/x.py", "from megatron_rlhf.reshard import move", "reshard.layout only"),
        ("convert/x.py", "from megatron_rlhf.train.engine import Engine", "may not import train"),
        ("config/x.py", "import torch", "without torch"),
        ("reshard/layout.py", "import torch", "without torch"),
        ("reshard/plan.py", "from torch import Tensor", "without torch"),
        ("plan/x.py", "import torch", "without torch"),
        ("recipes/x.py", "from omegaconf import OmegaConf", "config/load.py"),
        ("utils/x.py", "", "no room 'utils'"),
        ("models/x.py", "def f():\n    import json", "inside the function f"),
        ("models/x.py", "import os\nos.environ['A']", "config/env.py only"),
        ("models/x.py", "from . import names", "absolute"),
        ("models/x.py", "print(1)", "print"),
        ("models/x.py", "# TO" + "DO later", "unfinished"),
        ("models/__init__.py", "import torch", "empty"),
    ],
)
def test_a_broken_arrow_is_seen(name: str, source: str, fault: str) -> None:
    found = list(faults(name, source))
    assert len(found) >= 1
    assert any(fault in sentence for sentence in found), found


def test_every_folder_is_a_package() -> None:
    folders = {file.parent for file in FILES}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_pure_files_exist() -> None:
    assert {name_of(file) for file in FILES} >= _PURE


@pytest.mark.parametrize(
    "module",
    [
        *("cli", "launch", "doctor", "status", "sweep", "config.load", "config.rules", "config.env", "plan.reshard"),
        *("observe.boards", "observe.pulse", "observe.watchdog", "submit.command"),
        "plan.memory",
        *("reshard.layout", "reshard.message", "reshard.plan", "reshard.grouping"),
    ],
)
def test_runs_without_importing_torch(module: str) -> None:
    code = f"import megatron_rlhf.{module}, sys; sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
