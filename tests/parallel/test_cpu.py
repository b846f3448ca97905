"""Proves that real Megatron-Core trains on CPU ranks after `install`, alike under every layout, and that its random
states, recomputation and checkpoints work there.

Not proved here: sequence parallelism (needs our own norm), asynchronous saving, resuming an optimizer, anything on a
GPU.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rlhf.config.layout import Layout
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.parallel import cpu
from tests.helpers.grid import on_grid

_BATCH, _LENGTH, _WORDS = 8, 12, 64


def test_another_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version the patches were not written for is bad input, and nothing is patched."""
    before = torch.cuda.current_device
    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.17.0")
    with pytest.raises(BadInput, match="megatron-core 0.17.0"):
        cpu.install()
    assert torch.cuda.current_device is before


def test_nothing_changes_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA available neither the version nor torch is touched."""
    before = torch.cuda.current_device, torch.zeros, Tensor.to
    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0.17.0")
    cpu.install()
    assert (torch.cuda.current_device, torch.zeros, Tensor.to) == before


@on_grid(4)
def test_cuda_by_name_is_the_cpu() -> None:
    """Every way in which Megatron names the GPU gives a CPU tensor; other devices are left alone."""
    patched = torch.zeros
    cpu.install()
    assert torch.zeros is patched, "a second install must not wrap the wrappers"
    made = [
        torch.zeros(2, device="cuda"),
        torch.empty_like(torch.ones(2), device=torch.device("cuda", 0)),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device="cuda:0", dtype=torch.bfloat16),
        torch.nn.Linear(2, 2).cuda().to("cuda").weight,
        torch.tensor([1.0], device=torch.cuda.current_device()),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).type(torch.int64).dtype == torch.int64
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.Event(enable_timing=True).record()
        torch.cuda.synchronize()


@on_grid(4)
def test_the_tracker_forks_random_states() -> None:
    """Inside `fork` draws differ by tensor-parallel rank and go on where they stopped; outside nothing moved."""
    rank = dist.get_rank()
    random.model_parallel_cuda_manual_seed(5, tp_rank=rank, ep_rank=0, etp_rank=0, force_reset_rng=True)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(5).get_state()), "the default state's seed"
    tracker = random.get_cuda_rng_tracker()
    untouched = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with tracker.fork():
            draws.append(torch.rand(4))
            with tracker.fork("data-parallel-rng"):
                draws.append(torch.rand(4))
            draws.append(torch.rand(4))
    assert torch.equal(torch.get_rng_state(), untouched)
    model, data = [draws[i] for i in (0, 2, 3, 5)], [draws[1], draws[4]]
    alone = torch.Generator().manual_seed(5 + 2718 + rank)
    assert all(torch.equal(draw, torch.rand(4, generator=alone)) for draw in model)
    shared = torch.Generator().manual_seed(5)
    assert all(torch.equal(draw, torch.rand(4, generator=shared)) for draw in data)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@on_grid(4)
def test_layouts_train_alike() -> None:
    """Three Adam steps under replicas, tensor, pipeline and interleaved parallelism: equal losses and gradient norms.

    The replicas alone are checked against plain arithmetic: the loss starts near log(vocabulary) and falls.
    """
    reference = _train(Layout(dp=4), steps=3)
    losses = [loss for loss, _ in reference]
    assert losses[0] == pytest.approx(4.16, abs=0.5)
    assert losses[2] < losses[0] - 0.1
    for layout in (Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(pp=2, vp=2, dp=2), Layout(tp=2, pp=2)):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(_train(layout, steps=3), reference, strict=True):
            assert loss == pytest.approx(wanted_loss, abs=2e-5), layout
            assert norm == pytest.approx(wanted_norm, rel=2e-5), layout


@on_grid(4)
def test_recomputing_with_dropout_changes_nothing() -> None:
    """Full recomputation draws the same masks again: losses and gradient norms are bit-equal, and differ from none."""
    layout = Layout(tp=2, dp=2)
    dropped = _train(layout, steps=2, hidden_dropout=0.1)
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert _train(layout, steps=2, hidden_dropout=0.1, **again) == dropped
    assert _train(layout, steps=2) != dropped


@on_grid(4)
def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    """dist_checkpointing writes a tp2 pp2 model and gives back every value."""
    groups = _groups(Layout(tp=2, pp=2))
    (model,) = _chunks(Layout(tp=2, pp=2), groups)
    kept = {name: value.clone() for name, value in model.named_parameters()}
    dist_checkpointing.save(model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}), str(tmp_path))
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    wanted = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    model.load_state_dict(dist_checkpointing.load(wanted, str(tmp_path)))
    assert all(torch.equal(value, kept[name]) for name, value in model.named_parameters())
    assert any(value.abs().sum() > 0 for value in kept.values())


def _groups(layout: Layout) -> ProcessGroupCollection:
    """This rank's process groups: one along each axis, groups of itself where the axis has size 1."""
    rank = dist.get_rank()
    places = [layout.coordinate(other) for other in range(dist.get_world_size())]

    def along(*axes: int) -> dist.ProcessGroup:
        rest = [tuple(at for axis, at in enumerate(place) if axis not in axes) for place in places]  # type: ignore[arg-type]
        members = [[other for other in range(len(rest)) if rest[other] == key] for key in sorted(set(rest))]
        made = [dist.new_group(ranks) for ranks in members]
        return next(group for group, ranks in zip(made, members, strict=True) if rank in ranks)

    groups = ProcessGroupCollection()
    alone = along()
    for item in fields(groups):
        setattr(groups, item.name, alone)
    groups.tp, groups.pp, groups.dp, groups.mp = along(0), along(1), along(2), along(0, 1)
    groups.expt_tp = groups.tp_cp = groups.tp_ep = groups.tp
    groups.tp_ep_pp = groups.mp
    groups.dp_cp = groups.expt_dp = groups.intra_dp_cp = groups.intra_expt_dp = groups.dp
    groups.intra_dist_opt, groups.embd, groups.pos_embd = dist.group.WORLD, groups.pp, alone
    return groups


