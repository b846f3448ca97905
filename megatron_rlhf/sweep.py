"""`megatron-rlhf VERB --multirun`: a sweep's points, here one after the other or on a cluster through SLURM.

The folder of a sweep holds `sweep.json` (all points) and a folder a point with its run, `plan.json`, what was foreseen,
and `measurement.json`, what was found. A point whose measurement stands is not run again.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from megatron_rlhf import __version__, launch
from megatron_rlhf.config import env, multirun
from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput, check
from megatron_rlhf.config.schema import Config
from megatron_rlhf.config.world import needed
from megatron_rlhf.observe.log import CONSOLE, write_json
from megatron_rlhf.plan import point as plan

SWEEP, PLAN, MEASUREMENT = "sweep.json", "plan.json", "measurement.json"
_LAUNCHER = "hydra/launcher="
_SLURM = ("slurm", "submitit_slurm")
_SPEEDS = ("cluster.flops", "cluster.bandwidth")


def run(verb: str, words: Sequence[str]) -> int:
    """0 when every point is measured, 1 when some failed, which are named, 75 when a signal stopped it before the end.

    Every point's settings are checked, and its plan is written, before the first is started. Raises BadInput.
    """
    if env.launched():
        raise BadInput("--multirun starts the ranks of every point itself; run it without srun or torchrun")
    hydra_words = [word for word in words if word.startswith(("hydra.", "hydra/", "+hydra"))]
    settings = [word for word in words if word not in hydra_words]
    launcher = _launcher(hydra_words)
    folder = _folder(settings)
    points = multirun.points([word for word in settings if not word.startswith("out=")])
    configs = [_config(verb, number, point.words, folder) for number, point in enumerate(points)]
    worlds = [needed(config.layout) for config in configs]
    groups = _groups(points, worlds)
    cluster = {
        world: _size(config, world) if launcher in _SLURM else [] for config, world in zip(configs, worlds, strict=True)
    }
    named: list[dict[str, Any]] = [
        {"name": _name(number, world), "words": list(point.words), "world": world}
        for number, (point, world) in enumerate(zip(points, worlds, strict=True))
    ]
    facts = {
        "verb": verb,
        "points": named,
        "groups": [{"points": group, "hydra": [*cluster[worlds[group[0]]], *hydra_words]} for group in groups],
    }
    _no_other(folder, facts)
    write_json(folder / SWEEP, facts)
    for point, config, world in zip(named, configs, worlds, strict=True):
        write_json(
            folder / point["name"] / PLAN, plan.point(config, world, verb, foreseen=_names_machines(point["words"]))
        )
    stopped = _start(folder, [group for group in range(len(groups)) if not _measured(folder, facts, group)], launcher)
    failed = _told(folder, facts)
    return launch.STOPPED if failed and stopped else failed


def group(folder: str, number: int) -> None:
    """Hands one of a sweep's groups to Hydra, in a process of its own, and returns when its points have ended."""
    facts = json.loads((Path(folder) / SWEEP).read_text(encoding="utf-8"))
    chosen = facts["groups"][number]
    points = [multirun.Point(tuple(facts["points"][place]["words"])) for place in chosen["points"]]
    hydra_folder = Path(folder) / ".hydra" / str(number)
    multirun.run(facts["verb"], points, chosen["hydra"], hydra_folder, lambda job: point(folder, chosen["points"][job]))


def point(folder: str, number: int) -> int:
    """Runs one point of a sweep, as one of its ranks where the scheduler started several, and writes down what was
    found; the exit code of its verb."""
    facts = json.loads((Path(folder) / SWEEP).read_text(encoding="utf-8"))
    mine = facts["points"][number]
    out = Path(folder) / mine["name"]
    if (out / MEASUREMENT).exists():
        return 0
    words = [facts["verb"], *mine["words"], f"out={out}"]
    if env.launched():
        code = subprocess.run([sys.executable, "-m", "megatron_rlhf", *words], check=False).returncode
    else:
        code = launch.run(mine["world"], words)
        if code == launch.STOPPED:  # a signal that stops a point stops those after it
            raise SystemExit(code)
    if env.rank() == 0 and code == 0:
        write_json(out / MEASUREMENT, measured(out, mine))
    return code


