"""Step times of Megatron that others measured and published, as runs to predict.

* Korthikanti et al. 2022 (arXiv 2205.05198), tables 3 and 5: GPT models on A100s with full recomputation, and with
  sequence parallelism and selective recomputation; 530B on 2,240 GPUs in section 6.3. The latter's model
  FLOPs utilization stands in Megatron-LM's README too.
* Narayanan et al. 2021 (arXiv 2104.04473), table 1: achieved FLOP/s a GPU of weak scaling on A100s from 1.7B to 1T. Its
  seconds follow from the operations of its equation (3); it prints no micro-batch, 1 is taken, and no virtual stages.
* Smith et al. 2022 (arXiv 2201.11990), section 2.4: Megatron-Turing NLG 530B with DeepSpeed's engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Adam, Cluster, Compute, Model
from megatron_rlhf.plan import pipeline
from megatron_rlhf.plan.pipeline import Cut
from megatron_rlhf.plan.roofline import Seconds
from megatron_rlhf.plan.stage import PUBLISHED, Stage

LENGTH = 2048


@dataclass(frozen=True)
class Published:
    """A run of `batch` rows of 2,048 tokens a step, and what it took."""

    name: str
    model: Model
    layout: Layout
    micro_batch: int
    batch: int
    recompute: str
    seconds: float

    def predicted(self, cluster: Cluster) -> Seconds:
        """The same by the planner, with Megatron's kernels of that time."""
        compute = Compute(recompute=self.recompute)
        stage = Stage(self.model, self.layout, cluster, compute, kernels=PUBLISHED)
        cut = Cut.of(self.batch, self.micro_batch, self.layout)
        return pipeline.run(stage, cut, LENGTH, LENGTH, backward=True) + pipeline.update(stage, Adam())


def _gpt(layers: int, hidden: int, heads: int) -> Model:
    return Model(layers=layers, hidden=hidden, heads=heads, vocabulary=51200, precision="bf16")


_22B, _175B, _530B, _1T = _gpt(48, 6144, 64), _gpt(96, 12288, 96), _gpt(105, 20480, 128), _gpt(128, 25600, 160)
# name, model, stages, virtual stages, micro-batch, batch, seconds with full and with selective recomputation
_KORTHIKANTI = [
    ("22B", _22B, 1, 1, 4, 4, 1.42, 1.10),
    ("175B", _175B, 8, 3, 1, 64, 18.13, 13.75),
    ("530B", _530B, 35, 3, 1, 280, 49.05, 37.83),
    ("1T", _1T, 64, 1, 1, 512, 94.42, 71.49),
]
UTILIZATION = {"22B": 0.415, "175B": 0.514, "530B": 0.560, "1T": 0.563}
"""Model FLOPs utilization with selective recomputation."""
RECOMPUTED = [
    Published(f"{name} {recompute}", model, Layout(8, pp, 1, vp, sp), micro, batch, recompute, seconds)
    for name, model, pp, vp, micro, batch, *both in _KORTHIKANTI
    for recompute, sp, seconds in zip(("full", "selective"), (False, True), both, strict=True)
] + [Published("530B on 2240", _530B, Layout(8, 35, 8, 3, True), 1, 2240, "selective", 39.15)]

# layers, hidden, heads, tp, pp, GPUs, batch, TFLOP/s a GPU
_NARAYANAN = [
    (24, 2304, 24, 1, 1, 32, 512, 137),
    (30, 3072, 32, 2, 1, 64, 512, 138),
    (36, 4096, 32, 4, 1, 128, 512, 142),
    (40, 6144, 48, 8, 1, 256, 1024, 135),
    (48, 8192, 64, 8, 2, 512, 1536, 138),
    (60, 10240, 80, 8, 4, 1024, 1792, 140),
    (80, 12288, 96, 8, 8, 1536, 2304, 148),
    (96, 16384, 128, 8, 16, 1920, 2160, 155),
    (105, 20480, 128, 8, 35, 2520, 2520, 163),
    (128, 25600, 160, 8, 64, 3072, 3072, 163),
]


def operations(layers: int, hidden: int, batch: int) -> float:
    """Equation (3) of Narayanan et al.: 96 B s l h^2 (1 + s/6h + V/16lh), the recomputed forward counted."""
    return 96 * batch * LENGTH * layers * hidden**2 * (1 + LENGTH / (6 * hidden) + 51200 / (16 * layers * hidden))


SCALED = [
    Published(
        f"{hidden}x{layers} on {gpus}", _gpt(layers, hidden, heads), Layout(tp, pp, gpus // (tp * pp)), 1, batch,
        "full",
        operations(layers, hidden, batch) / gpus / (rate * 1e12),
    )
    for layers, hidden, heads, tp, pp, gpus, batch, rate in _NARAYANAN
]  # fmt: skip

DEEPSPEED = [
    Published(f"MT-NLG on {280 * dp}", _530B, Layout(8, 35, dp), 1, 1920, "full", seconds)
    for dp, seconds in ((8, 60.1), (10, 50.2), (12, 44.4))
]
