"""What is foreseen of one point of a sweep, to lie beside what is then measured. Pure, no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from megatron_rlhf.config.load import flat
from megatron_rlhf.config.schema import Config
from megatron_rlhf.plan.reshard import reshard


def point(config: Config, world: int, verb: str, *, foreseen: bool) -> dict[str, Any]:
    """What the plan is for and, where machines were chosen for a `verb` that switches, the switch's part; keys that are
    missing were not foreseen."""
    told = {
        "world": world,
        "layouts": asdict(config.layout),
        "cluster": asdict(config.cluster),
        "settings": {key: value for key, value in flat(config).items() if key != "out"},
    }
    return {**told, "reshard": json.loads(reshard(config).as_json())} if foreseen and verb == "ppo" else told