def _chunks(layout: Layout, groups: ProcessGroupCollection, **settings: Any) -> list[GPTModel]:
    """This rank's model chunks; equal names hold equal values in every layer and layout."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    rank = groups.tp.rank()
    random.model_parallel_cuda_manual_seed(9, tp_rank=rank, ep_rank=0, etp_rank=0, force_reset_rng=True)
    stages = {"overlap_p2p_comm": True, "batch_p2p_comm": False, "virtual_pipeline_model_parallel_size": layout.vp}
    config = TransformerConfig(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        attention_dropout=0.0,
        **{"hidden_dropout": 0.0} | settings | (stages if layout.vp > 1 else {}),
    )
    chunks = []
    for place in range(layout.vp):
        stage = groups.pp.rank() + layout.pp * place
        chunk = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="LayerNorm"),
            _WORDS,
            _LENGTH,
            pre_process=stage == 0,
            post_process=stage == layout.pp * layout.vp - 1,
            pg_collection=groups,
            vp_stage=place if layout.vp > 1 else None,
        )
        for name, value in chunk.named_parameters():
            _fill(name, value, layout.tp, rank)
        chunks.append(chunk)
    return chunks


def _fill(name: str, value: Tensor, tp: int, rank: int) -> None:
    """Values that depend on the parameter's name without its layer; this rank's slice of them."""
    name = ".".join(part for part in name.split(".") if not part.isdigit())
    shape, split = list(value.shape), getattr(value, "partition_dim", -1)
    if getattr(value, "tensor_model_parallel", False):
        shape[split] *= tp
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    whole = torch.randn(shape, generator=generator) * 0.1 + ("norm" in name and "weight" in name)
    if getattr(value, "tensor_model_parallel", False):
        whole = whole.chunk(tp, split)[rank]
    with torch.no_grad():
        value.copy_(whole)


def _train(layout: Layout, steps: int, **settings: Any) -> list[tuple[float, float]]:
    """(mean loss, gradient norm) of each optimizer step on one fixed batch."""
    groups = _groups(layout)
    sharing = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunks = [
        DistributedDataParallel(chunk.config, sharing, chunk, pg_collection=groups)
        for chunk in _chunks(layout, groups, **settings)
    ]
    config = chunks[0].module.config
    config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
    adam = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(adam, chunks, use_gloo_process_groups=False, pg_collection=groups)
    tokens = torch.randint(0, _WORDS, (_BATCH, _LENGTH + 1), generator=torch.Generator().manual_seed(3))
    batches = tokens.chunk(layout.dp)[groups.dp.rank()].split(2)
    run = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp if layout.vp > 1 else None)
    history = []
    for _ in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [iter(batches) for _ in chunks]
        losses = run(
            forward_step_func=_forward,
            data_iterator=iterators if layout.vp > 1 else iterators[0],
            model=chunks if layout.vp > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=_LENGTH,
            micro_batch_size=2,
            p2p_communicator=P2PCommunicator(groups.pp, config),
            pg_collection=groups,
        )
        _, norm, _ = optimizer.step()
        total = torch.stack([item["loss"] for item in losses]).sum() if losses else torch.zeros(())
        dist.all_reduce(total)
        history.append((float(total) * 2 / _BATCH / layout.tp, float(norm)))
    return history


def _forward(iterator: Any, model: Any) -> tuple[Tensor, Any]:
    tokens = next(iterator)
    positions = torch.arange(_LENGTH).expand(2, -1)
    mask = torch.ones(1, 1, _LENGTH, _LENGTH).triu(1).bool()
    return model(tokens[:, :-1], positions, mask, runtime_gather_output=True), partial(_loss, tokens[:, 1:])


def _loss(targets: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, {"loss": loss.detach().clone()}
