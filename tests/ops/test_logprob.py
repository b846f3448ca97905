"""Proves the local pass of a log-prob, of the kernels and of their reference alike: ignored rows, padding, infinities,
strides, offsets beyond 2^31, gradients beside and over their logits, and that neither threads nor the instruction set
decide the result.

Not proved here: how exact it is (test_logprob_accuracy.py), slices of one vocabulary put together (tests/parallel/),
speed and memory (benchmarks/logprob.py).
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlhf.ops import library, logprob, logprob_reference, sample
from tests.helpers import softmax
from tests.helpers.device import assert_same
from tests.helpers.softmax import ROWS


def _draw(columns: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, reference, targets and gradients of a case without holes."""
    case = softmax.draw(columns, dtype, holes=False).to(device)
    return case.logits_NV, case.reference_NV, case.targets_N, case.grads_3N


def test_every_16_bit_number_is_read_and_rounded_as_torch_does(kernels: None, device: str) -> None:
    """A gradient of p = 1 - p' words: read all finite float16 and bfloat16, write them back through a KL of slope 1."""
    source = torch.Generator().manual_seed(0)
    some = torch.randn(10000, generator=source) * 10.0 ** torch.randint(-9, 5, (10000,), generator=source)
    grad = torch.cat([some, torch.tensor([65519.9, 65520])]).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        words = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = words[words.isfinite()][:, None].contiguous().to(device)
        targets = torch.zeros(len(x), dtype=torch.int64, device=device)
        stats = logprob.stats(x, targets, vocab_start=0, columns=1, temperature=1.0)
        assert torch.equal(stats[0], x[:, 0].float()) and torch.equal(stats[3], x[:, 0].float())
        pairs = torch.zeros(len(grad), 2, dtype=dtype, device=device)
        targets = torch.full((len(grad),), 1 << 40, device=device)
        sums = torch.tensor([[0.0], [1.0], [0.0]], device=device).expand(-1, len(grad))
        given: list[Any] = [sums, None, -grad, None, None]
        where: dict[str, Any] = {"vocab_start": 0, "columns": 2, "temperature": 1.0}
        out = logprob.backward(pairs, None, targets, *given, **where, out_NV=torch.full_like(pairs, 7))
        assert torch.equal(out, grad.to(dtype)[:, None].expand(-1, 2))


@pytest.mark.sanitized
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 63, 2047, 2048, 2049, 4100])
def test_every_tail_of_a_row(path: str, device: str, columns: int) -> None:
    """Rows of any length, with padding of NaN behind the words that is neither read nor kept."""
    case = softmax.draw(columns, torch.float32, holes=False)
    exact = softmax.plain(case.to(torch.float64))
    logits, _, targets, grads = _draw(columns, torch.float32, device)
    where: dict[str, Any] = {"vocab_start": 5, "columns": columns, "temperature": 1.0}
    padded = torch.nn.functional.pad(logits, (0, 3), value=torch.nan)
    m, S, Z, t = logprob.stats(padded, targets + 5, **where)
    torch.testing.assert_close(((t - m) - S.log()).cpu(), exact["log-prob"].float(), rtol=0, atol=2e-6)
    torch.testing.assert_close((S.log() - Z / S).cpu(), exact["entropy"].float(), rtol=0, atol=2e-6)
    given: list[Any] = [torch.stack([m, S, Z / S]), None, *grads[:2], None]
    out = logprob.backward(padded, None, targets + 5, *given, **where, out_NV=torch.full_like(padded, 7)).cpu()
    assert not out[:, columns:].any()
    torch.testing.assert_close(out[:, :columns], exact["gradient of 2"].float(), rtol=0, atol=2e-6)


@pytest.mark.sanitized
def test_ignored_rows_are_zeroed_and_not_read(path: str, device: str) -> None:
    """Their numbers are m = 0, S = 1, rest 0, whatever lies there; their gradient is 0."""
    logits, reference, targets, grads = _draw(1003, torch.float32, device)
    logits[[1, 7]], reference[[1, 7]], targets[[1, 7]] = torch.nan, torch.inf, -100
    where: dict[str, Any] = {"vocab_start": 0, "columns": 1003, "temperature": 0.7}
    numbers = logprob.kl_stats(logits, reference, targets, **where)
    assert numbers[:, 1].tolist() == [0, 1, 0, 0, 0, 0, 1, 0] and numbers[:, 7].tolist() == numbers[:, 1].tolist()
    assert numbers.isfinite().all()
    m, S, Z, _, D, reference_m, *_ = numbers
    given: list[Any] = [torch.stack([m, S, Z / S]), torch.stack([reference_m, D / S]), *grads]
    out = logprob.backward(logits, reference, targets, *given, **where, out_NV=torch.full_like(logits, 7))
    assert out.isfinite().all() and not out[[1, 7]].any() and out[[0, 2]].all(1).any()


