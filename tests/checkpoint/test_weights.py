"""Proves that weights written under one layout are read bit-equal under another, and that a wrong folder is refused.

Not proved here: file systems that reorder writes; a machine that loses power.
"""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_rlhf.checkpoint import manifest, weights
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.recipes import losses
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid


@on_grid(4)
@pytest.mark.parametrize(
    ("words", "tied"),
    [
        ("dp4", True),
        ("tp2 pp2", False),
        ("pp2 @2-3", True),
        pytest.param("dp4", False, marks=pytest.mark.slow),
        pytest.param("tp2 pp2", True, marks=pytest.mark.slow),
    ],
)
def test_any_layout_reads_what_any_wrote(words: str, tied: bool, tmp_path: Path) -> None:
    """After an optimizer step, on every rank, replicas and tied copies too; extra facts come back."""
    role = tiny.engine(words, model=replace(tiny.MODEL, tied=tied), rate=0.01)
    role.accumulate(tiny.rows(), losses.language)
    role.update()
    expected = tiny.main_weights(role)
    weights.save(role.network, tmp_path / "policy", {"which": "tiny", "step": 1})
    assert manifest.manifest(tmp_path / "policy")["step"] == 1
    for target_words in ("tp2 pp2", "pp4", "tp4", "tp2 dp2 sp", tiny.ONE):
        target = tiny.network(target_words, role.network.model, seed=77)
        assert weights.load(target, tmp_path / "policy")["which"] == "tiny"
        assert tiny.equal(tiny.weights(target), expected), target_words
        assert tiny.copies_agree(target), target_words


@on_grid(4)
def test_a_scalar_models_head_comes_along(tmp_path: Path) -> None:
    """A value model starts from a reward model: weight and bias of the head too."""
    reward, value = tiny.network("tp2 pp2", scalar=True, seed=1), tiny.network("tp2 dp2 sp", scalar=True, seed=2)
    weights.save(reward, tmp_path / "reward")
    weights.load(value, tmp_path / "reward")
    assert tiny.equal(tiny.weights(value), tiny.weights(reward))


@on_grid(4)
def test_a_wrong_folder_is_refused(tmp_path: Path) -> None:
    """No folder, a tensor that is not there and another shape are one sentence each."""
    built = tiny.network("tp2 pp2")
    with pytest.raises(BadInput, match="no weights at .*nowhere"):
        weights.load(built, tmp_path / "nowhere")
    weights.save(built, tmp_path / "policy")
    with pytest.raises(BadInput, match=r"has no tensor decoder\.layers\.4\."):
        weights.load(tiny.network("tp2 pp2", replace(tiny.MODEL, layers=6)), tmp_path / "policy")
    with pytest.raises(BadInput, match=r"is \(.*32.*\), the model wants \(.*64.*\)"):
        weights.load(tiny.network("tp2 pp2", replace(tiny.MODEL, hidden=64)), tmp_path / "policy")


@on_grid(4)
def test_the_vocabulary_and_the_head_are_checked_before_any_tensor(tmp_path: Path) -> None:
    """Another vocabulary within the same padded rows, and a language model where a head is read, are one sentence."""
    weights.save(tiny.network("tp2 pp2"), tmp_path / "policy")
    with pytest.raises(BadInput, match=r"policy holds a model of 100 tokens and model\.vocabulary=101; write"):
        weights.load(tiny.network("tp2 pp2", replace(tiny.MODEL, vocabulary=101)), tmp_path / "policy")
    scalar = tiny.network("tp2 pp2", scalar=True)
    with pytest.raises(BadInput, match=r"policy has no tensor head\.weight, the scalar head"):
        weights.load(scalar, tmp_path / "policy")
    weights.load(scalar, tmp_path / "policy", fresh=("head.weight", "head.bias"))


@on_grid(4)
@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_may_differ(tied: bool, tmp_path: Path) -> None:
    """Layouts of another run pad 100 words to 128, 102 or 100 rows: the words are the same, what is behind is 0."""
    model = replace(tiny.MODEL, tied=tied)
    built = {rows: tiny.network("tp2 pp2", model, rows=rows, seed=rows) for rows in (128, 102, 100)}
    names = ["embedding.word_embeddings.weight"] + ([] if tied else ["output_layer.weight"])
    for saved, network in built.items():
        weights.save(network, tmp_path / f"{saved}")
        expected = tiny.weights(network)
        for rows in built:
            target = tiny.network("tp1 pp2 dp2", model, rows=rows, seed=7)
            weights.load(target, tmp_path / f"{saved}")
            found = tiny.weights(target)
            for name, tensor in found.items():
                whole = expected[name]
                if name in names:
                    assert not tensor[min(rows, saved) :].any() and len(tensor) == rows
                    tensor, whole = tensor[:100], whole[:100]
                assert tensor.equal(whole), (saved, rows, name)


@on_grid(4)
def test_a_save_that_fails_keeps_the_last_one(tmp_path: Path) -> None:
    """The folder is whole or not at all: the old weights stay until every file of the new ones is written."""
    first, second = tiny.network("tp2 pp2", seed=1), tiny.network("tp2 pp2", seed=2)
    folder = tmp_path / "policy"
    weights.save(first, folder)
    expected = tiny.weights(first)
    for place, rank in (("torch.save", 1), ("megatron_rlhf.checkpoint.manifest.write_text", 0)):
        full = OSError(errno.ENOSPC, "No space left on device") if dist.get_rank() == rank else None
        planted = mock.patch(place, side_effect=full) if full else nullcontext()
        with planted, pytest.raises(OSError, match="No space left"):
            weights.save(second, folder)
    target = tiny.network("dp4", seed=3)
    weights.load(target, folder)
    assert tiny.equal(tiny.weights(target), expected)
    weights.save(second, folder)
    weights.load(target, folder)
    assert tiny.equal(tiny.weights(target), tiny.weights(second))
    assert set(json.loads((folder / "manifest.json").read_text())["tensors"]) == set(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
