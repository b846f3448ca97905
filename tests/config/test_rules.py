"""Proves each rule across settings: what breaks it, the sentence, and that the value the sentence names passes.

Not proved here: that the rules are complete; the planner and the data room refuse more.
"""

from __future__ import annotations

import re

import pytest

from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput, check

# (words that break one rule, the sentence)
BROKEN = [
    (["model.precision=fp8"], "model.precision is 'fp8'; it must be one of fp32, bf16, fp16"),
    (["sft.learning.schedule=linear"], "sft.learning.schedule is 'linear'; it must be one of cosine, constant"),
    (["reward.denominator=none"], "one of surviving, all"),
    (["ppo.missing_end=drop"], "one of replace, subtract, keep"),
    (["rl_start.loss_on=prompt"], "one of response, sequence"),
    (["ppo.average_unit=epoch"], "one of update, iteration"),
    (["compute.recompute=some"], "one of none, selective, full"),
    (["ppo.entropy_coef=0.01"], "ppo.entropy_coef is 0.01; it must be 0: an entropy bonus is not supported"),
    (["adam.loss_scale.growth=1"], "adam.loss_scale.growth is 1.0; it must be above 1"),
    (["adam.loss_scale.patience=0"], "adam.loss_scale.patience is 0; it must be at least 1"),
    (["adam.loss_scale.initial=0.5"], "adam.loss_scale.minimum=1.0 is above adam.loss_scale.initial=0.5"),
    (["model.vocabulary=0"], "model.vocabulary is 0; it must be at least 1"),
    (["ppo.minibatches=0"], "ppo.minibatches is 0; it must be at least 1"),
    (["ppo.minibatches=7"], "ppo.episodes=64 is no multiple of ppo.minibatches=7; write for example ppo.episodes=70"),
    (["ppo.gamma=1.5"], "ppo.gamma is 1.5; it must be from 0 to 1"),
    (["ppo.average_decay=1"], "ppo.average_decay is 1.0; it must be at least 0 and below 1"),
    (["sampling.temperature=0"], "sampling.temperature is 0.0; it must be above 0"),
    (["sampling.groups=-1"], "sampling.groups is -1; it must be at least 0"),
    (
        ["sampling.batch=4", "sampling.groups=5"],
        "sampling.groups=5 is more than the rows to share out, sampling.batch=4; write for example sampling.groups=4",
    ),
    (["sampling.batch=-1"], "sampling.batch is -1; it must be at least 0"),
    (["reshard.staging_mb=0"], "reshard.staging_mb is 0; it must be at least 1"),
    (["reshard.node=-1"], "reshard.node is -1; it must be at least 0"),
    (["checkpoint.verify=never"], "checkpoint.verify is 'never'; it must be one of digest, size"),
    (["checkpoint.keep=0"], "checkpoint.keep is 0; it must be at least 1"),
    (["checkpoint.best=score"], "checkpoint.best is 'score'; it must be max or min and a number of log.jsonl"),
    (["checkpoint.allow=[ppo.clip, ppo.clop]"], "checkpoint.allow names 'ppo.clop', which is no setting"),
    (["reshard.proof=sometimes"], "reshard.proof is 'sometimes'; it must be one of always, never"),
    (
        ["reshard.share_reference=true", "layout.reference=tp2 dp2"],
        "layout.reference='tp2 dp2' is another one; write 'layout.reference=tp2 pp2 dp1'",
    ),
    (["ppo.kl.estimator=k4"], "ppo.kl.estimator is 'k4'; it must be one of k1, k2, k3, exact"),
    (
        ["ppo.kl.estimator=exact", "layout.reference=tp2 dp2"],
        "ppo.kl.estimator=exact puts the reference's logits beside the policy's, layout.reference='tp2 dp2' keeps them "
        "elsewhere; write 'layout.reference=tp2 pp2 dp1'",
    ),
    (["ppo.policy.rate=-1e-5"], "ppo.policy.rate is -1e-05; it must be above 0"),
    (["ppo.kl.coef=-1"], "ppo.kl.coef is -1.0; it must be at least 0"),
    (["data.valid_share=1"], "data.valid_share is 1.0; it must be above 0 and below 1"),
    (["model.heads=3"], "model.hidden=128 is no multiple of model.heads=3; write for example model.hidden=129"),
    (["reward_model.vocabulary=1024"], "one tokenizer serves both, so write reward_model.vocabulary=2048"),
    (["sampling.max_tokens=100"], "data.max_prompt_tokens=56 and sampling.max_tokens=100 make rows of 156 tokens"),
    (["data.max_prompt_tokens=90"], "data.max_response_tokens=40 make rows of 130 tokens, model.context=128"),
    (["data.min_response_tokens=41"], "data.min_response_tokens=41 is above data.max_response_tokens=40"),
    (["pretrain.length=256"], "pretrain.length=256 is above model.context=128; write for example pretrain.length=128"),
    (["rank.responses_min=1"], "a ranking needs at least 2, write rank.responses_min=2"),
    (["rank.responses_min=7"], "rank.responses_min=7 is above rank.responses_max=6"),
    (["pretrain.learning.warmup=1001"], "pretrain.learning.warmup=1001 is longer than the run's 1000"),
    (["compute.buckets=0"], "compute.buckets is 0; it must be at least 1"),
    (["compute.pack_tokens=-1", "compute.packing=true"], "compute.pack_tokens is -1; it must be at least 0"),
    (["compute.head_rows=-1"], "compute.head_rows is -1; it must be at least 0"),
    (["compute.pack_tokens=512"], "compute.pack_tokens=512 needs packed rows; write compute.packing=true"),
    (
        ["layout.policy=tp2 dp2 sp", "model.context=129"],
        "splits model.context=129 in 2 (tp, as sp splits rows), which does not divide it",
    ),
    (["sft.examples=10"], "sft.examples=10 is less than one step of sft.batch=32"),
    (["cluster.node=0"], "cluster.node is 0; it must be at least 1, for example cluster.node=8"),
    (["cluster.nic=0"], "cluster.nic is 0.0; it must be above 0, for example cluster.nic=50e9"),
    (["layout.policy=tp3"], "layout.policy: tp3 pp1 dp1 is 3 ranks, the world has 4"),
    (["layout.reward=tp2 qq2"], "layout.reward: layout word 'qq2' in 'tp2 qq2' is unknown"),
    (["model.layers=3"], "layout.policy='tp2 pp2 dp1' splits model.layers=3 in 2 (pp x vp), which does not divide it"),
    (["layout.value=tp2 pp2 vp4"], "layout.value='tp2 pp2 vp4' splits reward_model.layers=4 in 8 (pp x vp)"),
    (["model.heads=1"], "splits model.heads=1 in 2 (tp), which does not divide it; write for example model.heads=2"),
    (["layout.policy=tp4 vp2"], "has virtual stages without a pipeline"),
    (["layout.generate=tp2 pp2 vp2"], "asks for virtual stages, useless for generation; leave vp2 out"),
    (["model.kv_heads=3"], "model.heads=4 is no multiple of model.kv_heads=3; write for example model.kv_heads=1"),
    (["model.kv_heads=1"], "splits model.kv_heads=1 in 2 (tp), which does not divide it"),
    (["model.activation=relu"], "model.activation is 'relu'; it must be one of gelu, gelu_tanh"),
    (["model.style=llama", "model.activation=gelu_tanh"], "model.style=llama has SwiGLU; write model.activation=gelu"),
    (["model.qkv_bias=true"], "model.style=gpt has every bias; write model.qkv_bias=false"),
    (["model.style=lama"], "model.style is 'lama'; it must be one of gpt, llama"),
    (["model.style=llama", "model.rope.scaling=ntk"], "must be one of none, linear, llama3, yarn"),
    (["model.style=llama", "model.rope.high=1"], "model.rope.high=1 must be above model.rope.low=1"),
    (["model.style=llama", "model.rope.factor=0.5"], "model.rope.factor is 0.5; it must be at least 1"),
    (["model.style=llama", "model.rope.base=1"], "model.rope.base=1 must be above 1"),
    (
        ["model.style=llama", "model.hidden=132", "model.heads=4"],
        "model turns 33 of the 33 numbers of a head (model.rope.fraction=1), which must be an even number above 0; "
        "write for example model.rope.fraction=1 model.head_dim=34",
    ),
    (["model.style=neox", "model.rope.fraction=0.04"], "model turns 1 of the 32 numbers of a head"),
    (["model.style=neox", "model.rope.fraction=0.01"], "model turns 0 of the 32 numbers of a head"),
    (["model.style=neox", "model.rope.fraction=1.5"], "model.rope.fraction is 1.5; it must be above 0 and at most 1"),
    (["model.style=neox", "model.rope.base=1"], "model.rope.base=1 must be above 1"),
    (["model.style=neox", "model.qkv_bias=true"], "model.style=neox has every bias; write model.qkv_bias=false"),
    (["model.linear_bias=true"], "model.style=gpt has every bias; write model.linear_bias=false"),
    (["model.head_dim=-1"], "model.head_dim is -1; it must be at least 0"),
]


