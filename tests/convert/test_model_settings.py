"""Proves that every setting of a model is said in Megatron-LM's words and in NeMo's, or refused by its name.

Not proved here: that Megatron-LM's and NeMo's own programs build the same network from them.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert import megatron_args, nemo_config
from tests.helpers import checkpoints as tiny

GPT, LLAMA, NEOX = tiny.GPT, tiny.LLAMA, tiny.NEOX


CHANGES: dict[str, Any] = {
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "vocabulary": 99,
    "context": 32,
    "ffn": 48,
    "head_dim": 16,
    "tied": True,
    "style": "gpt",
    "kv_heads": 2,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "linear_bias": True,
    "norm_epsilon": 1e-6,
    "init_std": 0.1,
    "precision": "bf16",
    "rope.base": 700.0,
    "rope.scaling": "linear",
    "rope.factor": 2.0,
    "rope.low": 2.0,
    "rope.high": 8.0,
    "rope.original_context": 4096,
    "rope.fraction": 0.5,
}
"""Every setting of a model, as none of BASES has it."""
BASES = {
    "gpt": replace(GPT, heads=8, tied=False, style="gpt"),
    "neox": replace(NEOX, heads=8, rope=Rope(base=500.0, factor=8.0)),
    **{
        name: replace(LLAMA, rope=Rope(scaling=name, factor=8.0, original_context=8192))
        for name in ("none", "llama3", "yarn")
    },
}
_SCALED = {"rope.low", "rope.high"}
UNUSED = {
    "gpt": {name for name in CHANGES if name.startswith("rope.")} | {"style", "qkv_bias", "linear_bias"},
    "neox": {"qkv_bias", "linear_bias", "rope.factor", "rope.original_context"} | _SCALED,
    "none": {"activation", "rope.factor", "rope.original_context"} | _SCALED,
    "llama3": {"activation"},
    "yarn": {"activation"} | _SCALED,
}
"""Settings that a style has no use for, and which therefore need no word."""
REFUSED = {"llama3": {"rope.original_context"} | _SCALED}
NEMO_REFUSED = {"llama3": {"rope.factor"} | REFUSED["llama3"], "yarn": CHANGES.keys() - {"style", "rope.scaling"}}


def test_changes_are_of_every_setting() -> None:
    settings = {field.name for field in fields(Model)} - {"rope"}
    assert settings | {f"rope.{field.name}" for field in fields(Rope)} == CHANGES.keys()


@pytest.mark.parametrize("setting", CHANGES)
@pytest.mark.parametrize("base", BASES)
def test_every_setting_is_said_or_refused(base: str, setting: str) -> None:
    """Changed alone, it comes back from Megatron-LM's words and from NeMo's, or it is refused by its name."""
    name = setting.removeprefix("rope.")
    change = {name: CHANGES[setting]}
    model = replace(BASES[base], **({"rope": replace(BASES[base].rope, **change)} if "." in setting else change))
    normal = megatron_args.normal(model)
    assert (normal == megatron_args.normal(BASES[base])) == (setting in UNUSED[base])
    settings = {"where": "it", "rows": model.vocabulary, "precision": model.precision}
    if setting in REFUSED.get(base, set()):
        said = tiny.refused(megatron_args.args_of, model, 128)
        assert "cannot say rope=" in said and f"'{name}'" in said
    else:
        back = megatron_args.model_of(megatron_args.args_of(model, 128), **settings)
        assert megatron_args.normal(back) == normal
    if setting in NEMO_REFUSED.get(base, set()):
        assert "rope" in tiny.refused(nemo_config.config_of, model)
    else:
        config = nemo_config.config_of(model)
        back = megatron_args.model_of(nemo_config.args_of(config, "it"), **settings)
        assert megatron_args.normal(back) == normal


def test_what_megatrons_args_cannot_say_is_refused(tmp_path: Path) -> None:
    rope = Rope(scaling="llama3", factor=8.0, low=2.0)
    said = tiny.refused(megatron_args.args_of, replace(LLAMA, rope=rope), 128)
    assert "cannot say rope=" in said
