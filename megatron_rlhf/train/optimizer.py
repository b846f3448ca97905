"""Gradient buffers, the distributed optimizer and the weight average of one network.

Every Megatron schedule would end in `finalize_model_grads`, which reduces the buffers in place: called twice it counts
the first part again. Here it runs in `step` alone, once, however many accumulations came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_rlhf.config.schema import Adam
from megatron_rlhf.models.transformer import Network


class Optimizer:
    """Adam over the replicas' shards: finalises gradients once, checks, clips, steps and zeroes."""

    def __init__(self, network: Network, adam: Adam, epsilon: float) -> None:
        """Wrap the network's stages in gradient buffers; the network's weights move into Megatron's flat buffers."""
        self.network = network
        self.clip = adam.clip
        config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        groups = network.grid.groups
        self.stages = [
            DistributedDataParallel(network.config, config, chunk, pg_collection=groups) for chunk in network.chunks
        ]
        settings = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            min_lr=0.0,
            weight_decay=adam.weight_decay,
            adam_beta1=adam.beta1,
            adam_beta2=adam.beta2,
            adam_eps=epsilon,
            clip_grad=adam.clip,
            bf16=network.model.precision == "bf16",
            params_dtype=network.config.params_dtype,
            use_distributed_optimizer=True,
        )
        self.inner = get_megatron_optimizer(settings, self.stages, use_gloo_process_groups=False, pg_collection=groups)
        for optimizer in self.inner.chained_optimizers:
            for group in optimizer.param_groups:
                # Biases and norms have a factor of 0, which only Megatron's own learning-rate scheduler would apply.
                group["weight_decay"] = adam.weight_decay * group["wd_mult"]
        self.zero()

    def zero(self) -> None:
        """Empty the gradient buffers."""
        for stage in self.stages:
            stage.zero_grad_buffer()
        self.inner.zero_grad()

    def finalise(self) -> None:
        """Reduce the accumulated gradients over replicas, tied embeddings and sequence-parallel weights, once.

        Collective: dp, tp, pp.
        """
        finalize_model_grads(self.stages, None, pg_collection=self.network.grid.groups)

    def step(self, rate: float) -> float:
        """Finalise, check, clip, take one Adam step at `rate` and zero; the gradient norm before clipping.

        Raises FloatingPointError before the weights change when the norm is not finite. Collective: dp, tp, pp.
        """
        self.finalise()
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}; the weights were left as they were")
        for optimizer in self.inner.chained_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if self.clip > 0:
                optimizer.clip_grad_norm(self.clip)
        self.inner.step_with_ready_grads()
        self.zero()
        return norm

    def shards(self) -> list[Tensor]:
        """This rank's fp32 main weights, in the optimizer's order."""
        return [parameter for optimizer in self.inner.chained_optimizers for parameter in optimizer.get_parameters()]

    def publish(self) -> None:
        """Write the main weights into the model and gather them over replicas. Collective: dp."""
        for optimizer in self.inner.chained_optimizers:
            optimizer._copy_main_params_to_model_params()
        for stage in self.stages:
            stage.start_param_sync(force_sync=True)

    def reload(self) -> None:
        """Take the model's weights as the main weights, after they were written from outside."""
        for optimizer in self.inner.chained_optimizers:
            optimizer.reload_model_params()

    def state(self) -> dict[str, Any]:
        """This rank's main weights and Adam state as they lie."""
        adam = [optimizer.optimizer for optimizer in self.inner.chained_optimizers]
        return {
            "main": [shard.detach().clone() for shard in self.shards()],
            "adam": [[dict(inner.state.get(p, {})) for g in inner.param_groups for p in g["params"]] for inner in adam],
            # A fused Adam counts its steps in the parameter groups, torch's in each parameter's state.
            "steps": [[group.get("step") for group in inner.param_groups] for inner in adam],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave, under the same layout, and publish the weights. Collective: dp."""
        with torch.no_grad():
            for shard, saved in zip(self.shards(), state["main"], strict=True):
                shard.copy_(saved)
        for optimizer, saved_group in zip(self.inner.chained_optimizers, state["adam"], strict=True):
            inner = optimizer.optimizer
            parameters = [p for g in inner.param_groups for p in g["params"]]
            for parameter, saved in zip(parameters, saved_group, strict=True):
                # A tensor of its own each: Megatron's loader would give all parameters one shared `step`
                # (mcore 0.16.1 distrib_optimizer.py:820), and Adam would race ahead.
                inner.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
        for optimizer, steps in zip(self.inner.chained_optimizers, state["steps"], strict=True):
            for group, step in zip(optimizer.optimizer.param_groups, steps, strict=True):
                if step is not None:
                    group["step"] = step
        self.publish()


def accompany() -> None:
    """What a rank outside the grid does while the others make their Optimizer. Collective: world.

    Megatron compares parameter groups, dense and then expert ones, over the whole world whatever groups it was handed
    (mcore 0.16.1 optimizer/__init__.py:181, from :610 and :647).
    """
    for _ in ("dense", "expert"):
        dist.all_gather_object([None] * dist.get_world_size(), [])


class Average:
    """Exponential average of the main weights, as shards where the optimizer has them."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Start at the live weights."""
        self.optimizer = optimizer
        self.shards = [shard.detach().clone() for shard in optimizer.shards()]

    @torch.no_grad()
    def follow(self, rule: Callable[[list[Tensor], list[Tensor]], None]) -> None:
        """Let `rule(average, live)` change the average's shards in place."""
        rule(self.shards, [shard.detach() for shard in self.optimizer.shards()])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside, the live weights again after. Collective: dp."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, live in zip(self.shards, self.optimizer.shards(), strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)
        self.optimizer.publish()
