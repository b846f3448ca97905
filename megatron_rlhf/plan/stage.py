"""Seconds of one pipeline stage: a micro-batch forward and backward, one step of decoding, one optimizer step. Pure.

b rows of a micro-batch, s positions of a row, h hidden width, t tensor-parallel ranks, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Cluster, Compute, Model
from megatron_rlhf.plan import flops
from megatron_rlhf.plan.roofline import Reach, Roof, Seconds

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number of weights and activations."""

# Kernels that Megatron's local layers start, by reading them: a layer forward, the draw of a token, an optimizer step.
_LAYER_KERNELS = 20
_HEAD_KERNELS = 12

# Reads and writes of [b, s, h] numbers in a layer forward that tensor parallelism does not split and sequence
# parallelism does: two norms (2 each), two residual sums with bias (3 each).
_WHOLE_PASSES = 10
# The same of [b, s, ffn/t]: the activation function reads and writes; of the heads: queries, keys, values and context
# are permuted.
_FFN_PASSES = 2
_HEAD_PASSES = 2
# Passes over the [b, a, s, s] scores where attention is not fused: written, softmax, dropout, read; and backward.
_SCORES_FORWARD = 6
_SCORES_BACKWARD = 9
# Two dropouts a layer: read, write, and a mask of one byte. Only where scores are not fused: the published runs.
_DROPOUT_PASSES = 5


@dataclass(frozen=True, slots=True)
class Kernels:
    """Which kernels a run has; the defaults are this library's, `PUBLISHED` those of Megatron's papers."""

    fused_attention: bool = True
    """Whether the scores never reach memory (Dao et al. 2022); the half above the diagonal is then left out."""
    fused_gradients: bool = False
    """Whether a product adds its weight gradient to the fp32 buffer by itself."""
    split_sends: bool = False
    """Whether stages send each other a tp-th part a rank without sequence parallelism too."""


PUBLISHED = Kernels(fused_attention=False, fused_gradients=True, split_sends=True)
"""Megatron of 2021 and 2022: softmax fused, attention not; weight gradients accumulated inside the product; hidden
states sent in parts (Narayanan et al. 2021, section 4.1)."""


