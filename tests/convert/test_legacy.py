"""Proves that Megatron-LM's folders of a file a rank are joined bit for bit over tp, pp and virtual stages, under the
names of Megatron-Core and those before it, and that what cannot be read is refused in one sentence.

Not proved here: files that a Megatron-LM of old has written itself; theirs are imitated from live Megatron-Core stages,
and by renaming.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import megatron, megatron_args
from megatron_rlhf.convert.logical import Card
from megatron_rlhf.models.names import Split
from megatron_rlhf.reshard import layout as places
from tests.helpers import checkpoints as tiny
from tests.helpers import roles
from tests.helpers.grid import on_grid

GPT, LLAMA = tiny.GPT, tiny.LLAMA
FILE = "model_optim_rng.pt"


@on_grid(4)
@pytest.mark.parametrize(
    ("model", "words", "scalar"),
    [
        (roles.MODEL, "tp2 pp2", False),
        (roles.LLAMA, "tp2 pp2 vp2", False),
        pytest.param(roles.LLAMA, "pp4", True, marks=pytest.mark.slow),
        pytest.param(roles.LLAMA, "tp4", False, marks=pytest.mark.slow),
    ],
)
def test_the_files_of_live_stages_are_joined(model: Model, words: str, scalar: bool, tmp_path: Path) -> None:
    """What `--ckpt-format torch` saves: each rank's `state_dict_for_save_checkpoint`, tied copy and padding too."""
    network = roles.network(words, model, scalar=scalar)
    expected = {
        name: tensor[:100] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else tensor
        for name, tensor in roles.weights(network).items()
    }
    grid = network.grid
    states = [chunk.state_dict_for_save_checkpoint() for chunk in network.chunks]
    named = {"model": states[0]} if len(states) == 1 else {f"model{place}": s for place, s in enumerate(states)}
    folder = tmp_path / "iter_0000007" / f"mp_rank_{grid.tp_rank:02d}_{grid.pp_rank:03d}"
    folder.mkdir(parents=True)
    args = argparse.Namespace(**megatron_args.args_of(model, roles.PADDED))
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 7, "optimizer": {}, **named}, folder / FILE)
    (tmp_path / megatron.TRACKER).write_text("7")
    dist.barrier()
    source = megatron.open_source(tmp_path)
    assert source.card.role == ("reward" if scalar else "policy")
    found = tiny.everything(source)
    assert tiny.same(found, {name: expected[name] for name in found}) and len(found) == len(expected)


def nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    """language_model's dicts in each other: its parts, and the layers' tensors under one name each."""
    found: dict[str, Any] = {}
    for name, tensor in flat.items():
        part, _, inner = name.partition(".")
        if part == "embedding":
            module, _, leaf = inner.partition(".")
            found.setdefault(part, {}).setdefault(module, {})[leaf] = tensor
        else:
            found.setdefault(part, {})[inner] = tensor
    return found


def old(folder: Path, card: Card, whole: dict[str, Tensor], tp: int, pp: int, **changes: Any) -> Path:
    """Folders of the language_model of before, cut from whole tensors."""
    specs = places.specs(card.model, card.model.vocabulary)
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            held: dict[str, Tensor] = {}
            for spec in places.stage(specs, Layout(tp=tp, pp=pp), pp_rank):
                part = Split(spec.dim, spec.blocks).part(whole[spec.name], tp, tp_rank).clone()
                first = places.layers(card.model.layers, Layout(tp=tp, pp=pp), pp_rank).start
                name = re.sub(r"layers\.(\d+)", lambda m, first=first: f"layers.{int(m[1]) - first}", spec.name)  # type: ignore[misc]
                held[tiny.old_name(name)] = part
            copy = held.pop("embedding.word_embeddings.weight", None) if pp_rank else None
            content = {
                "args": argparse.Namespace(**megatron_args.args_of(card.model, card.model.vocabulary)),
                "checkpoint_version": 3.0,
                "model": {"language_model": nested(held)},
                **changes,
            }
            if copy is not None:
                content["model"]["word_embeddings_for_head"] = {"weight": copy}
            inner = folder / (f"mp_rank_{tp_rank:02d}" if pp == 1 else f"mp_rank_{tp_rank:02d}_{pp_rank:03d}")
            inner.mkdir(parents=True)
            torch.save(content, inner / FILE)
    return folder


