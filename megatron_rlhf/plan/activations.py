"""Bytes that a pass keeps in a pipeline stage for its backward pass, and beside them while it works. Pure, no torch.

Modelled, operation by operation, are Megatron-Core's local layers with this project's norm and core attention
(models/norm.py, models/attention.py). Transformer Engine's layers, which fuse the norm and a product, keep the same
tensors, since biases and activation functions are not fused here and attention is this project's. Attention runs
without a matrix of scores (flash), so nothing grows with the square of a row but a packed line's mask. `published` is
the closed form of Korthikanti et al. 2022 (arXiv 2205.05198, table 2) to hold this against.

Not modelled: what a kernel allocates and frees inside itself, cuBLAS's and Transformer Engine's workspaces (the plan's
allowance), rounding of the allocator (512 bytes a tensor on GPUs), and integers of a row's length.

S positions of a line, b lines of a micro-batch, h hidden, t = tp, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Model

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FORWARD_ROWS = 1024
"""Positions whose logits exist together where no gradient is wanted (models/vocabulary.py)."""
_INDICES = 16
"""Bytes a position of tokens and positions."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One call of the pipeline: `count` micro-batches of `lines` lines of `length` positions, of which `words`
    positions of a micro-batch ask the vocabulary head."""

    count: int
    lines: int
    length: int
    words: int = 0
    packed: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """What a stage's pass takes: `kept` from the forward to the backward pass, and beside it either what a layer needs
    at its fullest moment (`working`) or what the head needs, whichever is more."""

    kept: float
    working: float
    head: float

    @property
    def activations(self) -> float:
        """Bytes at the fullest moment, the head's apart."""
        return self.kept + (0 if self.logits else self.working)

    @property
    def logits(self) -> float:
        """Bytes of the head, where its moment is the fullest."""
        return self.head if self.head > self.working else 0

    @property
    def total(self) -> float:
        """Bytes at the fullest moment."""
        return self.activations + self.logits


@dataclass(frozen=True, slots=True)
class Kernels:
    """Whether norms and dropout run as one kernel each, as on GPUs: then an RMSNorm keeps its input alone and a
    dropout's mask takes a byte. On CPUs they are several operations, which keep their numbers, and gloo sums a copy."""

    fused: bool = True


GPU, CPU = Kernels(True), Kernels(False)


def layer(model: Model, layout: Layout, run: Pass, recompute: str = "none", kernels: Kernels = GPU) -> float:
    """Bytes that one layer keeps of a micro-batch for its backward pass.

    gpt style without recompute, in bf16: 2Sbh (4 + 12/t), under sequence parallelism 2Sbh 16/t; Korthikanti's 34Sbh
    counts two dropouts' masks of Sbh bytes besides.
    """
    size, tp = BYTES[model.precision], layout.tp
    positions = run.length * run.lines
    unit = positions * model.hidden * size
    loose = unit / tp if layout.sp else unit
    if recompute == "full":
        return loose
    norms = 4 * loose + 2 * _statistics(model, layout, positions)
    if gated(model) and not kernels.fused:
        norms += 2 * loose
    if run.dropout:
        norms += 2 * loose / (size if kernels.fused else 1)
    queries, keys = (positions * heads * head_width(model) / tp * size for heads in (model.heads, model.groups))
    attention = 2 * queries + 2 * keys
    if rotary(model):
        attention += queries + keys + 4 * run.length * head_width(model) * size
    if recompute == "none":
        attention += 4 * positions * model.heads / tp
        attention += positions * run.length * (size + 1) if run.packed else 0
    return norms + attention + (5 if gated(model) else 2) * _wide(model, layout, positions)


def gated(model: Model) -> bool:
    """Whether there are RMSNorm and SwiGLU in place of LayerNorm and GELU."""
    return model.style == "llama"


def rotary(model: Model) -> bool:
    """Whether heads turn by their positions, which makes queries and keys anew."""
    return model.style != "gpt"


def head_width(model: Model) -> int:
    """Width of an attention head."""
    return model.hidden // model.heads


def published(model: Model, layout: Layout, run: Pass, recompute: str = "none") -> float:
    """Korthikanti et al. 2022, table 2, of a gpt-style layer in 16 bits with dropout and flash attention, whose 5as²b
    is not kept: Sbh (10 + 24/t), under sequence parallelism 34Sbh/t, with full recompute 2Sbh."""
    whole = run.length * run.lines * model.hidden
    if recompute == "full":
        return 2 * whole
    return whole * (34 / layout.tp if layout.sp else 10 + 24 / layout.tp)


