"""docs/scaling.md, written by the planner: what an iteration of the paper costs on 128 to 1,024 H100s. No torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache

from megatron_rlhf.config.load import load
from megatron_rlhf.config.schema import Config, Factors
from megatron_rlhf.plan import flops, times
from megatron_rlhf.plan.phase import ALLOWANCE
from megatron_rlhf.plan.plan import Plan
from megatron_rlhf.plan.published import DEEPSPEED, RECOMPUTED, SCALED
from megatron_rlhf.plan.search import MARGIN, Found, search, words

GPUS = (128, 512, 1024)
MOST = 3
"""Layouts that are listed of each number."""
DEMONSTRATIONS, PRETRAINING_TOKENS = 12_725, 300e9
"""Demonstrations of the paper (table 6) and tokens of GPT-3's pretraining (Brown et al. 2020)."""
PAPER = {"pretraining": 3640.0, "sft": 4.9, "ppo": 60.0}
"""Petaflop/s-days that the paper prints (section 5.1)."""
_FORMULA = {
    "reshard": 1,
    "prefill": 2,
    "decode": 3,
    "score": 4,
    "reference": 4,
    "old log-probs": 4,
    "values": 4,
    "train value": 5,
    "train policy": 5,
    "train pretraining mix": 5,
    "update value": 6,
    "update policy": 6,
    "save": 7,
}


def page() -> str:
    """The whole page."""
    config = load("plan", ["cluster=h100"])
    found = [searched(gpus) for gpus in GPUS]
    parts = [_head(config), _which(found), _phases(found), _memory(found)]
    parts += [formulas(config), published(), compute(config), _missing()]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


@cache
def searched(gpus: int) -> Found:
    """What a search for the paper's run on so many H100s finds."""
    return search(load("plan", ["cluster=h100"]), gpus, most=MOST)


def _head(config: Config) -> Iterator[str]:
    ppo = config.ppo
    length = config.data.max_prompt_tokens + config.sampling.max_tokens
    yield "# What one iteration of the paper costs"
    yield ""
    yield from _prose(
        "Written by `megatron-rlhf plan scaling`, held by `tests/plan/test_scaling.py`; no run of this size has been "
        f"made. An iteration of PPO-ptx is {ppo.episodes} episodes of {length:,} tokens, {ppo.minibatches} updates, "
        f"and {ppo.pretraining_ratio} rows of pretraining text an episode: a 175B policy and reference, a 6B value and "
        "reward model, bf16, every row as long as it may be, which is how the paper counted its compute. DGX H100 "
        "nodes (`cluster=h100`). The numbers in brackets are those of the [formulas](#formulas)."
    )


