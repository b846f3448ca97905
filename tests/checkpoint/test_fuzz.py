"""Proves that manifests of states and of weights that are damaged, or sealed anew around other content, are passed over
or refused in one sentence, on every rank alike: no crash, no hang, nothing loaded that does not fit.

Not proved here: damaged bytes of the tensors' files, which their digests show (test_damage, test_states).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rlhf.checkpoint import digest, manifest, states, weights
from megatron_rlhf.checkpoint.differences import Terms
from megatron_rlhf.checkpoint.resume import Keeper
from megatron_rlhf.config.schema import Checkpoint
from megatron_rlhf.parallel import collectives
from tests.helpers import guard
from tests.helpers import roles as tiny
from tests.helpers.damage import changed, json_bytes
from tests.helpers.grid import on_grid

STATE: dict[str, Any] = {
    "step": 3,
    "phase": "",
    "serial": 1,
    "metrics": {"score": 0.5},
    "settings": {"seed": 1},
    "layout": {"policy": "tp1"},
    "world": 1,
    "versions": {"torch": "2"},
    "files": {"rank_0.pt": {"bytes": 4, "sha256": "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"}},
    "roles": {"policy": {"a": {"dim": 0, "blocks": 1, "tp": 1, "shape": [6], "pieces": [[0, 0, 6, "rank_0.pt"]]}}},
}


def sealed(facts: Any, chance: random.Random) -> Any:
    """The facts with a seal that fits them, mostly."""
    if isinstance(facts, dict) and chance.random() < 0.9:
        facts.pop("seal", None)
        facts["seal"] = manifest._seal(facts)
    return facts


@pytest.mark.parametrize("numbers", [range(80), pytest.param(range(80, 1500), marks=pytest.mark.slow)], ids=len)
def test_manifests_of_states(numbers: range, tmp_path: Path) -> None:
    """Three states in a folder: what is whole is chosen, compared and let go, the rest says what is wrong with it."""

    def case(folder: Path, chance: random.Random) -> guard.Load:
        for step in range(3):
            facts = {**STATE, "step": step, "serial": step}
            facts = sealed(changed(facts, chance), chance) if chance.random() < 0.8 else sealed(facts, chance)
            place = folder / f"step_{step}"
            place.mkdir()
            (place / manifest.FILE).write_bytes(json_bytes(facts, chance))
            (place / "rank_0.pt").write_bytes(b"abcd")
        settings = Checkpoint(best=chance.choice(("", "max score")), keep_every=2, allow="seed")
        terms = Terms({"seed": 1}, {"policy": "tp1"}, 1)

        def read() -> None:
            found = states.listed(folder)
            for state in found:
                assert state.fault.isprintable() and len(state.fault) < 500
                if not state.fault:
                    digest.faults(folder / state.name, state.facts["files"], digests=True)
                    terms.compare(state.facts, state.name)
            states.superseded(found, settings)

        return read

    found = guard.each("states", case, numbers, tmp_path)
    assert found["read"], found


@on_grid(4, timeout=600)
@pytest.mark.parametrize("numbers", [range(12), pytest.param(range(12, 200), marks=pytest.mark.slow)], ids=len)
def test_four_ranks_agree_on_what_a_manifest_is_worth(numbers: range, tmp_path: Path) -> None:
    """A tp2 pp2 network under a changed manifest of its weights, and of its state: loaded, or refused by every rank."""
    role, words = tiny.engine("tp2 pp2"), {"policy": "tp2 pp2"}
    stage, shelf = tmp_path / "weights", tmp_path / "state"
    weights.save(role.network, stage)
    Keeper(shelf, Checkpoint(), Terms({}, words, 4), lambda text: None).save(1, {}, {"policy": role}, wait=True)
    sound = {file: file.read_bytes() for file in (shelf / "step_1" / manifest.FILE, stage / manifest.FILE)}
    outcomes = set()
    for number in numbers:
        chance = random.Random(f"agreement {number}")
        of_state = chance.random() < 0.5
        file = (shelf / "step_1" if of_state else stage) / manifest.FILE
        facts = json.loads(sound[file])
        if number % 5:
            facts = changed(facts, chance, 1 if number % 2 else 3)
        other = json.dumps(sealed(facts, chance)).encode("utf-8", "surrogatepass")
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(other)
        dist.barrier()

        def load(of_state: bool = of_state) -> None:
            if not of_state:
                weights.load(role.network, stage)
            elif found := Keeper(shelf, Checkpoint(), Terms({}, words, 4), lambda text: None).load():
                found.fill({"policy": role})

        said = guard.outcome(load, 30.0)
        everyone = collectives.gather_objects(said if isinstance(said, str) else f"{type(said).__name__}: {said}")
        assert isinstance(said, str), f"case {number}: {everyone}"
        assert len({bool(each) for each in everyone}) == 1, f"case {number}: {everyone}"
        outcomes.add(bool(said))
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(sound[file])
    assert outcomes == {True, False}