@pytest.mark.sanitized
def test_a_slice_without_words(path: str, device: str) -> None:
    """m = -inf and no sums; the gradient of its padding is 0."""
    logits, targets = torch.full((3, 4), torch.nan, device=device), torch.tensor([0, 1, -1], device=device)
    where: dict[str, Any] = {"vocab_start": 8, "columns": -4, "temperature": 1.0}
    assert logprob.stats(logits, targets, **where).tolist() == [[-math.inf] * 3, [0] * 3, [0] * 3, [0] * 3]
    numbers = logprob.kl_stats(logits, logits, targets, **where)
    assert numbers[[0, 5]].isneginf().all() and not numbers[[1, 2, 3, 4, 6, 7]].any()
    zeros, ones = torch.zeros(3, 3, device=device), torch.ones(3, device=device)
    given: list[Any] = [zeros, None, ones, None, None]
    assert not logprob.backward(logits, None, targets, *given, **where, out_NV=logits).any()


@pytest.mark.sanitized
@pytest.mark.parametrize("columns", [0, 5])
def test_no_rows(path: str, device: str, columns: int) -> None:
    """Empty numbers and an empty gradient, also of no columns."""
    logits, targets = torch.empty(0, columns, device=device), torch.empty(0, dtype=torch.int64, device=device)
    where: dict[str, Any] = {"vocab_start": 0, "columns": columns, "temperature": 1.0}
    assert logprob.stats(logits, targets, **where).shape == (4, 0)
    assert logprob.kl_stats(logits, logits, targets, **where).shape == (8, 0)
    given: list[Any] = [torch.zeros(3, 0, device=device), None, torch.zeros(0, device=device), None, None]
    assert logprob.backward(logits, None, targets, *given, **where, out_NV=logits.clone()).shape == (0, columns)


@pytest.mark.sanitized
def test_infinities(path: str, device: str) -> None:
    """Words of -inf count for nothing; a row of them alone has no weight; inf and NaN are loud."""
    x = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3, [0, math.inf, 1], [0, math.nan, 1], [math.nan] * 3])
    x = torch.nn.functional.pad(x, (0, 3000), value=-math.inf).to(device)
    targets = torch.tensor([2, 0, 0, 0, 0], device=device)
    where: dict[str, Any] = {"vocab_start": 0, "columns": x.shape[1], "temperature": 1.0}
    m, S, Z, t = logprob.stats(x, targets, **where)
    torch.testing.assert_close(S[:2].cpu(), torch.tensor([1 + math.exp(-1), 0]))
    torch.testing.assert_close(Z[:2].cpu(), torch.tensor([-math.exp(-1), 0]))
    assert m[:2].tolist() == [1, -math.inf] and t[:2].tolist() == [1, -math.inf]
    assert S[2:].isnan().all()
    D = logprob.kl_stats(x, x + 1, targets, **where)[4]
    assert D[:2].tolist() == [0, 0] and D[2:].isnan().all()
    nowhere = torch.tensor([[0.0, 0.0, -math.inf]])
    nowhere = torch.nn.functional.pad(nowhere, (0, 3000), value=-math.inf).to(device)
    assert logprob.kl_stats(x[:1], nowhere, targets[:1], **where)[4].tolist() == [math.inf]
    ones = torch.ones(5, device=device)
    given: list[Any] = [torch.stack([m, S, Z / S]), None, ones, ones, None]
    out = logprob.backward(x, None, targets, *given, **where, out_NV=torch.full_like(x, 7))
    assert out[0].isfinite().all() and not out[0, 3:].any() and out[3:].isnan().any(1).all()


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", softmax.DTYPES)
def test_rows_may_lie_apart(path: str, device: str, dtype: torch.dtype) -> None:
    """A slice of a wider tensor, targets with gaps, rows that begin anywhere; words apart are the reference's."""
    logits, reference, targets, grads = _draw(1003, dtype, device)
    where: dict[str, Any] = {"vocab_start": 0, "columns": 500, "temperature": 1.0}
    apart = torch.stack([targets % 500, targets], 1)[:, 0]
    assert not apart.is_contiguous()
    slices = logits[:, 101:601], reference[:, 103:603]
    dense = [x.contiguous() for x in slices]
    plain = logprob.kl_stats(*dense, apart, **where)
    assert_same(logprob.kl_stats(*slices, apart, **where), plain)
    assert_same(logprob.stats(slices[0], apart, **where), plain[:4])
    m, S, Z, _, D, reference_m, *_ = plain
    given: list[Any] = [torch.stack([m, S, Z / S]), torch.stack([reference_m, D / S]), *grads]
    wanted = logprob.backward(*dense, apart, *given, **where, out_NV=torch.full_like(dense[0], 7))
    before = logits.clone()
    logprob.backward(*slices, apart, *given, **where, out_NV=slices[0])
    assert_same(slices[0], wanted)
    assert torch.equal(logits[:, :101], before[:, :101]) and torch.equal(logits[:, 601:], before[:, 601:])
    turned = before.t().contiguous().t()[:, 101:601]
    torch.testing.assert_close(logprob.stats(turned, apart, **where), plain[:4], rtol=2e-6, atol=0)