def in_flight(layout: Layout, stage: int, count: int) -> int:
    """Micro-batches (of one virtual chunk each) that stage `stage` holds at most while `count` run.

    1F1B: min(pp - stage, count), Narayanan et al. 2021 (arXiv 2104.04473, section 2.2). Interleaved: one more than the
    warm-up of mcore 0.16.1 schedules.py (get_pp_rank_microbatches), 2 (pp - stage - 1) + (vp - 1) pp.
    """
    if layout.vp == 1:
        return min(layout.pp - stage, count)
    warmup = 2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp
    return min(warmup + 1, count * layout.vp)


def training(
    model: Model,
    layout: Layout,
    stage: int,
    run: Pass,
    *,
    recompute: str = "none",
    rows: int = 0,
    head_rows: int = 0,
    kernels: Kernels = GPU,
) -> Part:
    """What stage `stage` takes at its fullest moment of a forward-backward pass; `rows` is the padded vocabulary, 0
    where the head is a scalar's."""
    size, tp = BYTES[model.precision], layout.tp
    positions = run.length * run.lines
    unit = positions * model.hidden * size
    loose = unit / tp if layout.sp else unit
    last, first = stage == layout.pp - 1, stage == 0
    each = model.layers // (layout.pp * layout.vp) * layer(model, layout, run, recompute, kernels)
    if layout.vp > 1 or not last:
        each += loose  # a stage's output waits for its gradient
    if first:
        each += (loose / (size if kernels.fused else 1) if run.dropout else 0) + _INDICES * positions
    # what comes from one neighbour while the other's is in use
    between = 2 if layout.vp > 1 else int(not first and not last)
    kept = in_flight(layout, stage, run.count) * each + between * loose
    if last:
        kept += 2 * loose + _statistics(model, layout, positions)
    working = _backward(model, layout, positions)
    if recompute == "full":
        working += layer(model, layout, run, "none", kernels)
    return Part(kept, working, _head(model, layout, run.words, rows, head_rows) if last and rows else 0.0)


def reading(
    model: Model, layout: Layout, stage: int, run: Pass, *, rows: int = 0, head_rows: int = 0, kernels: Kernels = GPU
) -> Part:
    """What stage `stage` takes at its fullest moment of a forward pass without backward."""
    size = BYTES[model.precision]
    positions = run.length * run.lines
    unit = positions * model.hidden * size
    loose = unit / layout.tp if layout.sp else unit
    # the stage's and the layer's input, the residual and the norm's output; the last micro-batch's output, or what
    # gloo still sums
    standing = 4 + int(layout.pp > 1 or (layout.tp > 1 and not kernels.fused)) + int(layout.vp > 1)
    wide = _wide(model, layout, positions)
    summed = unit + (loose + (0 if kernels.fused else unit) if layout.sp else 0)
    working = standing * loose + max((5 if gated(model) else 2) * wide, wide + summed)
    head = 0.0
    if stage == layout.pp - 1 and rows:
        words = min(run.words, head_rows or FORWARD_ROWS, FORWARD_ROWS)
        head = 2 * loose + unit + 2 * run.words * model.hidden * size + words * rows / layout.tp * size
    return Part(0.0, working, head)


def _backward(model: Model, layout: Layout, positions: int) -> float:
    """Beside what is kept, at the fullest moment of a feed-forward block's backward pass: the gradient of its output,
    and behind the second product those of its inner numbers and of the weight before it is added up, or behind the
    first one the same, when what the block kept is gone."""
    size = BYTES[model.precision]
    gates, gone = (2, 5) if gated(model) else (1, 2)
    wide = _wide(model, layout, positions)
    weight = model.ffn_width * model.hidden / layout.tp * size
    return positions * model.hidden * size + max(wide + weight, (gates - gone) * wide + gates * weight)


def _head(model: Model, layout: Layout, words: int, rows: int, head_rows: int) -> float:
    """Hidden states of the positions asked for, their logits and, in the backward pass, both gradients.

    With `head_rows` the weight's gradient is added up in fp32 (parallel/vocab_head.py).
    """
    size, slice_ = BYTES[model.precision], rows / layout.tp
    hidden = words * model.hidden * size
    weight = slice_ * model.hidden
    if not head_rows:
        return 2 * hidden + words * slice_ * size + weight * size
    return 3 * hidden + min(head_rows, words) * slice_ * size + weight * (4 + size)


def _wide(model: Model, layout: Layout, positions: int) -> float:
    """Bytes of a feed-forward block's inner numbers."""
    return positions * model.ffn_width / layout.tp * BYTES[model.precision]


def _statistics(model: Model, layout: Layout, positions: int) -> float:
    """A norm's mean and deviation, fp32, or an RMSNorm's deviation alone."""
    here = positions / layout.tp if layout.sp else positions
    return (4 if gated(model) else 8) * here
