"""Proves that Megatron-Core and this project read each other's distributed checkpoints bit for bit, under any layout.

Not proved here: damage (test_megatron_damage.py), checkpoints of other versions of Megatron-Core than the one
installed, and of the zarr backend, which is refused by name.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert import megatron, megatron_args
from megatron_rlhf.convert.logical import Card
from megatron_rlhf.models.transformer import Network
from tests.helpers import checkpoints as tiny
from tests.helpers import roles
from tests.helpers.grid import on_grid

GPT, LLAMA, NEOX = tiny.GPT, tiny.LLAMA, tiny.NEOX


def sharded(network: Network, **metadata: Any) -> dict[str, Any]:
    """The state that Megatron-LM saves: its model or virtual stages. Collective: world."""
    assert network.grid.groups is not None
    # Megatron asks the global state for this rank of a tied copy; ours is never initialised
    with mock.patch("megatron.core.parallel_state.get_data_parallel_rank", return_value=network.grid.dp_rank):
        states = [
            chunk.sharded_state_dict(metadata={"dp_cp_group": network.grid.groups.dp_cp, **metadata})
            for chunk in network.chunks
        ]
    return {"model": states[0]} if len(states) == 1 else {f"model{place}": state for place, state in enumerate(states)}


def filled(network: Network, folder: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of `network` after Megatron-Core has loaded the checkpoint into it. Collective: world."""
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(sharded(network), str(folder))
    for place, chunk in enumerate(network.chunks):
        chunk.load_state_dict(state["model" if len(network.chunks) == 1 else f"model{place}"])
    return roles.weights(network)


def trimmed(whole: dict[str, torch.Tensor], vocabulary: int) -> dict[str, torch.Tensor]:
    """The tensors without the rows that pad the vocabulary."""
    return {
        name: tensor[:vocabulary] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else tensor
        for name, tensor in whole.items()
    }


@on_grid(4)
@pytest.mark.parametrize(
    ("model", "saved", "loaded", "scalar", "numbered"),
    [
        (roles.MODEL, "tp2 pp2", "tp1 pp4", False, False),
        (roles.LLAMA, "tp1 pp2 vp2 dp2", "tp2 pp2 sp", False, True),
        (roles.LLAMA, "tp2 pp2", "tp2 pp2 vp2", True, False),
        pytest.param(roles.LLAMA, "tp4", "tp2 dp2", False, False, marks=pytest.mark.slow),
        pytest.param(replace(roles.LLAMA, tied=True), "pp4", "tp2 pp2", False, False, marks=pytest.mark.slow),
        pytest.param(roles.MODEL, "tp2 dp2", "pp4", True, True, marks=pytest.mark.slow),
        pytest.param(roles.NEOX, "tp2 pp2", "tp1 pp4", False, False, marks=pytest.mark.slow),
        pytest.param(roles.RELATIVES["biased"], "tp1 pp2 dp2", "tp2 pp2 vp2", False, True, marks=pytest.mark.slow),
    ],
)
def test_megatron_core_and_we_read_each_other(
    model: Model, saved: str, loaded: str, scalar: bool, numbered: bool, tmp_path: Path
) -> None:
    """What Megatron-Core saved under one layout we read, what we write it loads under another, bit for bit; the 28 rows
    that pad the vocabulary come and go. `numbered` has a key a layer, and a gated projection in halves."""
    from megatron.core import dist_checkpointing

    network = roles.network(saved, model, scalar=scalar)
    expected = trimmed(roles.weights(network), model.vocabulary)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    if dist.get_rank() == 0:
        theirs.mkdir()
    dist.barrier()
    args = argparse.Namespace(**megatron_args.args_of(model, roles.PADDED), tensor_model_parallel_size=2)
    state = {**sharded(network, singleton_local_shards=numbered), "args": args, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(theirs))
    dist.barrier()
    if dist.get_rank() == 0:
        source = megatron.open_source(theirs)
        assert source.card.role == ("reward" if scalar else "policy")
        assert megatron_args.normal(source.card.model) == megatron_args.normal(replace(model, init_std=0.1))
        found = tiny.everything(source)
        assert tiny.same(found, {name: expected[name] for name in found}) and len(found) == len(expected)
        megatron.write(ours, source.card, tiny.stream(found), torch.float32, layout="tp2 pp2")
    dist.barrier()
    target = roles.network(loaded, model, scalar=scalar, seed=99)
    again = filled(target, ours / "release")
    assert tiny.same(trimmed(again, model.vocabulary), expected)
    for name, tensor in again.items():
        assert tensor.shape == expected[name].shape or not tensor[model.vocabulary :].any(), name
    assert roles.copies_agree(target)


