"""Proves that a stage's folder is read whole whatever layout wrote it, without its padded words, that a converted one
is what every layout loads, and that damage and names that lead elsewhere are refused in one sentence.

Not proved here: what the stages themselves write (tests/checkpoint); random damage (the fuzzed loaders).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.checkpoint import digest
from megatron_rlhf.checkpoint import manifest as manifests
from megatron_rlhf.checkpoint import weights as stage
from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import run, weights
from megatron_rlhf.convert.logical import Card
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


@on_grid(4)
@pytest.mark.parametrize(
    ("style", "scalar"),
    [*product(["gpt", "llama"], [False, True]), ("neox", False), pytest.param("neox", True, marks=pytest.mark.slow)],
)
def test_every_layout_is_joined_and_read_again(style: str, scalar: bool, tmp_path: Path) -> None:
    """tp2 pp2 and tp4 folders become one folder of whole tensors without padding, which pp4 and tp2 dp2 load."""
    model = replace((tiny.STYLES | tiny.RELATIVES)[style], vocabulary=101)
    for words in ("tp2 pp2", "tp4"):
        built = tiny.network(words, model, scalar=scalar)
        expected = tiny.weights(built)
        at = tmp_path / words.replace(" ", "_")
        role = "value" if scalar else "policy"
        stage.save(built, at / "stage", {"model": asdict(model), "role": role})
        if dist.get_rank() == 0:
            source = weights.open_source(at / "stage", None)
            assert source.card == Card(model, role)
            for name, shape in source.card.shapes().items():
                whole = source.read(name)
                assert tuple(whole.shape) == shape and whole.equal(expected[name][: shape[0]]), name
            run.convert(source, weights.write, at / "whole", quiet=True)
        dist.barrier()
        for other in ("pp4", "tp2 dp2 sp"):
            target = tiny.network(other, model, scalar=scalar, seed=9)
            found = stage.load(target, at / "whole")
            assert found["role"] == role
            for name, tensor in tiny.weights(target).items():
                rows = 101 if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None
                assert tensor[:rows].equal(expected[name][:rows]), (words, other, name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted policy in four files."""
    card = Card(tiny.MODEL, tokenizer={"tokenizer.json": b"{}"})
    generator = torch.Generator().manual_seed(3)
    held = {name: torch.randn(shape, generator=generator) for name, shape in card.shapes().items()}
    before = weights.LARGEST_FILE
    weights.LARGEST_FILE = 40_000
    try:
        weights.write(tmp_path / "made", card, iter(held.items()), torch.float32)
    finally:
        weights.LARGEST_FILE = before
    assert len(list((tmp_path / "made").glob("*.pt"))) > 3
    return tmp_path / "made"


def test_what_is_written_is_read(folder: Path) -> None:
    """The card with its tokenizer, and every tensor, from several files."""
    source = weights.open_source(folder, None)
    assert source.card == Card(replace(tiny.MODEL), tokenizer={"tokenizer.json": b"{}"})
    assert not source.missing() and not source.leftover()
    generator = torch.Generator().manual_seed(3)
    for name, shape in source.card.shapes().items():
        assert source.read(name).equal(torch.randn(shape, generator=generator))