def _which(found: Sequence[Found]) -> Iterator[str]:
    yield "## Which layout to take"
    yield ""
    yield f"The fastest that fit by `megatron-rlhf plan search gpus=N`, with {MARGIN:.0%} of the memory left free."
    yield ""
    rows = [
        ("policy, reference", lambda plan: f"`{plan.config.layout.policy}`"),
        ("rows, recomputation", lambda plan: f"{plan.config.compute.micro_batch}, {plan.config.compute.recompute}"),
        ("generate", lambda plan: f"`{plan.config.layout.generate}`"),
        ("sequences together", lambda plan: f"{plan.config.sampling.batch} a replica"),
        ("value, reward", lambda plan: f"`{plan.config.layout.value}`"),
        ("seconds an iteration", lambda plan: f"**{plan.bill.seconds:.1f}**"),
        ("MFU (8)", lambda plan: f"{plan.bill.mfu:.1%}"),
        ("tokens of episodes a second", lambda plan: f"{plan.bill.tokens_per_second:,.0f}"),
        ("GPU-hours, 500 iterations", lambda plan: f"{plan.run.gpu_hours:,.0f}"),
        ("days", lambda plan: f"{plan.run.seconds / 86400:.2f}"),
        ("MWh (9)", lambda plan: f"{plan.run.kilowatt_hours / 1000:.1f}"),
        ("a state on storage (7)", lambda plan: f"{times.written(plan.config, plan.world):.0f} s"),
    ]
    plans = [each.plans[0] for each in found]
    yield from _table(["", *(f"{plan.world:,} GPUs" for plan in plans)], [[n, *map(show, plans)] for n, show in rows])
    for plan in plans:
        yield f"{plan.world:,} GPUs as settings:"
        yield ""
        yield "```"
        yield " \\\n  ".join(words(plan.config))
        yield "```"
        yield ""
    yield "What comes next after the fastest:"
    yield ""
    rest = [
        [f"{each.gpus:,}", f"{plan.bill.seconds:.1f}", f"`{at.policy}`", f"`{at.generate}`"]
        for each in found
        for plan in each.plans[1:]
        for at in [plan.config.layout]
    ]
    yield from _table(["GPUs", "seconds", "policy", "generate"], rest)
    fewer = searched(64)
    yield from _prose(
        "On 64 GPUs nothing fits but with the optimizer in host memory (`adam.host=true`): "
        f"`{fewer.plans[0].config.layout.policy}`, {fewer.plans[0].bill.seconds:.0f} s an iteration. {fewer.obstacle}"
    )


def _phases(found: Sequence[Found]) -> Iterator[str]:
    yield "## Seconds, phase by phase"
    yield ""
    yield from _prose(
        "Operations are those the result needs. By cause: the busiest GPU's seconds on 1,024, those of a fiftieth or "
        "more."
    )
    plans = [each.plans[0] for each in found]
    rows = []
    for number, phase in enumerate(plans[0].phases):
        same = [plan.phases[number] for plan in plans]
        causes = sorted(same[-1].seconds.by_cause().items(), key=lambda cause: -cause[1])
        told = ", ".join(f"{name} {taken:.2f}" for name, taken in causes if taken >= same[-1].seconds.total / 50)
        work = f"{phase.flops:.2e}" if phase.flops else ""
        seconds = [f"{each.seconds.total:.2f}" for each in same]
        rows.append([phase.name, f"({_FORMULA[phase.name]})", work, *seconds, told])
    rows.append(["together", "", f"{math.fsum(p.flops for p in plans[0].phases):.2e}", *_together(plans), ""])
    names = ["phase", "formula", "operations", *(f"{plan.world:,}" for plan in plans), "by cause, 1,024"]
    yield from _table(names, rows)


def _together(plans: Sequence[Plan]) -> list[str]:
    return [f"{plan.bill.seconds:.2f}" for plan in plans]


def _memory(found: Sequence[Found]) -> Iterator[str]:
    plans = [each.plans[0] for each in found]
    yield "## Memory, phase by phase"
    yield ""
    there = f"{plans[0].capacity / 1e9:.0f} are there, {ALLOWANCE:.0%} of 80 being left to fragmentation (10)."
    yield from _prose(f"GB on the busiest GPU; {there}")
    rows = []
    for number, phase in enumerate(plans[0].memory):
        same = [plan.memory[number] for plan in plans]
        causes = sorted(same[-1].causes.items(), key=lambda cause: -cause[1])[:4]
        told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in causes)
        rows.append([phase.name, *(f"{each.total / 1e9:.1f}" for each in same), told])
    yield from _table(["phase", *(f"{plan.world:,}" for plan in plans), "most of it, 1,024"], rows)


