"""Proves the time model against what others measured: 19 step times of Megatron on A100s, from 1.7B to 1T parameters
and 8 to 3,072 GPUs, with the one set of factors of configs/cluster/a100.yaml; and the paper's compute.

Not proved here: this library's own speed, and any other machine. Megatron-Turing NLG ran on DeepSpeed's engine, which
the model takes for a fifth faster than it was.
"""

from __future__ import annotations

import math

import pytest

from megatron_rlhf.config.load import load
from megatron_rlhf.config.schema import Cluster
from megatron_rlhf.plan import flops
from megatron_rlhf.plan.published import DEEPSPEED, LENGTH, RECOMPUTED, SCALED, UTILIZATION, Published, operations

A100 = load("plan", ["cluster=a100"]).cluster


@pytest.mark.parametrize("run", [*RECOMPUTED, *SCALED], ids=lambda run: run.name)
def test_a_published_step_time(run: Published) -> None:
    """Asked are 15 %; 8 % are found."""
    assert run.predicted(A100).total == pytest.approx(run.seconds, rel=0.09)


def test_errors_do_not_lean_to_one_side() -> None:
    """The mean of the logarithms is within 3 %, so no factor hides a term that is missing everywhere."""
    logs = [math.log(run.predicted(A100).total / run.seconds) for run in (*RECOMPUTED, *SCALED)]
    assert abs(math.fsum(logs) / len(logs)) < 0.03


def test_more_gpus_gain_what_was_measured() -> None:
    """Of a run that the factors do not fit the scaling still holds: 2,240 to 3,360 GPUs make it 1.35 times as fast."""
    first, last = DEEPSPEED[0], DEEPSPEED[-1]
    gain = first.predicted(A100).total / last.predicted(A100).total
    assert gain == pytest.approx(first.seconds / last.seconds, rel=0.06)
    assert all(0.75 < run.predicted(A100).total / run.seconds < 0.85 for run in DEEPSPEED)


@pytest.mark.parametrize("run", RECOMPUTED[1:8:2], ids=lambda run: run.name)
def test_operations_are_the_published_utilization(run: Published) -> None:
    """The model FLOPs utilization follows from the seconds and our count of operations, as far as
    the seconds' three digits tell."""
    able = run.seconds * run.layout.size * A100.flops
    found = flops.learned(run.model, run.batch, LENGTH) / able
    assert found == pytest.approx(UTILIZATION[run.name.split()[0]], rel=0.006)


@pytest.mark.parametrize("run", SCALED, ids=lambda run: run.name)
def test_operations_are_equation_3(run: Published) -> None:
    """Forward, forward again and backward of the layers, forward and backward of the head."""
    model = run.model
    found = flops.learned(model, run.batch, LENGTH) + flops.forward(model, run.batch, LENGTH, 0)
    wanted = operations(model.layers, model.hidden, run.batch)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_the_papers_compute() -> None:
    """GPT-3 3,640, SFT 4.9 and PPO-ptx 60 petaflop/s-days (InstructGPT, section 5.1), within 4 %; 12,725 demonstrations
    (table 6), 300 billion tokens (Brown et al. 2020, table D.1)."""
    found = flops.of_the_paper(load("plan"), 12_725, 300e9)
    total = {run: math.fsum(passes.values()) for run, passes in found.items()}
    assert total == {
        "pretraining": pytest.approx(3640, rel=0.04),
        "sft": pytest.approx(4.9, rel=0.04),
        "ppo": pytest.approx(60, rel=0.04),
    }
    assert found["ppo"]["learn pretraining mix"] > 0.8 * total["ppo"]


def test_a_slower_machine_takes_longer() -> None:
    """Each rate and factor has its say: half of it makes some run slower, and none faster."""
    run = RECOMPUTED[-1]
    usual = run.predicted(A100).total
    for name in ("flops", "bandwidth", "nvlink", "nic"):
        halved = Cluster(**{**{f: getattr(A100, f) for f in Cluster.__slots__}, name: getattr(A100, name) / 2})
        assert run.predicted(halved).total > 1.01 * usual, name