def test_the_model_file_is_a_choice_of_the_group(folder: Path, tmp_path: Path) -> None:
    """`model=FOLDER/model.yaml` says the whole architecture, for either model; a wrong file is one sentence."""
    path = folder / "model.yaml"
    words = [f"model={path}", f"model@reward_model={path}", "experiment=quickstart"]
    config = load("sft", words)
    assert config.model == tiny.MODEL and config.reward_model == tiny.MODEL
    assert load("sft", [*words, "model.layers=7"]).model == replace(tiny.MODEL, layers=7)
    for text, sentence in (
        ("layers: [", "is no YAML of settings"),
        ("7", "is no YAML of settings"),
        ("[7]", "is no file of settings"),
        ("layer: 3", r"setting 'model\.layer' is unknown"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=sentence):
            load("sft", words)
    with pytest.raises(BadInput, match="is no file of settings; write model="):
        load("sft", [f"model={tmp_path}/none.yaml", "experiment=quickstart"])


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    del manifest["seal"]
    manifests.write(folder, manifest)


FIRST = "embedding.word_embeddings.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no model": (lambda found: found.pop("model"), "does not say of what model"),
    "an unknown key": (lambda found: found["model"].update(layer=1), r"setting 'model\.layer' is unknown"),
    "a type": (lambda found: found["model"].update(layers="4"), r"'model\.layers' is '4', it must be a whole number"),
    "layers": (lambda found: found["model"].update(layers=10**9), "layers=1000000000; it must be from 1 to"),
    "a style": (lambda found: found["model"].update(style="rnn"), "style=rnn is not one of gpt, llama"),
    "a role": (lambda found: found.update(role="reward"), "says role 'reward', and its tensors are not of one"),
    "a path out": (
        lambda found: found["tensors"][FIRST].update(files=["../made/part_0.pt"]),
        "is not dim, blocks, files of this folder, and shard",
    ),
    "no files": (lambda found: found["tensors"][FIRST].update(files=[]), "is not dim, blocks, files"),
    "a dimension": (lambda found: found["tensors"][FIRST].update(dim=5), "is not dim, blocks, files"),
    "a shard": (lambda found: found["tensors"][FIRST].update(shard=[1, 1]), r"is \[100, 32\], manifest\.json says"),
    "tensors": (lambda found: found.update(tensors=[]), "tensors"),
    "a tensor less": (lambda found: found["tensors"].pop(FIRST), f"{FIRST} is missing"),
    "a tensor more": (
        lambda found: found["tensors"].update(extra=found["tensors"][FIRST]),
        "extra is left over",
    ),
    "no digest": (lambda found: found["digests"].pop("part_0.pt"), r"has no digest of part_0\.pt"),
    "a digest": (
        lambda found: found["digests"]["part_0.pt"].update(sha256="0"),
        r"part_0\.pt has another content than was written",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_that_does_not_fit_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    change, sentence = REFUSED[name]
    changed(folder, change)
    with pytest.raises(BadInput, match=sentence) as refused:
        run.convert(weights.open_source(folder, None), weights.write, tmp_path / "out", quiet=True)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_manifest_that_was_edited_is_refused(folder: Path) -> None:
    """Its seal says so."""
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"layers": 4', '"layers": 5'))
    with pytest.raises(BadInput, match="is damaged: its content is not what its seal says"):
        weights.open_source(folder, None)


def test_damage_is_seen_before_a_tensor_is_read(folder: Path) -> None:
    """A bit, the end, or the whole of a file."""
    path = folder / "part_1.pt"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], b""):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"made is damaged: part_1\.pt has "):
            weights.open_source(folder, None)
    path.unlink()
    with pytest.raises(BadInput, match=r"made is damaged: part_1\.pt is missing"):
        weights.open_source(folder, None)


class Evil:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickles_are_not_run(folder: Path, tmp_path: Path) -> None:
    """Code, tensors without their numbers, and things that are no tensors."""
    path, victim = folder / "part_0.pt", tmp_path / "victim"
    expanded = torch.zeros(1).expand(100, 32)
    for value, sentence in (
        ({FIRST: Evil(str(victim))}, "is no file of weights"),
        ([1], "holds no dict of tensors"),
        ({FIRST: [1.0]}, "is no dense tensor"),
        ({FIRST: expanded}, "is no dense tensor with all its data"),
        ({FIRST: torch.eye(3).to_sparse()}, "is no dense tensor"),
        ({FIRST: torch.empty(3, device="meta")}, "is no dense tensor"),
    ):
        torch.save(value, path)
        changed(folder, lambda found: found["digests"].update({path.name: digest.of(path)}))
        with pytest.raises(BadInput, match=sentence):
            weights.open_source(folder, None)
    path.write_bytes(pickle.dumps({FIRST: Evil(str(victim))}))
    changed(folder, lambda found: found["digests"].update({path.name: digest.of(path)}))
    with pytest.raises(BadInput, match="is no file of weights"):
        weights.open_source(folder, None)
    assert not victim.exists()


def test_roles_are_asked_for(folder: Path, tmp_path: Path) -> None:
    """A policy is no value model; a reward model is one, and no policy."""
    with pytest.raises(BadInput, match="a language model without a scalar head"):
        weights.open_source(folder, "value")
    scalar = tmp_path / "scalar"
    run.convert(run.headed(weights.open_source(folder, None), "reward", 1), weights.write, scalar, quiet=True)
    assert weights.open_source(scalar, "value").card.role == "value"
    with pytest.raises(BadInput, match="have no output layer; write --role reward"):
        weights.open_source(scalar, "policy")
    shutil.rmtree(scalar)
