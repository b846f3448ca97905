"""Tiny roles for tests on a grid, and the full tensors behind their shards.

The world has 4 ranks; `ONE` is a single rank of it, where plain autograd is the oracle. Weights start as functions of
a seed and a name, so roles of different layouts start equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.batch import Annotated, Experience, Prompts, Rankings, Rollout, Rows
from megatron_rlhf.checkpoint.pieces import Range
from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.schema import Adam, Compute, Learning, Model, Rope
from megatron_rlhf.models import roles, transformer
from megatron_rlhf.models.transformer import Network
from megatron_rlhf.observe.stats import Stats
from megatron_rlhf.parallel import grid
from megatron_rlhf.parallel.collectives import any_rank
from megatron_rlhf.reshard import move
from megatron_rlhf.train.engine import Engine

ONE = "tp1 @0-0"
PADDED = 128
"""Rows of the embedding; the vocabulary of MODEL is 100."""
MODEL = Model(layers=4, hidden=32, heads=4, vocabulary=100, context=64, init_std=0.1)
LLAMA = replace(MODEL, style="llama", heads=8, kv_heads=4, ffn=64, tied=False)
NEOX = replace(MODEL, style="neox", tied=False, rope=Rope(fraction=0.5))
STYLES = {"gpt": MODEL, "llama": LLAMA}
RELATIVES = {
    "qwen2": replace(LLAMA, qkv_bias=True),
    "neox": NEOX,
    "biased": replace(LLAMA, linear_bias=True, head_dim=24),
}

Tensors = Mapping[str, Tensor]


def network(words: str, model: Model = MODEL, *, rows: int = PADDED, seed: int = 5, **settings: Any) -> Network:
    """The network of `model` under the layout `words` of this world. Collective: world."""
    layout = Layout.parse(words, dist.get_world_size())
    return transformer.build(model, grid.build(layout), rows=rows, seed=seed, **settings)


def engine(
    words: str,
    read: roles.Read | None = None,
    *,
    model: Model = MODEL,
    micro_batch: int = 4,
    rate: float = 1e-3,
    epsilon: float = 1e-8,
    adam: Adam | None = None,
    averaged: bool = False,
    **settings: Any,
) -> Engine:
    """A role that learns under the layout `words`, a policy unless `read` says otherwise. Collective: world."""
    return learner(network(words, model, **settings), read, micro_batch, rate, epsilon, adam, averaged)


def learner(
    built: Network,
    read: roles.Read | None = None,
    micro_batch: int = 4,
    rate: float = 1e-3,
    epsilon: float = 1e-8,
    adam: Adam | None = None,
    averaged: bool = False,
) -> Engine:
    """A role that learns on a network that is there. Collective: world."""
    learning = Learning(rate=rate, schedule="constant", epsilon=epsilon)
    compute = Compute(micro_batch=micro_batch, forward_micro_batch=2 * micro_batch)
    read = read or roles.logprobs()
    return Engine(built, read, compute, adam=adam or Adam(), learning=learning, averaged=averaged, seed=11)


def rows(count: int = 12, *, seed: int = 3, vocabulary: int = 100, longest: int = 10) -> Rows:
    """Rows of ragged prompts (1 to `longest`) and responses (1 to `longest`), tokens from 1 on."""
    generator = torch.Generator().manual_seed(seed)
    prompts_B = torch.randint(1, longest + 1, (count,), generator=generator)
    lengths_B = prompts_B + torch.randint(1, longest + 1, (count,), generator=generator)
    width = int(lengths_B.max())
    tokens_BT = torch.randint(1, vocabulary, (count, width), generator=generator)
    return Rows(tokens_BT.masked_fill(torch.arange(width) >= lengths_B[:, None], 0), prompts_B, lengths_B)


def text(count: int, length: int = 12, *, seed: int = 7, vocabulary: int = 100) -> Rows:
    """Pretraining rows of one length: a prompt of one token, no padding."""
    tokens_BT = torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return Rows(tokens_BT, torch.ones(count, dtype=torch.int64), torch.full((count,), length))


def prompts(count: int, *, seed: int = 4, vocabulary: int = 100, longest: int = 9) -> Prompts:
    """Ragged prompts, one token the shortest."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, longest + 1, (count,), generator=generator)
    lengths_B[0], lengths_B[-1] = longest, 1
    tokens_BT = torch.randint(1, vocabulary, (count, longest), generator=generator)
    tokens_BT = tokens_BT.masked_fill(torch.arange(longest) >= lengths_B[:, None], 0)
    return Prompts(tokens_BT, lengths_B, torch.arange(count))


def rankings(count: int = 6, most: int = 4, *, seed: int = 8) -> Rankings:
    """Rankings of 2 to `most` responses with ties; what is missing to `most` has rank 0 and length 0."""
    generator = torch.Generator().manual_seed(seed)
    flat = rows(count * most, seed=seed)
    ranks_PK = torch.randint(1, most + 1, (count, most), generator=generator)
    here = torch.arange(most) < torch.randint(2, most + 1, (count, 1), generator=generator)
    kept = flat.select(torch.where(here.flatten(), torch.arange(count * most), -1))
    return Rankings(
        kept.tokens_BT.view(count, most, -1),
        kept.prompt_lengths_B.view(count, most),
        kept.lengths_B.view(count, most),
        ranks_PK.masked_fill(~here, 0),
    )