def formulas(config: Config) -> Iterator[str]:
    """The rates and the numbered formulas."""
    cluster, factors = config.cluster, config.cluster.factors
    yield "## Formulas"
    yield ""
    yield "Rates are rated speeds (`configs/cluster/h100.yaml`) times what is reached of them (`cluster.factors`,"
    yield "`megatron-rlhf plan calibrate` fits them to your runs):"
    yield ""
    rows = [
        ["F", "products", f"{cluster.flops:.4g}", f"{factors.gemm:g}", "FLOP/s"],
        ["B", "GPU memory", f"{cluster.bandwidth:.4g}", f"{factors.memory:g}", "bytes/s"],
        ["N", "NVLink", f"{cluster.nvlink:.4g}", f"{factors.nvlink:g}", "bytes/s"],
        ["I", "network card", f"{cluster.nic:.4g}", f"{factors.nic:g}", "bytes/s"],
        ["H, R, D", "to the host, its memory, storage", _rates(config), "1", "bytes/s"],
    ]
    yield from _table(["", "what", "rated, a GPU", "reached", "unit"], rows)
    yield from _prose(_LETTERS)
    yield from _prose(_LAYER)
    yield from _prose(
        f"A collective or message takes {factors.latency * 1e6:g} us however small, a kernel {factors.launch * 1e6:g} "
        f"us to start where that is longer than it runs (`launch`); on several GPUs everything takes "
        f"{factors.straggler:g} times as long, for the slowest (`straggler`)."
    )
    for number, told in enumerate(_PHASES, 1):
        first = f"{number}. "
        yield from textwrap.wrap(
            told, 120, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
        )
    yield ""


def _rates(config: Config) -> str:
    cluster = config.cluster
    return f"{cluster.host:.3g}, {cluster.ram:.3g}, {cluster.disk:.3g}"


_LETTERS = """\
b rows of a micro-batch, s positions, h width, f feed-forward width, V vocabulary, L layers; t, p, d, v the degrees
tp, pp, dp, vp; m micro-batches of a replica; P parameters of the fullest rank; 2 bytes a weight. A product takes
max(operations / F, bytes of its weights / B); what of it waits for memory counts as memory."""
_LAYER = """\
**A layer forward** is its products, 2 bs (4h^2 + 2hf) / t operations (gpt style); attention's 4 b s^2 h / t, the
half above the diagonal left out; 2 bs (10h + 2f + 8h) / t bytes of norms, sums, activation and permutations (10h not
over t without sp); and two sums over tp, each 2 (t-1)/t 2bsh bytes over N, over I where t is more than a node.
**Backward** it is the products twice, attention 2.5 times, the bytes twice, the sums twice, and 12 bytes a weight of
the stage, since weight gradients are added to the fp32 buffer after the product; selective recomputation adds
attention, full the whole layer. **The head** is 2hV/t operations a position that is read and 4V/t bytes, twice that
backward. (Narayanan et al. 2021, arXiv 2104.04473; Korthikanti et al. 2022, arXiv 2205.05198; Dao et al. 2022, arXiv
2205.14135.)"""
_PHASES = (
    "Reshard: what the busiest card sends or receives by the plan of the switch over I, or the busiest NVLink over N, "
    "whichever is longer ([reshard.md](reshard.md)). With `reshard.park_optimizer` 2 x 16P/d bytes over H.",
    "Prefill: a group's prompts through L/p layers forward, one draw, and a hop to the next stage; groups x that.",
    "Decode: a step reads the weights of L/p layers (2 (4h^2 + 2hf)/t bytes each) and the cache of the group's rows "
    "(4h/t bytes a row, slot and layer); two sums over tp a layer, the head and a draw on the last stage, a hop. Times "
    "the groups a replica has, times the tokens a response may have less one; fewer groups than stages leave a bubble.",
    "Forward: m micro-batches (`compute.forward_micro_batch`) on the busiest stage, and the other stages' time for one "
    "of them over v as bubble: with equal stages (p-1)/(vm) of the work. Each sends 2bsh/t bytes to the next stage.",
    "Forward and backward: the same with the backward (`compute.micro_batch`), for every update of the iteration.",
    "Update: fp32 gradients reduce-scattered and 16-bit weights gathered over dp, (d-1)/d 6P bytes over as many cards "
    "as the group has ranks in a node, or over N inside one; 8P bytes of norm and emptying, 30P/d of Adam and 12P/d of "
    "the policy's average over B; the gradients of a tied table summed over its two stages. With `adam.host` Adam's "
    "28P/d over R and 6P/d over H.",
    "Save: 16 bytes a parameter of the policy (weight, moments, average) and 12 of the value model, over all GPUs' H; "
    "the run waits for that copy only, the writing over D goes on beside it. In an iteration where `checkpoint.every` "
    "asks.",
    "MFU: operations that the result needs (nothing that is computed again; attention counts every pair of positions, "
    "as Megatron's papers do) / (seconds x GPUs x rated FLOP/s).",
    "Energy: GPU-hours x `cluster.watts`, the node's most over its GPUs. Price: GPU-hours x `cluster.price`.",
    "Memory: every tensor counted by cause, weights, gradients, optimizer, average, activations, logits, keys and "
    "values, communication (`megatron_rlhf/plan/memory.py`).",
)


