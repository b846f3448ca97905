"""What a state was saved under and what the run that takes it up has: layouts may differ, settings may not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rlhf import __version__
from megatron_rlhf.config.rules import BadInput

_SHOWN = 12


def versions() -> dict[str, str]:
    """The packages that compute."""
    return {
        "torch": importlib.metadata.version("torch"),
        "megatron-core": importlib.metadata.version("megatron-core"),
        "megatron-rlhf": __version__,
    }


@dataclass(frozen=True, slots=True)
class Terms:
    """The settings that decide what a run computes, by their keys, its layouts by role and its ranks; `allow` names
    settings that may differ from a state's, `plan` is the digest of the phase switch's plan."""

    settings: Mapping[str, Any]
    layout: Mapping[str, str]
    world: int
    allow: tuple[str, ...] = ()
    plan: str = ""
    versions: Mapping[str, str] = field(default_factory=versions)

    def facts(self) -> dict[str, Any]:
        """What a manifest says of them."""
        text = json.dumps(dict(self.settings), sort_keys=True)
        return {
            "settings": dict(self.settings),
            "settings_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "layout": dict(self.layout),
            "world": self.world,
            "plan": self.plan,
            "versions": dict(self.versions),
        }

    def compare(self, facts: Mapping[str, Any], where: str) -> list[str]:
        """Sentences on what may differ from a state's `facts` and does. Raises BadInput for settings that may not."""
        changed = _changed(facts["settings"], self.settings)
        refused = {key: text for key, text in changed.items() if key not in self.allow}
        if refused:
            shown = "; ".join(list(refused.values())[:_SHOWN]) + ("; ..." if len(refused) > _SHOWN else "")
            raise BadInput(
                f"{where} was saved with other settings: {shown}. Run it as it was started, or write "
                f"'checkpoint.allow={','.join(refused)}', or give another `out`, or checkpoint.resume=never"
            )
        said = [f"{where}: {'; '.join(changed.values())}, as checkpoint.allow says"] if changed else []
        places = [f"layout.{text}" for text in _changed(facts["layout"], self.layout).values()]
        if facts.get("world") != self.world:
            places.append(f"ranks were {facts.get('world')}, are {self.world}")
        if places:
            said.append(f"{where}: {'; '.join(places)}: goes on equal to rounding, not bit for bit")
        elif facts.get("plan") and self.plan and facts["plan"] != self.plan:
            said.append(f"{where}: the phase switch has another plan than when it was saved")
        saved = facts.get("versions")
        if packages := _changed(saved if isinstance(saved, dict) else {}, self.versions):
            said.append(f"{where}: {'; '.join(packages.values())}: goes on equal to rounding, not bit for bit")
        return said


def _changed(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """By key, in words, what differs."""
    keys: Iterable[str] = sorted({*saved, *here})
    return {
        key: f"{key} {f'was {_shown(saved[key])}' if key in saved else 'was not there'}, "
        f"{f'is {_shown(here[key])}' if key in here else 'is gone'}"
        for key in keys
        if key not in saved or key not in here or saved[key] != here[key]
    }


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"'{value}'" if value == "" else str(value)
