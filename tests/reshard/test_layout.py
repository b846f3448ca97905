"""Proves that the tensor specs cover a model exactly: every element of every logical tensor lies in one shard of one
chunk under every layout, and the parameters are the published ones.

Not proved here: that Megatron builds these tensors (tests/models/test_scale.py builds them).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.reshard.layout import TensorSpec, layers, parameters, shard_shape, spans, specs, stage

GPT = Model(layers=8, hidden=32, heads=8, vocabulary=100, context=64, precision="bf16")
LLAMA = replace(GPT, style="llama", tied=False, kv_heads=4, ffn=88)
NEOX = replace(GPT, style="neox", tied=False, rope=Rope(fraction=0.5))
WIDE = replace(LLAMA, head_dim=6, linear_bias=True)
LLAMA_8B = replace(LLAMA, layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256)
ROWS = 128
LAYOUTS = ["tp1", "tp2", "tp4", "pp2", "pp8", "tp2 pp4", "tp4 pp2", "pp2 vp2", "tp2 pp4 vp2", "tp4 pp2 vp4 sp"]


def named(model: Model, rows: int = ROWS, *, scalar: bool = False) -> dict[str, TensorSpec]:
    """The specs by name."""
    return {spec.name: spec for spec in specs(model, rows, scalar=scalar)}


def layout(words: str) -> Layout:
    """The layout of `words` with one replica."""
    degrees = [int(word[2:]) for word in words.split() if word[:2] in ("tp", "pp")]
    return Layout.parse(words, degrees[0] * degrees[-1] if len(degrees) > 1 else degrees[0])


@pytest.mark.parametrize("words", LAYOUTS)
@pytest.mark.parametrize(
    "model", [GPT, replace(GPT, tied=False), LLAMA, replace(LLAMA, tied=True, qkv_bias=True), NEOX, WIDE]
)
@pytest.mark.parametrize("scalar", [False, True])
def test_every_element_is_held_once(model: Model, words: str, scalar: bool) -> None:
    """One chunk a tensor, one shard an element of its split dimension, but for copies, which are counted."""
    where, tensors = layout(words), specs(model, ROWS, scalar=scalar)
    held: Counter[str] = Counter()
    for pp_rank, chunk in product(range(where.pp), range(where.vp)):
        here = stage(tensors, where, pp_rank, chunk)
        held.update(spec.name for spec in here)
        shards = where.tp * parameters(here, where.tp)
        replicated = parameters(spec for spec in here if spec.dim is None)
        assert shards == parameters(here) + (where.tp - 1) * replicated
    twice = {"embedding.word_embeddings.weight"} if model.tied and not scalar and where.pp > 1 else set()
    assert held == {spec.name: 2 if spec.name in twice else 1 for spec in tensors}
    for spec in tensors:
        ranges = [spans(spec, where.tp, tp_rank) for tp_rank in range(where.tp)]
        if spec.dim is None:
            assert ranges == [((0, spec.shape[0]),)] * where.tp
            continue
        shard = shard_shape(spec, where.tp)[spec.dim]
        assert {sum(end - start for start, end in mine) for mine in ranges} == {shard}
        elements = [at for mine in ranges for start, end in mine for at in range(start, end)]
        assert sorted(elements) == list(range(spec.shape[spec.dim])), spec.name


@pytest.mark.parametrize(
    ("model", "published"),
    [
        # Brown et al. 2020, table 2.1, and the exact count of its formula: 12Ld² + 13Ld + (V + 2048)d + 2d
        (Model(layers=96, hidden=12288, heads=96, vocabulary=50257), 174_604_259_328),
        (Model(layers=32, hidden=4096, heads=32, vocabulary=50257), 6_658_404_352),
        (Model(layers=24, hidden=2048, heads=16, vocabulary=50257), 1_315_723_264),
        # GPT-2 and Llama 3 8B as their checkpoints count them
        (Model(layers=12, hidden=768, heads=12, vocabulary=50257, context=1024), 124_439_808),
        (LLAMA_8B, 8_030_261_248),
    ],
)
def test_parameters_are_the_published_ones(model: Model, published: int) -> None:
    """Unpadded, each logical tensor once."""
    assert parameters(specs(model, model.vocabulary)) == published


def test_a_scalar_head_replaces_the_output_layer() -> None:
    """A weight and a bias for one number, on every tp rank of the last stage; nothing is tied."""
    for model in (GPT, replace(GPT, tied=False)):
        reward = named(model, scalar=True)
        assert (reward["head.weight"].shape, reward["head.bias"].shape) == ((1, 32), (1,))
        assert reward["head.weight"].dim is reward["head.bias"].dim is None
        assert "output_layer.weight" not in reward
        assert not any(spec.copied for spec in reward.values())
    assert named(GPT).keys() ^ named(GPT, scalar=True).keys() == {"head.weight", "head.bias"}


def test_llama_has_no_bias_and_no_table_of_positions() -> None:
    """What differs from GPT is in the names; the fused QKV has a query group's rows beside its keys and values."""
    assert not [name for name in named(LLAMA) if name.endswith("bias") or "position" in name]
    qkv = named(LLAMA)["decoder.layers.3.self_attention.linear_qkv.weight"]
    assert (qkv.shape, qkv.unit, qkv.layer) == (((8 + 2 * 4) * 4, 32), (2 + 2) * 4, 3)
    assert named(replace(LLAMA, kv_heads=0))[qkv.name].shape == (3 * 32, 32)