def published() -> Iterator[str]:
    """What others measured, beside what is predicted."""
    cluster = load("plan", ["cluster=a100"]).cluster
    yield "## Against what others measured"
    yield ""
    yield from _prose(
        f"Seconds a step of Megatron on A100s, with one set of factors ({_told(cluster.factors)}) and the kernels of "
        "that time (attention not fused, weight gradients added inside the product). Korthikanti et al. 2022, tables 3 "
        "and 5; Narayanan et al. 2021, table 1 (h x L on GPUs; its micro-batches are not printed, 1 is taken). "
        "Megatron-Turing NLG (Smith et al. 2022, arXiv 2201.11990) ran on DeepSpeed's engine, to which no factor is "
        "fitted."
    )
    rows = []
    for run in (*RECOMPUTED, *SCALED, *DEEPSPEED):
        found = run.predicted(cluster).total
        error = f"{100 * (found / run.seconds - 1):+.0f} %"
        rows.append([run.name, f"{run.layout.size:,}", f"{run.seconds:.2f}", f"{found:.2f}", error])
    yield from _table(["run", "GPUs", "measured", "predicted", "error"], rows)


def _told(factors: Factors) -> str:
    return f"gemm {factors.gemm:g}, memory {factors.memory:g}, nvlink {factors.nvlink:g}, nic {factors.nic:g}"


def compute(config: Config) -> Iterator[str]:
    """The paper's compute, beside what it prints."""
    yield "## The paper's compute"
    yield ""
    yield "Petaflop/s-days: 2N a token forward, 6N forward and backward, N the parameters, every row a full context."
    yield ""
    found = flops.of_the_paper(config, DEMONSTRATIONS, PRETRAINING_TOKENS)
    rows = []
    for run, passes in found.items():
        total = math.fsum(passes.values())
        parts = ", ".join(f"{name} {work:.3g}" for name, work in passes.items()) if len(passes) > 1 else ""
        rows.append([run, f"{PAPER[run]:g}", f"{total:.4g}", f"{100 * (total / PAPER[run] - 1):+.1f} %", parts])
    yield from _table(["run", "paper", "found", "error", "of which"], rows)


def _prose(text: str) -> Iterator[str]:
    """A paragraph in lines of 120, and an empty line."""
    yield from textwrap.wrap(text, 120, break_on_hyphens=False)
    yield ""


def _missing() -> Iterator[str]:
    yield "## What is not in it"
    yield ""
    yield from _prose(
        "Rows shorter than the settings allow, packing and buckets; loading of data, tokens and statistics copied to "
        "the host, sums over the world of a few numbers; the digest after a switch; evaluation, and saving at a "
        "signal. Networks are rated by their cards: a fabric that is not free of blocking is slower, which "
        "`cluster.nic` and `plan calibrate` can say. Attention in a packed or decoded row is taken for as fast as the "
        "causal one."
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