@pytest.mark.parametrize(
    ("model", "tp", "pp"),
    [(replace(GPT, vocabulary=100), 2, 2), (replace(LLAMA, vocabulary=100), 2, 4), (GPT, 1, 1), (tiny.NEOX, 1, 1)],
)
def test_the_names_of_before_are_read(model: Model, tp: int, pp: int, tmp_path: Path) -> None:
    card = Card(model)
    whole = tiny.tensors(card)
    source = megatron.open_source(old(tmp_path / "out", card, whole, tp, pp))
    assert tiny.same(tiny.everything(source), whole)
    assert megatron_args.normal(source.card.model) == megatron_args.normal(model)


@pytest.mark.parametrize("version", [0, 1.0, 2.0, "3", None])
def test_older_versions_are_refused_by_name(version: object, tmp_path: Path) -> None:
    """Rows of query, key and value lay in another order."""
    folder = old(tmp_path / "out", Card(GPT), tiny.tensors(Card(GPT)), 1, 1, checkpoint_version=version)
    assert f"has checkpoint_version {version}, before 3.0" in tiny.refused(megatron.open_source, folder)


def changed(file: Path, change: Any) -> None:
    """Load a file, change it, save it again."""
    content = torch.load(file, weights_only=False)
    change(content["model"]["language_model"])
    torch.save(content, file)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    """A missing rank, a copy that differs, a norm that differs between ranks, a tensor of no model, a shard too few."""
    model = replace(GPT, vocabulary=100)
    whole = tiny.tensors(Card(model))

    def fresh(name: str) -> Path:
        return old(tmp_path / name, Card(model), whole, 2, 2)

    folder = fresh("rank")
    (folder / "mp_rank_01_001" / FILE).rename(folder / "kept")
    assert "mp_rank_01_001 holds none of model_optim_rng.pt" in tiny.refused(megatron.open_source, folder)
    (folder / "mp_rank_01_001").rmdir()
    assert "2 tp and 2 pp ranks, and no file of (1, 1)" in tiny.refused(megatron.open_source, folder)

    folder = fresh("copy")
    changed(folder / "mp_rank_00_000" / FILE, lambda m: m["embedding"]["word_embeddings"]["weight"].mul_(2))
    assert "is not the word embedding that it is tied to" in tiny.refused(megatron.open_source, folder)

    folder = fresh("norm")
    changed(folder / "mp_rank_01_001" / FILE, lambda m: m["encoder"]["final_norm.weight"].mul_(2))
    source = megatron.open_source(folder)
    assert "differs between the ranks of tp" in tiny.refused(source.read, "decoder.final_layernorm.weight")

    folder = fresh("extra")
    changed(folder / "mp_rank_00_000" / FILE, lambda m: m["encoder"].update({"layers.0.router.weight": torch.ones(1)}))
    assert megatron.open_source(folder).leftover() == ["decoder.layers.0.router.weight"]

    folder = fresh("short")
    changed(folder / "mp_rank_01_001" / FILE, lambda m: m["encoder"].pop("layers.1.mlp.dense_4h_to_h.weight"))
    assert megatron.open_source(folder).missing() == ["decoder.layers.3.mlp.linear_fc2.weight"]

    folder = fresh("shape")
    wide = {"layers.1.mlp.dense_4h_to_h.weight": torch.ones(32, 65)}
    changed(folder / "mp_rank_01_001" / FILE, lambda m: m["encoder"].update(wide))
    source = megatron.open_source(folder)
    assert "the model wants [32, 128]" in tiny.refused(source.read, "decoder.layers.3.mlp.linear_fc2.weight")


def test_nothing_of_a_hostile_file_is_run(tmp_path: Path) -> None:
    """os.system among the weights and in the args; a tensor without its numbers; damage; dicts without end."""
    victim = tmp_path / "bitten"
    for name, change in (("args", {"args": tiny.Bite(victim)}), ("rng", {"rng_state": [tiny.Bite(victim)]})):
        folder = old(tmp_path / name, Card(GPT), tiny.tensors(Card(GPT)), 1, 1, **change)
        assert "asks for posix.system, which no weights need" in tiny.refused(megatron.open_source, folder)
    file = tmp_path / "args" / "mp_rank_00" / FILE
    torch.save({"checkpoint_version": 3.0, "model": {"w": torch.zeros(1).expand(1 << 40)}}, file)
    assert "no dense tensor" in tiny.refused(megatron.open_source, tmp_path / "args")
    inner: dict[str, Any] = {}
    for _ in range(40):
        inner = {"a": inner}
    torch.save({"checkpoint_version": 3.0, "model": inner}, file)
    assert "deeper than 8 dicts" in tiny.refused(megatron.open_source, tmp_path / "args")
    whole = (tmp_path / "rng" / "mp_rank_00" / FILE).read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"garbage" * 40):
        file.write_bytes(damage)
        assert "is no file of torch.save" in tiny.refused(megatron.open_source, tmp_path / "args")
    assert not victim.exists()
