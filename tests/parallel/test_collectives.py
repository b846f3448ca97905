"""Proves that batches, flags and tensors arrive whole, in order and unchanged on every rank of a gloo world.

Not proved here: anything on NCCL; the speed of any collective.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rlhf.parallel import collectives
from tests.helpers.grid import on_grid


@on_grid(4)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_assemble_puts_every_row_in_its_place(dtype: torch.dtype) -> None:
    """Ranks 1 and 3 own rows in mixed order with padding rows; ranks 0 and 2 own nothing."""
    whole = torch.arange(7 * 3).reshape(7, 3).to(dtype) * 1000 + 1
    index = {1: [6, 0, -1, 3], 3: [1, 2, 5, -1, 4]}.get(dist.get_rank())
    if index is None:
        local, index_b = torch.zeros((0, 3), dtype=dtype), torch.zeros(0, dtype=torch.int64)
    else:
        index_b = torch.tensor(index)
        local = torch.where((index_b >= 0)[:, None], whole[index_b.clamp(min=0)], torch.full_like(whole[0], 77))
    answer = collectives.assemble(local, index_b, 7, index is not None)
    assert answer.dtype == dtype
    assert torch.equal(answer, whole)


@on_grid(4)
def test_assemble_ignores_ranks_that_hold_copies() -> None:
    """Every tensor-parallel rank holds the same rows; only the owner's count."""
    rows = torch.full((2, 1), 5, dtype=torch.int64)
    answer = collectives.assemble(rows, torch.tensor([1, 0]), 3, dist.get_rank() == 2)
    assert answer.tolist() == [[5], [5], [0]]
    with pytest.raises(ValueError, match="int64"):
        collectives.assemble(rows.bool(), torch.tensor([1, 0]), 3, True)


@on_grid(4)
def test_agree_names_the_ranks_that_differ() -> None:
    """Equal values pass; one odd rank is named on every rank."""
    collectives.agree(2**40)
    with pytest.raises(RuntimeError, match=r"7 on 0, 1, 3; 9 on 2$"):
        collectives.agree(9 if dist.get_rank() == 2 else 7)


@on_grid(4)
def test_any_rank_hears_a_single_rank() -> None:
    """One true anywhere is true everywhere; none is false."""
    assert collectives.any_rank(dist.get_rank() == 3) is True
    assert collectives.any_rank(False) is False


@on_grid(4)
def test_broadcast_fills_in_place_within_its_group() -> None:
    """A group of two gets its source's values, also into a tensor that is not contiguous; the others keep theirs."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    tensor = torch.full((3, 2), float(rank)).t()
    answer = collectives.broadcast(tensor, 2 + rank % 2, groups[rank % 2])
    assert answer is tensor
    assert torch.equal(tensor, torch.full((2, 3), 2.0 + rank % 2))


@on_grid(4)
def test_broadcasts_under_way_fill_their_own_tensors() -> None:
    """Two are started before either is awaited, among sends that cross on the same ranks."""
    rank = dist.get_rank()
    tensors = [torch.full((3,), rank * 10 + i) for i in range(2)]
    started = [collectives.start_broadcast(tensor, source) for source, tensor in zip((2, 1), tensors, strict=True)]
    sending = collectives.send(torch.tensor([rank]), rank ^ 1)
    assert collectives.receive((1,), torch.int64, rank ^ 1).tolist() == [rank ^ 1]
    for handle in (*started, sending):
        handle.wait()
    assert [tensor.tolist() for tensor in tensors] == [[20] * 3, [11] * 3]


@on_grid(4)
def test_sends_that_cross_do_not_deadlock_and_keep_order() -> None:
    """Every rank starts two sends round the ring before it receives; the sent tensors may be dropped meanwhile."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    sending = [collectives.send(torch.full((200, 300), rank * 10.0 + i), after) for i in range(2)]
    received = [collectives.receive((200, 300), torch.float32, before) for _ in range(2)]
    for handle in sending:
        handle.wait()
    assert [float(tensor.mean()) for tensor in received] == [before * 10.0, before * 10.0 + 1]


@on_grid(4)
def test_a_send_keeps_a_copy_of_a_strided_tensor() -> None:
    """A transposed tensor arrives with its values in their places."""
    rank = dist.get_rank()
    if rank == 0:
        collectives.send(torch.arange(6, dtype=torch.float32).reshape(2, 3).t(), 1).wait()
    elif rank == 1:
        assert collectives.receive((3, 2), torch.float32, 0).tolist() == [[0, 3], [1, 4], [2, 5]]
