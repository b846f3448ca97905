"""How far the generate phase's log-probs are from the train phase's, and the layer where the two networks part.

B sequences, R response tokens, L places (the embedding, then every layer), K positions, h hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.batch import Rows
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.parallel import collectives
from megatron_rlhf.train.engine import Engine

LIMIT = {"fp32": 1.0001, "bf16": 1.05, "fp16": 1.02}
"""The largest mean exp|Δ log-prob| that rounding explains; 1.05 is where others warn."""
_APART = {"fp32": 1e-3, "bf16": 0.1, "fp16": 2e-2}
"""Difference of two layers' outputs, relative to the largest number in them, above what rounding explains."""
_POSITIONS = 16
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def quantiles(apart_BR: Tensor, mask_BR: Tensor) -> dict[str, float]:
    """p50, p90, p99 and max of |Δ log-prob| over the tokens in the mask; 0 where there is none."""
    apart = apart_BR[mask_BR > 0].double()
    if not len(apart):
        return dict.fromkeys(_QUANTILES, 0.0)
    ordered = apart.sort().values
    return {name: float(ordered[round(share * (len(ordered) - 1))]) for name, share in _QUANTILES.items()}


def bisect(policy: Engine, network: Network, rows: Rows) -> str:
    """A sentence that names the first place of the model where `policy` and `network` differ on any of the rows.

    Both run the rows whole, so a difference that only decoding makes is not seen; the sentence says so. Collective:
    world.
    """
    generating = Engine(network, policy.read, policy.compute)
    worst_L = torch.zeros(1 + network.model.layers)
    for number in range(len(rows)):
        row = rows.select(torch.tensor([number]))
        ours_LKh, theirs_LKh = (outputs(engine, row) for engine in (policy, generating))
        apart_L = (ours_LKh - theirs_LKh).abs().amax((1, 2)) / ours_LKh.abs().amax((1, 2))
        worst_L = torch.maximum(worst_L, apart_L.nan_to_num(torch.inf))
    beyond = (worst_L > _APART[network.model.precision]).nonzero().flatten().tolist()
    if not beyond:
        return "every layer's output agrees on whole rows: what differs is the head, or decoding through the cache"
    place = "the embedding" if beyond[0] == 0 else f"layer {beyond[0] - 1}"
    return f"{place} is the first whose output differs, by {float(worst_L[beyond[0]]):.2g} of its largest number"


@torch.no_grad()
def outputs(engine: Engine, row: Rows) -> Tensor:
    """What the embedding and every layer put out for one row, at some of its positions, [L, K, h] in fp32 on every
    rank. Collective: world."""
    grid, model = engine.network.grid, engine.network.model
    positions = torch.linspace(0, int(row.lengths_B[0]) - 1, _POSITIONS).round().long()
    found_LKh = torch.zeros(1 + model.layers, len(positions), model.hidden)
    with _listening(engine.network) as heard:
        engine.forward(row.select(torch.zeros(grid.layout.dp, dtype=torch.int64)))
    if grid.inside and grid.dp_rank == grid.tp_rank == 0:
        for place, hidden_Sh in heard.items():
            found_LKh[place] = hidden_Sh[positions.to(hidden_Sh.device)].float().cpu()
    travelling = found_LKh.to(collectives.device())
    dist.all_reduce(travelling)
    return travelling.cpu()


@contextmanager
def _listening(network: Network) -> Iterator[dict[int, Tensor]]:
    """What the first forward inside puts out by place, [S, h] of its first row. Collective: tp, inside, under sp."""
    heard: dict[int, Tensor] = {}

    def hear(place: int, hidden_Sbh: Tensor) -> None:
        if place in heard:
            return
        assert network.grid.groups is not None
        if network.config.sequence_parallel:
            hidden_Sbh = collectives.gather(hidden_Sbh, network.grid.groups.tp).flatten(0, 1)
        heard[place] = hidden_Sbh[:, 0]

    def before(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hear(0, named["hidden_states"] if "hidden_states" in named else arguments[0])

    def after(module: Any, arguments: Any, output: Any) -> None:
        hear(module.layer_number, output[0] if isinstance(output, tuple) else output)

    layers = [layer for chunk in network.chunks for layer in chunk.decoder.layers]
    handles = [layer.register_forward_hook(after) for layer in layers]
    handles += [each.register_forward_pre_hook(before, with_kwargs=True) for each in layers if each.layer_number == 1]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