@pytest.mark.parametrize(
    ("model", "role", "tp", "dtype"),
    [
        (GPT, "policy", 1, torch.float32),
        (GPT, "value", 2, torch.float16),
        (LLAMA, "policy", 4, torch.bfloat16),
        (
            replace(LLAMA, tied=True, rope=Rope(base=500000.0, scaling="llama3", factor=32.0)),
            "reward",
            2,
            torch.float32,
        ),
        (replace(LLAMA, rope=Rope(scaling="yarn", factor=4.0, original_context=32)), "policy", 4, torch.float32),
        (replace(LLAMA, qkv_bias=True), "policy", 2, torch.float32),
        (replace(LLAMA, linear_bias=True, head_dim=6), "value", 4, torch.float32),
        (NEOX, "policy", 4, torch.bfloat16),
        (replace(NEOX, tied=True, activation="gelu_tanh"), "reward", 2, torch.float32),
        (replace(LLAMA, rope=Rope(scaling="linear", factor=2.0), norm_epsilon=1e-6), "policy", 1, torch.float32),
    ],
)
def test_there_and_back(model: Model, role: str, tp: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Architecture, role, tokenizer and every bit come back; torch's own reader finds the same tensors."""
    precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    card = Card(replace(model, precision=precision), role, {"tokenizer.model": b"pieces"})
    expected = tiny.tensors(card, dtype=dtype)
    tiny.megatron_folder(tmp_path / "out", card, expected, layout=f"tp{tp}")
    source = megatron.open_source(tmp_path / "out")
    assert tiny.same(tiny.everything(source), expected)
    assert megatron_args.normal(source.card.model) == megatron_args.normal(card.model)
    assert (source.card.role, source.card.tokenizer) == (role, {"tokenizer.model": b"pieces"})
    again = megatron.megatron_card.read_model(tmp_path / "out" / "model.yaml")
    assert asdict(again) == asdict(card.model)

    key = "decoder.layers.mlp.linear_fc1.weight"
    state = {key: torch.zeros(4, *expected["decoder.layers.0.mlp.linear_fc1.weight"].shape, dtype=dtype)}
    dcp.load(state, storage_reader=FileSystemReader(tmp_path / "out" / "release"), no_dist=True)
    for layer in range(4):
        assert state[key][layer].equal(expected[f"decoder.layers.{layer}.mlp.linear_fc1.weight"])


def renamed(name: str, style: str) -> str:
    """A name as other programs have it: with a prefix, of local or of Transformer Engine's layers."""
    fused = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    fused = fused.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return {"local": name, "model": f"model.{fused}", "module": f"model.module.{name}"}[style]


def saved_by_torch(folder: Path, state: dict[str, Any], model: Model | None) -> Path:
    """A checkpoint that torch's own writer made, with a YAML of the model beside it."""
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    if model is not None:
        torch.save({"args": argparse.Namespace(**megatron_args.args_of(model, 128))}, folder / "common.pt")
    return folder


@pytest.mark.parametrize("style", ["local", "model", "module"])
def test_a_key_a_layer_with_any_prefix(style: str, tmp_path: Path) -> None:
    """Names of local and of fused layers are read with and without prefix, whole or in halves; the training's state and
    Transformer Engine's are no leftovers, and a tensor of no model is."""
    card = Card(LLAMA)
    expected = tiny.tensors(card)
    state: dict[str, Any] = {renamed(name, style): tensor for name, tensor in expected.items()}
    key = renamed("decoder.layers.1.mlp.linear_fc1.weight", style)
    state[f"{key}_w"], state[f"{key}_v"] = state.pop(key).chunk(2)
    state["optimizer.state.exp_avg.embedding.word_embeddings.weight"] = torch.ones(2)
    state["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.ones(1)
    source = megatron.open_source(saved_by_torch(tmp_path / "all", state, LLAMA))
    assert tiny.same(tiny.everything(source), expected)
    state["decoder.layers.0.mlp.router.weight"] = torch.ones(2)
    lost = state.pop(renamed("decoder.layers.2.mlp.linear_fc2.weight", style))
    source = megatron.open_source(saved_by_torch(tmp_path / "odd", state, LLAMA))
    assert source.leftover() == ["decoder.layers.0.mlp.router.weight"] and lost is not None
    assert source.missing() == ["decoder.layers.2.mlp.linear_fc2.weight"]


def test_one_piece_may_hold_every_layer(tmp_path: Path) -> None:
    """Layers stacked into one piece, as a writer without Megatron's shards has them."""
    expected = tiny.tensors(Card(LLAMA))
    state: dict[str, Any] = {}
    for name, tensor in expected.items():
        key, layer = megatron.megatron_names.stacked(name)
        state[key] = [*state.get(key, []), tensor] if layer is not None else tensor
    stacked = {key: torch.stack(value) if isinstance(value, list) else value for key, value in state.items()}
    source = megatron.open_source(saved_by_torch(tmp_path / "out", stacked, LLAMA))
    assert tiny.same(tiny.everything(source), expected)


def test_the_vocabulary_is_what_the_settings_say(tmp_path: Path) -> None:
    """Padded rows are dropped, and fewer rows than tokens are refused; without settings a YAML says the model."""
    card = Card(GPT)
    expected = tiny.tensors(card)
    embedding = "embedding.word_embeddings.weight"
    padded = {**expected, embedding: torch.nn.functional.pad(expected[embedding], (0, 0, 0, 27))}
    source = megatron.open_source(saved_by_torch(tmp_path / "padded", padded, GPT))
    assert source.card.model.vocabulary == 101 and tiny.same(tiny.everything(source), expected)
    bare = saved_by_torch(tmp_path / "bare", padded, None)
    assert "does not say its architecture (it holds no args); give --model" in tiny.refused(megatron.open_source, bare)
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(asdict(replace(GPT, vocabulary=100))))
    assert len(megatron.open_source(bare, model=file).read(embedding)) == 100
    file.write_text(yaml.safe_dump(asdict(replace(GPT, vocabulary=129))))
    assert "128 rows of words, the model has 129" in tiny.refused(megatron.open_source, bare, model=file)
    file.write_text(yaml.safe_dump(asdict(replace(GPT, hidden=64))))
    assert "weight is [128, 32], the model wants [101, 64]" in tiny.refused(megatron.open_source, bare, model=file)
    file.write_text(yaml.safe_dump(asdict(replace(GPT, layers=2))))
    assert megatron.open_source(bare, model=file).leftover()[0].startswith("decoder.layers.2.")
    file.write_text("layers: 4\nhiden: 3")
    assert "'model.hiden' is unknown" in tiny.refused(megatron.open_source, bare, model=file)


def test_settings_of_megatron_bridge_are_read_without_its_classes(tmp_path: Path) -> None:
    """run_config.yaml says the architecture; its Python tags are text, and `!!python/object/apply` runs nothing."""
    found = tiny.tensors(Card(LLAMA))
    folder = saved_by_torch(tmp_path / "bridge", found, None)
    text = """
model:
  _target_: megatron.bridge.models.llama.LlamaProvider
  activation_func: !!python/name:torch.nn.functional.silu
  num_layers: 4
  hidden_size: 32
  num_attention_heads: 8
  num_query_groups: 4
  ffn_hidden_size: 64
  seq_length: 64
  vocab_size: 101
  normalization: RMSNorm
  gated_linear_unit: true
  add_bias_linear: false
  position_embedding_type: rope
  share_embeddings_and_output_weights: false
  surprise: !!python/object/apply:os.system ["touch VICTIM"]
"""
    (folder / "run_config.yaml").write_text(text.replace("VICTIM", str(tmp_path / "bitten")))
    source = megatron.open_source(folder)
    assert tiny.same(tiny.everything(source), found) and not (tmp_path / "bitten").exists()
    assert megatron_args.normal(source.card.model) == megatron_args.normal(LLAMA)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 8}, "num_experts=8 is a network that is not known here"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"normalization": "RMSNorm"}, "normalization=RMSNorm, position_embedding_type=learned_absolute"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True"),
        (
            {"position_embedding_type": "rope", "rotary_percent": 1.5},
            "rotary_percent is 1.5; it must be above 0 and at most 1",
        ),
        ({"position_embedding_type": "rope", "rotary_percent": 0.4}, "3 of the 8 numbers of a head turn"),
        ({"add_bias_linear": False}, "nor neox (LayerNorm, rope, False, True)"),
        ({"hidden_size": "32"}, "hidden_size is 32; it must be a whole number above 0"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"num_attention_heads": 5, "kv_channels": None}, "5 heads do not divide 32"),
        ({"norm_epsilon": float("nan"), "layernorm_epsilon": None}, "layernorm_epsilon is nan"),
        ({"num_layers": 1 << 30}, "layers"),
    ],
)
def test_another_network_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    args = {**megatron_args.args_of(GPT, 128), **change}
    assert said in tiny.refused(megatron_args.model_of, args, "args", rows=128, precision="fp32")