def _far(rows: int, stride: int, columns: int, device: str) -> Tensor:
    """bfloat16 rows `stride` elements apart; on a CPU the memory between them is never touched, nor taken."""
    count = (rows - 1) * stride + columns
    assert count > 2**31
    try:
        whole = torch.empty(count, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for {2 * count / 1e9:.1f} GB: {error}")
    return whole.as_strided((rows, columns), (stride, 1))


@pytest.mark.parametrize("stride", [1_200_000_007, 2**31 + 8, 2**32 + 8])
def test_offsets_beyond_two_to_the_31(path: str, device: str, stride: int) -> None:
    """Every pass, on rows whose offsets need more than 32 bits, signed or not, says what it says of rows side by side.

    An offset cut to 32 bits ends in front of the first row, or at a word of another row.
    """
    logits, reference, targets, grads = _draw(1003, torch.bfloat16, device)
    rows = 2 if stride > 2**31 else 3
    logits, reference, targets, grads = logits[:rows], reference[:rows], targets[:rows], grads[:, :rows].contiguous()
    apart, others = (_far(rows, stride, 1003, device) for _ in range(2))
    apart.copy_(logits), others.copy_(reference)
    where: dict[str, Any] = {"vocab_start": 0, "columns": 1003, "temperature": 1.0}
    found = logprob.kl_stats(logits, reference, targets, **where)
    assert_same(logprob.stats(apart, targets, **where), found[:4])
    assert_same(logprob.kl_stats(apart, others, targets, **where), found)
    assert_same(sample.best(apart, None, **where)[1], logits.float().argmax(1).float())
    m, S, Z, _, D, reference_m, *_ = found
    given: list[Any] = [torch.stack([m, S, Z / S]), torch.stack([reference_m, D / S]), *grads]
    wanted = logprob.backward(logits, reference, targets, *given, **where, out_NV=torch.full_like(logits, 7))
    assert_same(logprob.backward(apart, others, targets, *given, **where, out_NV=others), wanted)
    others.copy_(reference)
    assert_same(logprob.backward(apart, others, targets, *given, **where, out_NV=apart), wanted)


def test_more_than_two_to_the_31_logits(path: str, device: str) -> None:
    """[N, V] side by side with N V > 2^31: first, middle and last row are read, the others are ignored."""
    columns = 50304
    rows = 2**31 // columns + 7
    whole = _far(1, 1, rows * columns, device).view(rows, columns)
    logits, _, targets, _ = _draw(columns, torch.bfloat16, device)
    at = torch.tensor([0, rows // 2, rows - 1], device=device)
    whole[at] = logits[:3]
    kept = torch.full((rows,), -1, device=device)
    kept[at] = targets[:3]
    where: dict[str, Any] = {"vocab_start": 0, "columns": columns, "temperature": 1.0}
    found = logprob.stats(whole, kept, **where)
    assert_same(found[:, at], logprob.stats(logits[:3], targets[:3], **where))
    ignored = torch.tensor([[0.0], [1.0], [0.0], [0.0]], device=device)
    assert torch.equal(found[:, 1 : rows // 2], ignored.expand(-1, rows // 2 - 1))


def test_a_gradient_beside_the_logits_is_that_over_them(path: str, device: str) -> None:
    """Of 40 MiB, for which a CPU's system is asked for large pages, at an address that is no multiple of one."""
    logits, _, targets, grads = _draw(50304, torch.float32, device)
    logits, targets, grads = logits.repeat(18, 1), targets.repeat(18), grads.repeat(1, 18)
    where: dict[str, Any] = {"vocab_start": 0, "columns": 50304, "temperature": 1.0}
    m, S, Z, _ = logprob.stats(logits, targets, **where)
    given: list[Any] = [torch.stack([m, S, Z / S]), None, *grads[:2], None]
    beside = torch.full((logits.numel() + 5,), 7.0, device=device)[5:].view_as(logits)
    logprob.backward(logits, None, targets, *given, **where, out_NV=beside)
    assert_same(logprob.backward(logits, None, targets, *given, **where, out_NV=logits), beside)


@pytest.fixture
def threads() -> Iterator[None]:
    held = torch.get_num_threads()
    yield
    torch.set_num_threads(held)


def test_threads_change_no_bit(threads: None) -> None:
    """One, two and five threads give the same bits, rows ignored here and there."""
    if not library.loaded():
        pytest.skip(library.WHY_NOT)
    case, found = softmax.draw(50304, torch.float32, 0.7), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(softmax.local(case))
    for again in found[1:]:
        assert all(torch.equal(x, found[0][name]) for name, x in again.items())


@pytest.fixture
def instruction_set() -> Iterator[Any]:
    if not library.loaded():
        pytest.skip(library.WHY_NOT)
    choose = ctypes.CDLL(str(library.PATH)).mrlhf_instruction_set
    yield choose
    choose(2)


@pytest.mark.parametrize(("level", "name"), [(0, "generic"), (1, "avx2"), (2, "avx512")])
def test_every_instruction_set_is_right(instruction_set: Any, level: int, name: str) -> None:
    """Each that this machine has errs at most twice as much as eager code, at every width and dtype."""
    if instruction_set(level) != level:
        pytest.skip(f"this machine has no {name}")
    for columns, dtype in itertools.product((1003, 50304), softmax.DTYPES):
        case = softmax.draw(columns, dtype)
        eager, exact = (softmax.eager(case, real) for real in (torch.float32, torch.float64))
        softmax.assert_at_most_twice(softmax.local(case), eager, exact)


@pytest.mark.parametrize("ignored", [[], [0, 3], [0, 1, 2, 3, 4, 5, 6]])
def test_row_chunks_of_the_reference_change_nothing(ignored: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time and all at once give the same bits."""
    logits, _, targets, grads = _draw(1003, torch.float32)
    logits, targets, grads = logits[:7], targets[:7], grads[:, :7]
    targets[ignored] = -1
    where: dict[str, Any] = {"vocab_start": 0, "columns": 1003, "temperature": 0.9}
    whole = logprob_reference.stats(logits, targets, **where)
    given: list[Any] = [whole[:3], None, grads[0], grads[1], None]
    gradient = logprob_reference.backward(logits, None, targets, *given, **where, out_NV=torch.full_like(logits, 7))
    monkeypatch.setattr(logprob_reference, "_CHUNK", 2 * 1003)
    assert len(logprob_reference._chunks(logits, targets)) == max(1, math.ceil((7 - len(ignored)) / 2))
    assert torch.equal(logprob_reference.stats(logits, targets, **where), whole)
    again = logprob_reference.backward(logits, None, targets, *given, **where, out_NV=torch.full_like(logits, 7))
    assert torch.equal(again, gradient)


@pytest.mark.parametrize("dtype", softmax.DTYPES)
def test_opcheck(kernels: None, device: str, dtype: torch.dtype) -> None:
    """Schemas, fakes and dispatch are what torch expects of an operator, gradients with and without a reference."""
    logits, reference, targets, grads = _draw(33, dtype, device)
    ops, where = torch.ops.megatron_rlhf, (0, 31, 0.7)
    torch.library.opcheck(ops.logprob_stats, (logits, targets, *where))
    torch.library.opcheck(ops.logprob_kl_stats, (logits, reference, targets, *where))
    sums = torch.full((3, ROWS), 0.5, device=device)
    out = torch.full_like(logits, 7)
    every = (logits, reference, targets, sums, sums[:2], *grads, *where, out)
    torch.library.opcheck(ops.logprob_backward, every)
    none = (logits, None, targets, sums, None, grads[0], None, None, *where, out)
    torch.library.opcheck(ops.logprob_backward, none)


def test_a_wrong_argument_is_refused(kernels: None, device: str) -> None:
    """The kernels never read beside an array."""
    logits, reference, targets, _ = _draw(33, torch.float32, device)
    ops = torch.ops.megatron_rlhf
    for arguments in (
        (logits, targets[1:], 0, 33, 1.0),
        (logits, targets.int(), 0, 33, 1.0),
        (logits, targets, 0, 34, 1.0),
        (logits.t().contiguous().t(), targets, 0, 33, 1.0),
        (logits.int(), targets, 0, 33, 1.0),
        (logits[:1].expand(2**31, 33), targets, 0, 33, 1.0),
    ):
        with pytest.raises(RuntimeError):
            ops.logprob_stats(*arguments)
    with pytest.raises(RuntimeError):
        ops.logprob_kl_stats(logits, reference[:, 1:], targets, 0, 33, 1.0)
    sums = torch.zeros(ROWS, device=device)
    with pytest.raises(RuntimeError):
        ops.logprob_backward(logits, None, targets, sums, *(None,) * 4, 0, 33, 1.0, torch.full_like(logits, 7))