def measured(out: Path, point: Mapping[str, Any]) -> dict[str, Any]:
    """What the rows of a point's run say of its speed: medians over its steps but the first, which warms up.

    A step's seconds are its tokens over its tokens a second; seconds by phase are of rank 0 and hold its waiting.
    """
    settings = json.loads((out / PLAN).read_text(encoding="utf-8"))["settings"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("tokens_per_second") and row.get("tokens")]
    last = rows[-1]["phase"]
    rows = [row for row in rows if row["phase"] == last]
    rows = rows[1:] if len(rows) > 1 else rows
    phases = {name for row in rows for name in row.get("seconds_by_phase", {})}
    seconds = [row["tokens"] / row["tokens_per_second"] for row in rows]
    return {
        "name": point["name"],
        "words": point["words"],
        "world": point["world"],
        "phase": last,
        "steps": len(rows),
        "episodes": settings["ppo.episodes"] if last == "ppo" else None,
        "tokens": median(row["tokens"] for row in rows),
        "tokens_per_second": median(row["tokens_per_second"] for row in rows),
        "seconds": median(seconds),
        "seconds_low": min(seconds),
        "seconds_high": max(seconds),
        "seconds_by_phase": {
            name: median(row.get("seconds_by_phase", {}).get(name, 0.0) for row in rows) for name in sorted(phases)
        },
        "memory_bytes": max((row.get("memory_bytes", 0) for row in rows), default=0),
        "slowest_ratio": median(row.get("slowest.ratio", 1.0) for row in rows),
        "machine": {"processors": os.cpu_count(), "kind": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "megatron-rlhf": __version__, "torch": version("torch")},
    }


def _config(verb: str, number: int, words: Sequence[str], folder: Path) -> Config:
    try:
        config = load(verb, [*words, f"out={folder / str(number)}"])
        check(config, needed(config.layout), verb)
    except BadInput as error:
        raise BadInput(f"point {number} ({' '.join(words)}): {error}") from error
    return config


def _no_other(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises BadInput where the folder holds other points: what they measured would be taken for these ones'."""
    try:
        there = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if (there.get("verb"), there.get("points")) != (facts["verb"], facts["points"]):
        raise BadInput(f"{folder} holds another sweep; give this one a folder of its own, for example out={folder}2")


def _folder(settings: Sequence[str]) -> Path:
    given = [word.partition("=")[2] for word in settings if word.startswith("out=")]
    if given and any(letter in given[-1] for letter in ",("):
        raise BadInput(f"out={given[-1]} is the folder of the whole sweep; write for example out=runs/scaling")
    return Path(given[-1] if given else "runs/sweep").resolve()


def _launcher(words: Sequence[str]) -> str:
    for word in words:
        if word.startswith("hydra/sweeper"):
            raise BadInput(
                f"'{word}': a sweep's points are known before it starts, which Hydra's own sweeper does; leave it out"
            )
    name = next((word.removeprefix(_LAUNCHER) for word in words if word.startswith(_LAUNCHER)), "basic")
    installed = multirun.launchers()
    if name not in installed:
        hint = "; run pip install 'megatron-rlhf[slurm]'" if name in (*_SLURM, "submitit_local") else ""
        raise BadInput(f"Hydra's launcher '{name}' is not installed{hint} (there are {', '.join(installed)})")
    return name


def _groups(points: Sequence[multirun.Point], worlds: Sequence[int]) -> list[list[int]]:
    """The numbers of the points that are started together: of one world, for a job array has one size."""
    found = []
    for world in sorted(set(worlds)):
        here = [number for number, size in enumerate(worlds) if size == world]
        found += [[here[place] for place in part] for part in multirun.together([points[number] for number in here])]
    return found


def _size(config: Config, world: int) -> list[str]:
    """The launcher's words for a world of `cluster.node` ranks a node."""
    node = config.cluster.node
    if world > node and world % node:
        raise BadInput(
            f"{world} ranks do not fill nodes of cluster.node={node}; write for example cluster.node={world}"
        )
    return [f"hydra.launcher.nodes={-(-world // node)}", f"hydra.launcher.tasks_per_node={min(world, node)}"]


def _names_machines(words: Sequence[str]) -> bool:
    """Whether a point says which machines it runs on; a plan for others would foresee nothing of it."""
    return any(word.startswith("cluster=") or word.partition("=")[0] in _SPEEDS for word in words)


def _name(number: int, world: int) -> str:
    return f"{number:02}_ranks{world}"


def _measured(folder: Path, facts: Mapping[str, Any], group: int) -> bool:
    places = facts["groups"][group]["points"]
    return all((folder / facts["points"][place]["name"] / MEASUREMENT).exists() for place in places)


def _start(folder: Path, groups: Sequence[int], launcher: str) -> bool:
    """Runs the groups as processes: all at once where a scheduler has them wait, else one after the other.

    Whether a signal stopped them; it is passed on, and reaches the ranks of a point that runs here.
    """
    code = "import sys; from megatron_rlhf import sweep; sweep.group(sys.argv[1], int(sys.argv[2]))"
    commands = [[sys.executable, "-c", code, str(folder), str(number)] for number in groups]
    running: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for command in commands:
            if not received:
                running.append(subprocess.Popen(command))
            if launcher not in _SLURM:
                running[-1].wait()
        for process in running:
            process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return bool(received)


def _told(folder: Path, facts: Mapping[str, Any]) -> int:
    missing = [point["name"] for point in facts["points"] if not (folder / point["name"] / MEASUREMENT).exists()]
    count = len(facts["points"])
    CONSOLE.print(f"{count - len(missing)} of {count} points are measured; megatron-rlhf report scaling {folder}")
    if missing:
        CONSOLE.print(f"without a measurement: {', '.join(missing)}; run the same command again to try them")
    return 1 if missing else 0