def experience(old: Callable[[Rows], Tensor] | None = None, count: int = 12, *, seed: int = 9) -> Experience:
    """Made-up experience over `rows`: old log-probs and values from `old` where given, the rest is noise."""
    generator = torch.Generator().manual_seed(seed)
    episodes = rows(count, seed=seed)
    mask_BR = episodes.response_mask_BR(episodes.width)
    noise = [torch.randn(mask_BR.shape, generator=generator) * mask_BR for _ in range(4)]
    read_BR = old(episodes) if old else noise[0]
    zeros_B = torch.zeros(count)
    rollout = Rollout(episodes, read_BR, zeros_B.long(), zeros_B)
    return Experience(Annotated(rollout, read_BR, noise[1], read_BR, mask_BR), noise[1], noise[2], noise[3])


def weights(built: Network) -> dict[str, Tensor]:
    """Every full tensor, as its owners hold it, on every rank. Collective: world."""
    return {name: move.whole(built, name) for name in built.directory}


def main_weights(role: Engine) -> dict[str, Tensor]:
    """Every full tensor, put together from the optimizer's shards. Collective: world."""
    return gathered(role, shards(role, lambda shard: shard.detach()))


def step(role: Engine) -> tuple[Stats, dict[str, Tensor]]:
    """One update and the reduced gradients, full and before clipping, that it took. Collective: world."""
    found: dict[str, Tensor] = {}
    inner = role.optimizer.inner if role.optimizer else None
    if inner is not None:
        prepare = inner.prepare_grads

        def remembering() -> bool:
            answer = prepare()
            found.update(shards(role, lambda shard: shard.grad))
            return answer

        inner.prepare_grads = remembering
    try:
        stats = role.update()
    finally:
        if inner is not None:
            del inner.prepare_grads
    return stats, gathered(role, found)


def shards(role: Engine, pick: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """What `pick` gives of this rank's optimizer shards, each at its place in a local tensor of zeros."""
    found: dict[str, Tensor] = {}
    if role.optimizer is None:
        return found
    names = {parameter: name for name, parameter in role.network.parameters.items()}
    for inner in role.optimizer.inner.chained_optimizers:
        for parameter, (group, place) in inner.model_param_group_index_map.items():
            span = inner._get_model_param_range_map(parameter)["param"]
            value = pick(inner.optimizer.param_groups[group]["params"][place])
            local = torch.zeros(parameter.numel())
            if value is not None:
                local[span.start : span.end] = value
            found[names[parameter]] = local.view(parameter.shape)
    return found


def gathered(role: Engine, local: Tensors) -> dict[str, Tensor]:
    """Full fp32 tensors from `shards`: added over replicas, put together over tp and stages. Collective: world."""
    mine: dict[str, Any] = {}
    if role.network.grid.groups is not None:
        for name, parameter in role.network.parameters.items():
            mine[name] = local[name].clone() if name in local else torch.zeros(parameter.shape)
            dist.all_reduce(mine[name], group=role.network.grid.groups.dp)
    fp32 = {name: replace(entry, dtype=torch.float32) for name, entry in role.network.directory.items()}
    return weights(replace(role.network, parameters=mine, directory=fp32))


class Kept:
    """A role's state on this rank in memory, copies of tied and replicated tensors too; `restore` takes it."""

    def __init__(self, role: Engine) -> None:
        """Copies what the role holds now."""
        self.role = role
        self.counts = role.counts()
        self.scale = copy.deepcopy(role.scaling())
        shards = role._held()
        pieces = [shard.piece() for shard in shards]
        self.values = {p.where: {k: v.detach().clone() for k, v in p.values.items()} for p in pieces}
        assert len(self.values) == len(shards)

    def scaling(self) -> dict[str, Any]:
        assert self.scale is not None
        return self.scale

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        assert shapes

    def read(self, wanted: Range) -> dict[str, Tensor]:
        return self.values[wanted]


def plain_gradients(built: Network, read: roles.Read, terms: Sequence[tuple[Any, Any, float]]) -> dict[str, Tensor]:
    """The gradient of the sum of weight x loss(batch), by plain autograd on one rank, on every rank; terms are
    (batch, loss, weight). Collective: world."""
    if built.grid.inside:
        (stage,) = built.chunks
        stage.train()
        for batch, loss, weight in terms:
            tokens_BT = batch.rows.tokens_BT
            output = stage(tokens_BT, torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT), attention_mask=None)
            value, _ = loss(read.of(built, output, batch.rows, batch.rows.width), batch, batch)
            (value * weight).backward()
    mine: dict[str, Any] = {name: parameter.grad for name, parameter in built.parameters.items()}
    return weights(replace(built, parameters=mine))


def distance(left: Tensors, right: Tensors) -> float:
    """The largest relative difference of a tensor, |left - right| / |right| in the 2-norm.

    A tensor below a thousandth of the largest is measured against that, as its own numbers may be rounding noise.
    """
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    floor = 1e-3 * max(float(tensor.norm()) for tensor in right.values())
    return max(float((left[name] - right[name]).norm()) / max(float(right[name].norm()), floor) for name in left)


def equal(left: Tensors, right: Tensors) -> bool:
    """Whether all tensors are bit-equal."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def copies_agree(built: Network) -> bool:
    """Whether every rank holds its slice of the full tensors: replicas and tied copies too. Collective: world."""
    full, tp = weights(built), built.grid.layout.tp
    same = True
    for name, parameter in built.parameters.items():
        part = built.directory[name].split.part(full[name], tp, built.grid.tp_rank)
        same &= torch.equal(part, parameter)
    return not any_rank(not same)