def test_roles_and_heads_must_agree(tmp_path: Path) -> None:
    """A head is not made up and not dropped without a word."""
    policy = tiny.megatron_folder(tmp_path / "policy", Card(GPT), tiny.tensors(Card(GPT)))
    value = tiny.megatron_folder(tmp_path / "value", Card(GPT, "value"), tiny.tensors(Card(GPT, "value")))
    assert "without a scalar head, which the role reward ends in" in tiny.refused(
        megatron.open_source, policy, "reward"
    )
    assert "end in a scalar head" in tiny.refused(megatron.open_source, value, "policy")
    assert megatron.open_source(value, "reward").card.role == "reward"


def test_the_tracker_names_the_iteration(tmp_path: Path) -> None:
    tiny.megatron_folder(tmp_path / "out", Card(GPT), tiny.tensors(Card(GPT)))
    (tmp_path / "out/release").rename(tmp_path / "out/iter_0000120")
    assert "names release, which is not there" in tiny.refused(megatron.open_source, tmp_path / "out")
    (tmp_path / "out" / megatron.TRACKER).write_text("120")
    assert megatron.open_source(tmp_path / "out").missing() == []
    (tmp_path / "out" / megatron.TRACKER).write_text("../../etc")
    assert "must be a number of an iteration, or release" in tiny.refused(megatron.open_source, tmp_path / "out")
    assert "is no folder" in tiny.refused(megatron.open_source, tmp_path / "nowhere")
    assert "no Megatron checkpoint" in tiny.refused(megatron.open_source, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tp3", "tp3 does not divide the 4 parts that decoder.layers.0.self_attention.linear_proj.weight"),
        ("pp3", "4 layers do not divide into the 3 chunks"),
        ("tp2 xx", "layout word 'xx'"),
    ],
)
def test_a_layout_that_the_model_does_not_have_is_refused(words: str, said: str, tmp_path: Path) -> None:
    found = tiny.tensors(Card(LLAMA))
    write = megatron.write
    assert said in tiny.refused(write, tmp_path / "o", Card(LLAMA), tiny.stream(found), torch.float32, layout=words)
    assert list(tmp_path.iterdir()) == []