class Stage:
    """The stages of one network in one layout on one cluster."""

    def __init__(
        self, model: Model, layout: Layout, cluster: Cluster, compute: Compute, *,
        scalar: bool = False, kernels: Kernels = Kernels(),
    ) -> None:  # fmt: skip
        """`scalar` puts the head of a reward or value model in place of the output layer."""
        self.model, self.layout, self.compute, self.scalar = model, layout, compute, scalar
        self.cluster, self.kernels = cluster, kernels
        self.roof, self.reach = Roof(cluster), Reach.of(layout, cluster.node)
        self.layers = model.layers / layout.pp
        self.bytes = BYTES[model.precision]

    @cached_property
    def weights(self) -> float:
        """Weights of a middle stage's layers on one rank."""
        return self.layers * flops.layer_weights(self.model) / self.layout.tp

    def layer_forward(self, rows: float, length: float) -> Seconds:
        """One layer, `rows` of `length`: four products, core attention, passes over activations, two sums over tp."""
        return self.roof.launched(
            self._products(rows * length) + self.core(rows, length) + self._passes(rows * length), _LAYER_KERNELS
        ) + 2 * self._summed(rows * length)

    def layer_backward(self, rows: float, length: float) -> Seconds:
        """Its backward: twice the products, 2.5 times fused attention (its scores are made again: Dao et al. 2022,
        section 3.1), twice the passes, the same sums over tp, the weight gradients added to the fp32 buffer, and what
        `compute.recompute` runs again: core attention, or the whole layer."""
        added = (8 if self.kernels.fused_gradients else 4 + 8) if self.bytes < 4 else 12
        work = 2 * self._products(rows * length) + 2 * self._passes(rows * length)
        work += self.core(rows, length, backward=True)
        work += self.roof.touched(added * flops.layer_weights(self.model) / self.layout.tp)
        found = self.roof.launched(work, 2 * _LAYER_KERNELS) + 2 * self._summed(rows * length)
        if self.compute.recompute == "full":
            return found + self.layer_forward(rows, length)
        return found + self.core(rows, length) if self.compute.recompute == "selective" else found

    def core(self, rows: float, length: float, *, backward: bool = False) -> Seconds:
        """softmax(q kT) v of one layer, forward or backward."""
        model, split = self.model, self.layout.tp
        work = flops.attention(model, rows, length, length) / split
        if self.kernels.fused_attention:
            return self.roof.product((2.5 if backward else 1.0) * work / 2, 0)
        scores = rows * model.heads * length**2 * self.bytes / split
        moved = (_SCORES_BACKWARD if backward else _SCORES_FORWARD) * scores
        return self.roof.product((2 if backward else 1) * work, 0) + self.roof.touched(moved)

    def head_forward(self, positions: float) -> Seconds:
        """The vocabulary's logits at `positions`, written once and read once; one number where the head is scalar."""
        if self.scalar or not positions:
            return Seconds()
        model, split = self.model, self.layout.tp
        product = self.roof.product(
            flops.head(model, positions) / split, self.bytes * model.hidden * model.vocabulary / split
        )
        logits = self.bytes * positions * model.vocabulary / split
        return self.roof.launched(product + self.roof.touched(2 * logits), _HEAD_KERNELS)

    def head_backward(self, positions: float) -> Seconds:
        """The gradient over the logits (read and written), two products; with `compute.head_rows` the logits again."""
        if self.scalar or not positions:
            return Seconds()
        again = self.head_forward(positions) if self.compute.head_rows else Seconds()
        return 2 * self.head_forward(positions) + again

    def embedded(self, tokens: float) -> Seconds:
        """The first stage's look-up of the split table, summed over tp."""
        return self._summed(tokens)

    def decoded(self, rows: float, length: float) -> Seconds:
        """One token for each of `rows` through one layer: its weights and the `length` slots of the cache are read,
        two sums over tp."""
        model, split = self.model, self.layout.tp
        keys = 2 * min(model.groups, model.heads) * (model.hidden // model.heads) / max(1, split)
        work = self._products(rows) + self.roof.product(
            flops.attention(model, rows, 1, length) / split, self.bytes * rows * length * keys
        )
        return self.roof.launched(work + self._passes(rows), _LAYER_KERNELS) + 2 * self._summed(rows)

    def drawn(self, rows: float) -> Seconds:
        """Logits of one position of `rows`, and the draw over them: read once in fp32, four numbers a row over tp."""
        logits = rows * self.model.vocabulary / self.layout.tp
        found = self.head_forward(rows) + self.roof.touched(4 * logits)
        return found + self._over_tp(16 * rows)

    def passed(self, tokens: float) -> Seconds:
        """The hidden states of `tokens` sent to the next stage; with sp each tp rank sends its part."""
        if self.layout.pp == 1:
            return Seconds()
        split = self.layout.tp if self.layout.sp or self.kernels.split_sends else 1
        return self.roof.sent(self.bytes * tokens * self.model.hidden / split, self.reach.pp)

    def _products(self, tokens: float) -> Seconds:
        weights = flops.layer_weights(self.model) / self.layout.tp
        return self.roof.product(2 * tokens * weights, self.bytes * weights)

    def _passes(self, tokens: float) -> Seconds:
        model, split = self.model, self.layout.tp
        gates = 2 if model.style == "llama" else 1
        whole = _WHOLE_PASSES + (0 if self.kernels.fused_attention else _DROPOUT_PASSES)
        numbers = whole * model.hidden / (split if self.layout.sp else 1)
        numbers += (_FFN_PASSES * gates * model.ffn_width + 4 * _HEAD_PASSES * model.hidden) / split
        return self.roof.touched(self.bytes * tokens * numbers)

    def _summed(self, tokens: float) -> Seconds:
        """[tokens, h] summed over tp; sp's reduce-scatter and all-gather together are as long (Korthikanti et al.
        2022, section 4.2.2)."""
        return self._over_tp(self.bytes * tokens * self.model.hidden)

    def _over_tp(self, moved: float) -> Seconds:
        return self.roof.reduced(moved, self.layout.tp, self.reach.tp)
