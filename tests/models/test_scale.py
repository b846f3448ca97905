"""Proves that every stage of the paper's models, 175B under 1,024 ranks too, is what the tensor specs say: each rank of
a (tp, pp) coordinate builds its real Megatron-Core modules on the meta device, under a fake process group.

Not proved here: that the weights fit into memory, that a step runs, any communication.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import Parameter

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.load import load
from megatron_rlhf.config.schema import Model
from megatron_rlhf.models import names, stage, transformer
from megatron_rlhf.reshard import layout as where
from megatron_rlhf.reshard.layout import TensorSpec
from tests.helpers.fake_world import fake_grid

GPT_175B = 174_604_259_328
GPT_6B = 6_658_404_352
GPT_1B3 = 1_315_723_264
LLAMA_8B = 8_030_261_248
# a projection to one number and its bias in place of the tied output layer
REWARD_6B = GPT_6B + 4096 + 1


def model(name: str) -> Model:
    """What configs/model/<name>.yaml says."""
    return load("sft", ["experiment=quickstart", "layout=cpu1", f"model@model={name}"]).model


def parsed(words: str) -> Layout:
    """The layout of `words` in a world of just its ranks."""
    sizes = [int(word[2:]) for word in words.split() if word[:2] in ("tp", "pp", "dp")]
    return Layout.parse(words, math.prod(sizes))


def padded(settings: Model, layout: Layout) -> int:
    """Rows of the embedding as on a GPU."""
    return transformer.padded(settings.vocabulary, math.lcm(128, layout.tp))


def built(settings: Model, layout: Layout, tp: int, pp: int, scalar: bool = False, dp: int = 0) -> dict[str, Parameter]:
    """The parameters of the rank at a coordinate, by global name."""
    with fake_grid(layout, tp, pp, dp) as grid:
        assert (grid.tp_rank, grid.pp_rank, grid.dp_rank) == (tp, pp, dp)
        return transformer.outline(settings, grid, rows=padded(settings, layout), scalar=scalar)


def check(found: dict[str, Parameter], expected: Sequence[TensorSpec], tp: int) -> None:
    """Tensor by tensor: name, order, shape of the shard, dtype, split dimension, blocks, and no memory."""
    assert list(found) == [spec.name for spec in expected]
    for spec in expected:
        parameter = found[spec.name]
        assert tuple(parameter.shape) == where.shard_shape(spec, tp), spec
        assert parameter.dtype == stage.PRECISIONS[spec.precision], spec
        assert names.split_of(spec.name, parameter, gated=spec.blocks == 2) == names.Split(spec.dim, spec.blocks), spec
        if spec.dim is not None:
            assert parameter.partition_stride == spec.blocks, spec
        assert parameter.is_meta, spec


def sweep(settings: Model, words: str, scalar: bool = False) -> int:
    """Checks the rank of every (tp, pp) and adds up the shards: parameters of the whole, padding rows left out."""
    layout = parsed(words)
    specs = where.specs(settings, padded(settings, layout), scalar=scalar)
    counted: Counter[str] = Counter()
    for tp, pp in product(range(layout.tp), range(layout.pp)):
        found = built(settings, layout, tp, pp, scalar)
        here = [spec for chunk in range(layout.vp) for spec in where.stage(specs, layout, pp, chunk)]
        check(found, here, layout.tp)
        assert sum(parameter.numel() for parameter in found.values()) == where.parameters(here, layout.tp)
        for spec in here:
            again = spec.dim is None and tp > 0, spec.copied and pp > 0
            counted[spec.name] += 0 if any(again) else found[spec.name].numel()
    assert counted == {spec.name: math.prod(spec.shape) for spec in specs}, "a shard is missing or there twice"
    rows = padded(settings, layout) - settings.vocabulary
    spread = sum(spec.shape[0] == padded(settings, layout) for spec in specs)
    return sum(counted.values()) - rows * settings.hidden * spread


def test_gpt_175b_is_built_on_every_coordinate_of_1024_ranks() -> None:
    """128 coordinates of tp8 pp16 dp8; GPT-3's 174.6 B parameters to the last one."""
    settings = model("gpt_175b")
    width, layers = settings.hidden, settings.layers
    formula = 12 * layers * width**2 + 13 * layers * width + (settings.vocabulary + 2048) * width + 2 * width
    assert sweep(settings, "tp8 pp16 dp8 sp") == formula == GPT_175B


