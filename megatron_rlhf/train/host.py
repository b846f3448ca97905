"""Adam on the host: fp32 main weights and both moments lie in host memory, pinned where CUDA is.

A step copies the gradient shards in, steps torch's AdamW on the host's cores and copies the weights out. Megatron's own
hybrid optimizer (mcore 0.16.1 optimizer/cpu_offloading) does the same for 16-bit CUDA weights only: its step is a
KeyError without CUDA (hybrid_optimizer.py:101), and it refuses shards of fp32 weights, which are no leaves (:57).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def announce(settings: OptimizerConfig) -> None:
    """Tell Megatron that the main weights are not its own. Modifies: `settings`.

    Its distributed optimizer then allocates none and hands each shard its gradient as `decoupled_grad`, the contract of
    its precision-aware optimizers. As an argument the flag would ask for Transformer Engine (optimizer_config.py:383).
    """
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True


class HostAdam:
    """AdamW over host copies of the shards in `param_groups`, whose rates and decays it follows."""

    def __init__(self, param_groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float) -> None:
        """Copy the shards; moments appear at the first step."""
        self.param_groups = param_groups
        self.pinned = torch.cuda.is_available()
        groups = [[(shard, self._main(shard)) for shard in group["params"]] for group in param_groups]
        self.pairs = [pair for group in groups for pair in group]
        # The fused kernel passes over memory once. Where the weights are on the CPU anyway its rounding would only set
        # this apart from the plain optimizer.
        self.adam = torch.optim.AdamW(
            [{"params": [main for _, main in group]} for group in groups],
            lr=0.0,
            betas=betas,
            eps=epsilon,
            fused=self.pinned,
        )

    @classmethod
    def take_over(cls, optimizer: DistributedOptimizer, betas: tuple[float, float], epsilon: float) -> None:
        """Let `optimizer` step on the host, in place of the Adam that Megatron gave it."""
        optimizer.optimizer = cls(optimizer.optimizer.param_groups, betas, epsilon)

    def step(self) -> None:
        """Gradients in, one step of AdamW, weights out."""
        for ours, theirs in zip(self.adam.param_groups, self.param_groups, strict=True):
            ours["lr"], ours["weight_decay"] = theirs["lr"], theirs["weight_decay"]
        for shard, main in self.pairs:
            if main.grad is None:
                main.grad = torch.empty_like(main, pin_memory=self.pinned)
            main.grad.copy_(shard.decoupled_grad, non_blocking=True)
        self._settle()
        self.adam.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the main weights into the shards."""
        for shard, main in self.pairs:
            shard.data.copy_(main, non_blocking=True)
        self._settle()

    @torch.no_grad()
    def reload(self) -> None:
        """Take the shards as the main weights."""
        for shard, main in self.pairs:
            main.copy_(shard)

    def _main(self, shard: Tensor) -> Tensor:
        main = shard.detach().to("cpu", torch.float32, copy=True)
        return main.pin_memory() if self.pinned else main

    def _settle(self) -> None:
        """Wait for the copies: the host neither reads gradients that are still coming nor changes weights on the go."""
        if self.pinned:
            torch.cuda.current_stream().synchronize()