def test_qwens_biases_are_split_as_their_rows_are() -> None:
    """One tensor a layer more than Llama, cut where the weight is cut."""
    more = [spec for name, spec in named(replace(LLAMA, qkv_bias=True)).items() if name not in named(LLAMA)]
    assert [spec.name for spec in more] == [f"decoder.layers.{i}.self_attention.linear_qkv.bias" for i in range(8)]
    weight = named(LLAMA)["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert more[0].shape == weight.shape[:1] and spans(more[0], 2, 1) == spans(weight, 2, 1)


def test_neox_is_gpt_without_its_table_of_positions() -> None:
    """And, untied, with an output layer; what part of a head turns is in no shape."""
    names = named(replace(GPT, tied=False)).keys() ^ named(NEOX).keys()
    assert names == {"embedding.position_embeddings.weight"}


def test_wide_heads_and_biases_are_in_attention_and_feed_forward() -> None:
    """Heads of 6 numbers where 32 hidden numbers over 8 heads would make 4; no bias in RMSNorm."""
    here = {name.removeprefix("decoder.layers.0."): spec for name, spec in named(WIDE).items() if ".0." in name}
    assert here["self_attention.linear_qkv.weight"].shape == ((8 + 2 * 4) * 6, 32)
    assert (here["self_attention.linear_proj.weight"].shape, here["self_attention.linear_proj.bias"].shape) == (
        (32, 48),
        (32,),
    )
    assert here["self_attention.linear_proj.weight"].unit == 2 * 6
    assert here["mlp.linear_fc1.bias"].blocks == 2
    assert [name for name in here if "layernorm" in name and name.endswith("bias")] == []


def test_gate_and_up_are_split_each() -> None:
    """Shard i of SwiGLU's first matrix is [gate_i; up_i]."""
    fc1 = named(LLAMA)["decoder.layers.0.mlp.linear_fc1.weight"]
    assert (fc1.shape, fc1.blocks) == ((176, 32), 2)
    assert shard_shape(fc1, 4) == (44, 32)
    assert spans(fc1, 4, 1) == ((22, 44), (110, 132))
    assert named(GPT)["decoder.layers.0.mlp.linear_fc1.weight"].blocks == 1


def test_interleaved_stages_hold_layers_chunk_by_chunk() -> None:
    """Chunk v of stage p begins at layer (v·pp + p)·n."""
    where = layout("pp2 vp2")
    assert [list(layers(8, where, p, v)) for v in (0, 1) for p in (0, 1)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [spec.layer for spec in stage(specs(GPT, ROWS), where, 0, 1)][::12] == [4, 5]
    ends = [stage(specs(GPT, ROWS), where, p, v)[-1].name for v in (0, 1) for p in (0, 1)]
    assert [name.split(".")[0] for name in ends] == ["decoder", "decoder", "decoder", "embedding"]


@pytest.mark.parametrize(
    ("model", "name", "tp", "works"),
    [
        (LLAMA, "decoder.layers.0.self_attention.linear_qkv.weight", 8, "tp4"),  # 64 rows, 4 key-value groups
        (LLAMA, "decoder.layers.0.self_attention.linear_proj.weight", 8, "tp4"),
        (LLAMA, "decoder.layers.0.mlp.linear_fc1.weight", 16, "tp8"),  # 176 rows, 88 a block
        (GPT, "decoder.layers.0.self_attention.linear_qkv.bias", 3, "tp1"),
        (GPT, "embedding.word_embeddings.weight", 6, "tp2"),
    ],
)
def test_a_cut_through_a_row_group_is_refused(model: Model, name: str, tp: int, works: str) -> None:
    """Although the number of rows may divide; the sentence names the tensor and a tp that works."""
    with pytest.raises(BadInput, match=f"tp{tp} does not divide .* {name} .* for example {works}$"):
        spans(named(model)[name], tp, 0)
    shard_shape(named(model)[name], int(works[2:]))


def test_layers_that_do_not_divide_are_refused() -> None:
    """Before any stage is made up."""
    with pytest.raises(BadInput, match=r"8 layers do not divide into the 6 chunks of 'tp1 pp3 dp1 vp2'.*layers=12"):
        stage(specs(GPT, ROWS), layout("pp3 vp2"), 0)