@pytest.mark.parametrize(
    ("name", "words", "scalar", "parameters"),
    [
        pytest.param("gpt_175b", "tp8 pp4 dp32", False, GPT_175B, marks=pytest.mark.slow),
        pytest.param(
            "gpt_175b_untied", "tp8 pp16 dp8 sp", False, GPT_175B + (2 * 51200 - 50257) * 12288, marks=pytest.mark.slow
        ),
        ("gpt_6b", "tp8 pp4 dp2 sp", False, GPT_6B),
        ("gpt_6b", "tp4 dp16 sp", False, GPT_6B),
        ("gpt_6b", "tp4 dp16 sp", True, REWARD_6B),
        pytest.param("gpt_6b", "tp8 pp2 dp64 sp", True, REWARD_6B, marks=pytest.mark.slow),
        ("gpt_1b3", "tp2 dp4", False, GPT_1B3),
        ("gpt_1b3", "tp2 pp4 dp1 order=tp-pp-dp", False, GPT_1B3),
        ("gpt_1b3", "pp8 dp2", False, GPT_1B3),
        ("gpt_1b3", "tp2 pp4 vp3", False, GPT_1B3),
        ("llama_8b", "tp4 pp4 vp2 sp", False, LLAMA_8B),
        ("llama_8b", "tp8 pp2", True, LLAMA_8B - 128256 * 4096 + 4096 + 1),
        ("gpt_tiny", "tp2 pp2", True, 4 * (12 * 128**2 + 13 * 128) + (2048 + 128) * 128 + 3 * 128 + 1),
    ],
)
def test_other_models_and_layouts(name: str, words: str, scalar: bool, parameters: int) -> None:
    """The tables' layouts, replicas beside shards, both rank orders, and scalar heads."""
    assert sweep(model(name), words, scalar) == parameters


def test_qwens_biases_are_built_where_they_are_said_to_be() -> None:
    """Those of queries, keys and values, of every layer, and no other."""
    settings = replace(model("llama_tiny"), qkv_bias=True)
    plain = sweep(replace(settings, qkv_bias=False), "tp2 pp2 sp")
    assert sweep(settings, "tp2 pp2 sp") - plain == 4 * 16 * (8 + 2 * 4)


def test_relatives_of_the_styles_are_built_as_said() -> None:
    """GPT-NeoX has no table of positions; wide heads widen attention alone, and every projection may have a bias."""
    neox, llama = model("neox_tiny"), model("llama_tiny")
    assert sweep(replace(neox, style="gpt"), "tp2 pp2 sp") - sweep(neox, "tp2 pp2 sp") == neox.context * neox.hidden
    assert sweep(neox, "tp4 pp2", True) == sweep(neox, "tp2") - neox.vocabulary * neox.hidden + neox.hidden + 1
    plain, wide = sweep(llama, "tp2 pp2"), sweep(replace(llama, head_dim=20), "tp2 pp2")
    assert wide - plain == 4 * (20 - 16) * 128 * (2 * 8 + 2 * 4)
    biased = sweep(replace(llama, linear_bias=True), "tp2 pp2 sp")
    assert biased - plain == 4 * (16 * (8 + 2 * 4) + 128 + 2 * 352 + 128)


@pytest.mark.slow
def test_every_rank_of_1024_builds_its_stage() -> None:
    """Replicas too: what a rank holds does not depend on dp."""
    settings, layout = model("gpt_175b"), parsed("tp8 pp16 dp8 sp")
    specs = where.specs(settings, padded(settings, layout))
    for tp, pp, dp in product(range(layout.tp), range(layout.pp), range(layout.dp)):
        check(built(settings, layout, tp, pp, dp=dp), where.stage(specs, layout, pp), layout.tp)


@pytest.mark.parametrize(("pp", "embedding"), [(0, [19, 979]), (7, None), (15, [19, 979])])
def test_groups_of_a_rank_among_1024(pp: int, embedding: list[int] | None) -> None:
    """The grid that the stages were built on has the layout's groups, whose members lie where the words say."""
    with fake_grid(parsed("tp8 pp16 dp8 sp"), 3, pp, 2) as grid:
        groups = grid.groups
        assert groups is not None
        assert dist.get_process_group_ranks(groups.tp) == list(range(64 * pp + 16, 64 * pp + 24))
        assert dist.get_process_group_ranks(groups.dp) == list(range(64 * pp + 3, 64 * pp + 64, 8))
        assert dist.get_process_group_ranks(groups.pp) == list(range(19, 1024, 64))
        assert embedding == (dist.get_process_group_ranks(groups.embd) if groups.embd is not None else None)


def test_another_shape_is_seen() -> None:
    """The comparison fails where specs and network are not of the same settings."""
    settings, layout = model("gpt_tiny"), parsed("tp2 pp2")
    found = built(settings, layout, 1, 0)
    expected = where.stage(where.specs(settings, padded(settings, layout)), layout, 0)
    check(found, expected, 2)
    with pytest.raises(AssertionError):
        check(found, where.stage(where.specs(settings, 4096), layout, 0), 2)
    with pytest.raises(AssertionError):
        check(found, where.stage(where.specs(settings, 2048), layout, 1), 2)
    with pytest.raises(AssertionError):
        check(built(settings, layout, 1, 1), where.stage(where.specs(settings, 2048, scalar=True), layout, 1), 2)


@pytest.mark.parametrize(("pp", "vp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3), (2, 6)])
def test_chunks_hold_the_layers_that_megatron_gives_them(pp: int, vp: int) -> None:
    """Interleaved stages too."""
    config = TransformerConfig(
        num_layers=24,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        pipeline_dtype=stage.PRECISIONS["fp32"],
    )
    for place, chunk in product(range(pp), range(vp)):
        held = where.layers(24, Layout(pp=pp, vp=vp), place, chunk)
        start = get_transformer_layer_offset(config, vp_stage=chunk if vp > 1 else None, pp_rank=place)
        assert held == range(start, start + 24 // (pp * vp))