def failures(words: list[str], world: int = 4) -> list[str]:
    """The sentences that the quickstart with these words gets."""
    try:
        check(load("quickstart", words), world)
    except BadInput as error:
        lines = str(error).splitlines()
        return [line.strip() for line in (lines[1:] if len(lines) > 1 else lines)]
    return []


def test_the_quickstart_passes_in_its_world_and_no_other() -> None:
    assert failures([]) == []
    assert "layout.policy: tp2 pp2 dp1 is 4 ranks, the world has 8; write" in failures([], world=8)[0]
    assert len(failures([], world=2)) == 6, "one sentence a role"


@pytest.mark.parametrize(("words", "sentence"), BROKEN, ids=[broken[0][0] for broken in BROKEN])
def test_a_broken_rule_has_its_sentence_and_its_remedy_works(words: list[str], sentence: str) -> None:
    found = failures(words)
    assert any(sentence in failure for failure in found), found
    wrong = next(failure for failure in found if sentence in failure)
    advice = re.search(r"(?:for example|write) ((?:[a-z_.0-9]+=\S+ ?)+)$", wrong)
    if advice:
        assert wrong not in failures([*words, *advice[1].split()])


def test_an_exact_kl_takes_the_same_layout_in_other_words() -> None:
    assert failures(["ppo.kl.estimator=exact", "layout.reference=pp2 tp2"]) == []
    sp = ["ppo.kl.estimator=exact", "layout.reference=tp2 pp2 sp"]
    assert "write 'layout.reference=tp2 pp2 dp1'" in failures(sp)[0]
    assert failures([*sp, "layout.reference=tp2 pp2 dp1"]) == []


def test_all_failures_are_said_at_once() -> None:
    with pytest.raises(BadInput) as caught:
        check(load("quickstart", ["ppo.minibatches=7", "rank.responses_min=1", "layout.policy=tp3"]), 4)
    assert str(caught.value).startswith("3 settings do not fit:\n")
    assert len(str(caught.value).splitlines()) == 4
