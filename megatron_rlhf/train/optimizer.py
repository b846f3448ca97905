"""Gradient buffers, the distributed optimizer with fp16's loss scale, and the weight average of one network.

Every Megatron schedule would end in `finalize_model_grads`, which reduces the buffers in place: called twice it counts
the first part again. Here it runs in `step` alone, once, however many accumulations came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_rlhf.checkpoint.pieces import Range
from megatron_rlhf.config.schema import Adam
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.train import host
from megatron_rlhf.train.shards import Shard


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of a step: the gradient norm before clipping and the loss scale its gradients carried; where they
    overflowed fp16 the step was skipped and the norm is 0."""

    norm: float
    scale: float
    overflow: bool = False


class Optimizer:
    """Adam over the replicas' shards: finalises gradients once, unscales, checks, clips, steps and zeroes.

    fp32 main weights and moments lie on the device, or with `adam.host` in host memory.
    """

    def __init__(self, network: Network, adam: Adam, epsilon: float) -> None:
        """Wrap the network's stages in gradient buffers; the network's weights move into Megatron's flat buffers."""
        self.network = network
        self.clip = adam.clip
        self.loss_scale = adam.loss_scale
        self.stuck = 0
        self.away = False
        """Whether gradient buffers, and perhaps main weights and moments, have left the device (train/offload.py)."""
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
            bf16=network.config.bf16,
            fp16=network.config.fp16,
            initial_loss_scale=adam.loss_scale.initial,
            min_loss_scale=adam.loss_scale.minimum,
            loss_scale_window=adam.loss_scale.growth_interval,
            hysteresis=adam.loss_scale.hysteresis,
            params_dtype=network.config.params_dtype,
            use_distributed_optimizer=True,
        )
        self.hosted = adam.host
        if adam.host:
            host.announce(settings)
        self.inner = get_megatron_optimizer(settings, self.stages, use_gloo_process_groups=False, pg_collection=groups)
        for optimizer in self.inner.chained_optimizers:
            for group in optimizer.param_groups:
                # Biases and norms have a factor of 0, which only Megatron's own learning-rate scheduler would apply.
                group["weight_decay"] = adam.weight_decay * group["wd_mult"]
            if adam.host:
                host.HostAdam.take_over(optimizer, (adam.beta1, adam.beta2), epsilon)
            if network.config.fp16:
                # Megatron has no settings for these two (mcore 0.16.1 optimizer/__init__.py:430).
                optimizer.grad_scaler.growth_factor.fill_(adam.loss_scale.growth)
                optimizer.grad_scaler.backoff_factor.fill_(adam.loss_scale.backoff)
        if network.config.fp16:
            network.config.grad_scale_func = self.inner.scale_loss
        self.zero()

    def zero(self) -> None:
        """Empty the gradient buffers."""
        self.present()
        for stage in self.stages:
            stage.zero_grad_buffer()
        self.inner.zero_grad()

    def gradients(self) -> list[Tensor]:
        """The flat gradient buffers."""
        return [buffer.grad_data for stage in self.stages for buffer in stage.buffers + stage.expert_parallel_buffers]

    def present(self) -> None:
        """Raises RuntimeError while gradients or state are away from the device."""
        if self.away:
            raise RuntimeError(
                "gradient buffers and optimizer state have left the device for the generate phase; leave it first"
            )

    def sync(self) -> None:
        """Gather the weights of the last step on every replica; more often than once does no harm. Collective: dp."""
        for stage in self.stages:
            stage.start_param_sync(force_sync=True)

    def finalise(self) -> None:
        """Reduce the accumulated gradients over replicas, tied embeddings and sequence-parallel weights, once.

        Collective: dp, tp, pp.
        """
        self.present()
        finalize_model_grads(self.stages, None, pg_collection=self.network.grid.groups)

    def step(self, rate: float) -> Taken:
        """Finalise, unscale, check, clip, take one Adam step at `rate` and zero.

        A gradient that is not finite on any rank of the role skips the step on all of them in fp16, and the loss scale
        shrinks; weights, moments and their counts keep every bit. Raises FloatingPointError before the weights change
        in other precisions, and in fp16 after `patience` such steps in a row at the smallest scale.
        Collective: dp, tp, pp.
        """
        self.finalise()
        scale = float(self.inner.get_loss_scale())
        if self.inner.prepare_grads():
            self._skip(scale)
            return Taken(0.0, scale, overflow=True)
        self.stuck = 0
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
        return Taken(norm, scale)

    def _skip(self, scale: float) -> None:
        self.stuck = self.stuck + 1 if scale <= self.loss_scale.minimum else 0
        if self.stuck >= self.loss_scale.patience:
            raise FloatingPointError(
                f"the gradients overflowed fp16 {self.stuck} times in a row at the smallest loss scale, {scale:g}; "
                "the weights were left as they were: lower the learning rate, or train in bf16"
            )
        self.zero()

    def adams(self) -> list[torch.optim.Optimizer]:
        """The optimizers that hold main weights and moments, on the device or on the host."""
        self.present()
        inners = [optimizer.optimizer for optimizer in self.inner.chained_optimizers]
        return [inner.adam if _hosted(inner) else inner for inner in inners]

    def shards(self) -> list[Tensor]:
        """This rank's fp32 main weights, in the optimizer's order, where they lie."""
        return [shard for adam in self.adams() for group in adam.param_groups for shard in group["params"]]

    def publish(self) -> None:
        """Write the main weights into the model and gather them over replicas. Collective: dp."""
        self.present()
        for optimizer in self.inner.chained_optimizers:
            if _hosted(optimizer.optimizer):
                optimizer.optimizer.publish()
            else:
                optimizer._copy_main_params_to_model_params()
        self.sync()

    def reload(self) -> None:
        """Take the model's weights as the main weights, after they were written from outside."""
        self.present()
        for optimizer in self.inner.chained_optimizers:
            if _hosted(optimizer.optimizer):
                optimizer.optimizer.reload()
            else:
                optimizer.reload_model_params()

    def held(self, averages: Sequence[Tensor] = ()) -> list[Shard]:
        """What this rank holds of every tensor, with the averages of `shards()` where they are given."""
        grid, directory = self.network.grid, self.network.directory
        names = {parameter: name for name, parameter in self.network.parameters.items()}
        average = dict(zip(map(id, self.shards()), averages, strict=True)) if averages else {}
        found = []
        for optimizer, adam in zip(self.inner.chained_optimizers, self.adams(), strict=True):
            for parameter, (group, place) in optimizer.model_param_group_index_map.items():
                span = optimizer._get_model_param_range_map(parameter)["param"]
                name, main = names[parameter], adam.param_groups[group]["params"][place]
                split, owner = directory[name].split, grid.layout.coordinate(directory[name].owners[0])
                tp_rank = 0 if split.dim is None else grid.tp_rank
                where = Range(name, split, grid.layout.tp, tp_rank, tuple(parameter.shape), span.start, span.end)
                ours = owner is not None and owner[1] == grid.pp_rank and tp_rank == grid.tp_rank
                found.append(Shard(where, main, adam, adam.param_groups[group], average.get(id(main)), ours))
        return found

    def scaling(self) -> dict[str, Any]:
        """fp16's loss scale with its counts, and how many steps in a row it was stuck; equal on all ranks."""
        first = self._scalers()[:1]
        return {"scale": dict(first[0].state_dict()) if first else None, "stuck": self.stuck}

    def rescale(self, scaling: Mapping[str, Any]) -> None:
        """Put back what `scaling` gave."""
        for scaler in self._scalers():
            scaler.load_state_dict(scaling["scale"])
        self.stuck = scaling["stuck"]

    def _scalers(self) -> list[Any]:
        return [optimizer.grad_scaler for optimizer in self.inner.chained_optimizers if optimizer.grad_scaler]


def _hosted(inner: object) -> bool:
    return isinstance(inner, host.HostAdam)


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
