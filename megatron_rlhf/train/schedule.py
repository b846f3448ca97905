"""The one place that calls Megatron's forward-backward schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.pulse import beat
from megatron_rlhf.parallel.collectives import device
from megatron_rlhf.train.microbatch import Part, positions, segments, tokens

Finish = Callable[[Tensor, Part], Any]


def run(
    network: Network, stages: list[torch.nn.Module], parts: list[Part], finish: Finish, *, forward_only: bool
) -> list[Any]:
    """What `finish(stage output, part)` returned for every part on the last stage, an empty list elsewhere.

    With a backward pass `finish` returns `(loss, count, kept)`, losses already divided by their global counts: nothing
    is divided by micro-batches or replicas, and gradients are left unreduced in the buffers. Collective: pp, tp.
    """
    grid = network.grid
    assert grid.groups is not None
    config = network.config
    assert config.finalize_model_grads_func is None, "gradients are finalised by update() alone"

    pipelined, virtual = grid.layout.pp > 1, grid.layout.vp > 1
    if virtual and (config.batch_p2p_comm or config.deallocate_pipeline_outputs):
        raise RuntimeError("interleaved stages with these sends would give wrong gradients without a word")

    def step(queue: Iterator[Part], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        beat()
        part = next(queue)
        tokens_cS, positions_cS, segments_cS = _inputs(part)
        output = stage(tokens_cS, positions_cS, attention_mask=segments_cS)

        def kept(stage_output: Tensor, non_loss_data: bool = False) -> Any:
            return finish(stage_output, part)

        return output, kept

    schedule = get_forward_backward_func(pp_size=grid.layout.pp, vp_size=grid.layout.vp if virtual else None)
    return schedule(
        forward_step_func=step,
        data_iterator=[iter(parts) for _ in stages] if virtual else iter(parts),
        model=stages,
        num_microbatches=len(parts),
        seq_length=parts[0].length,
        micro_batch_size=parts[0].lines,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        p2p_communicator=P2PCommunicator(grid.groups.pp, config) if pipelined else None,
        pg_collection=grid.groups,
    )


def _inputs(part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
    where, segments_cS = device(), segments(part)
    return tokens(part).to(where), positions(part).to(where), None if segments_cS is None else segments_cS.to(where)
