"""A plan as text for people and as JSON for programs. Pure, no torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from megatron_rlhf.plan import times
from megatron_rlhf.plan.plan import Plan
from megatron_rlhf.plan.times import Bill

_WIDTH = 118


def text(plan: Plan) -> str:
    """Bytes and seconds of every phase by cause, what it costs, whether it fits and what would."""
    return "\n".join([*_head(plan), "", *_bytes(plan), "", *_seconds(plan), "", *_bill(plan)]) + "\n"


def as_json(plan: Plan) -> str:
    """The same numbers under their names: bytes, seconds, operations, shares from 0 to 1."""
    found = {
        "gpus": plan.world,
        "layouts": asdict(plan.config.layout),
        "cluster": asdict(plan.config.cluster),
        "fits": plan.fits,
        "capacity": plan.capacity,
        "nearest": plan.nearest,
        "memory": [
            {"phase": phase.name, "bytes": phase.total, "causes": dict(phase.causes), "host": dict(phase.host)}
            for phase in plan.memory
        ],
        "time": [
            {
                "phase": phase.name,
                "seconds": phase.seconds.total,
                "causes": phase.seconds.by_cause(),
                "flops": phase.flops,
                "times": phase.times,
            }
            for phase in plan.phases
        ],
        "iteration": asdict(plan.bill),
        "run": asdict(plan.run),
        "steps": {recipe: asdict(bill) for recipe, bill in plan.steps.items()},
        "save_seconds": times.written(plan.config, plan.world),
        "reshard": asdict(plan.moved),
    }
    return json.dumps(found, indent=2) + "\n"


def _head(plan: Plan) -> Iterator[str]:
    layout, cluster = plan.config.layout, plan.config.cluster
    yield f"{plan.world} GPUs of {cluster.memory / 1e9:.0f} GB, {cluster.node} a node"
    yield f"  policy {layout.policy} | generate {layout.generate} | value {layout.value} | reward {layout.reward}"
    yield from textwrap.wrap(
        plan.nearest if plan.fits else f"DOES NOT FIT. {plan.nearest}",
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def _bytes(plan: Plan) -> Iterator[str]:
    yield f"Memory of the busiest GPU, of {plan.capacity / 1e9:.1f} GB"
    for phase in plan.memory:
        over = "" if phase.total <= plan.capacity else " too much"
        yield _row(phase.name, f"{phase.total / 1e9:.1f} GB", _largest(phase.causes, 1e9, phase.total), over)


def _seconds(plan: Plan) -> Iterator[str]:
    yield "Time of one PPO iteration"
    for phase in plan.phases:
        taken = phase.seconds.total
        yield _row(phase.name, _time(taken), _largest(phase.seconds.by_cause(), 1.0, taken))
    yield _row("together", _time(plan.bill.seconds), f"{plan.bill.mfu:.1%} of the rated speed (MFU)")


def _bill(plan: Plan) -> Iterator[str]:
    iterations = plan.config.ppo.iterations
    yield f"{iterations} iterations: {_cost(plan.run)}"
    for recipe, bill in plan.steps.items():
        yield f"a step of {recipe}: {_time(bill.seconds)}, {bill.tokens_per_second:,.0f} tokens/s, MFU {bill.mfu:.1%}"
    yield f"a state is on storage after {_time(times.written(plan.config, plan.world))}"


def _cost(bill: Bill) -> str:
    found = [f"{bill.seconds / 3600:.2f} h", f"{bill.gpu_hours:,.0f} GPU-hours"]
    found += [f"{bill.tokens_per_second:,.0f} tokens/s"]
    found += [f"{bill.kilowatt_hours:,.0f} kWh"] if bill.kilowatt_hours else []
    return ", ".join([*found, *([f"price {bill.price:,.0f}"] if bill.price else [])])


def _row(name: str, number: str, more: str, warning: str = "") -> str:
    row = f"  {name:<22}{number:>10}{warning}  {more}".rstrip()
    return row if len(row) <= _WIDTH else row[: row.rindex(",", 0, _WIDTH)]


def _largest(causes: Mapping[str, float], unit: float, total: float, most: int = 4) -> str:
    """The causes of at least a fiftieth, the largest first."""
    found = sorted(causes.items(), key=lambda cause: -cause[1])[:most]
    return ", ".join(f"{name} {size / unit:.3g}" for name, size in found if size >= total / 50)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1e3:,.0f} ms"
