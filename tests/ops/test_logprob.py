"""Proves the local pass of a log-prob, of the kernels and of their reference alike: errors against float64 at most
twice those of eager float32 code, ignored rows, padding, infinities, strides, offsets beyond 2^31, and that neither
threads nor the instruction set decide the result.

Not proved here: CUDA, slices of one vocabulary put together (tests/parallel/test_vocab.py), speed and memory
(benchmarks/logprob.py).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlhf.ops import library, logprob, logprob_reference

SIZES = (1003, 6288, 50304, 128256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 12
Numbers = dict[str, Tensor]


def _draw(columns: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, a near reference, targets, and gradients of log-prob, entropy and KL."""
    source = torch.Generator().manual_seed(columns)
    logits = torch.randn(ROWS, columns, generator=source) * 3 + offset
    reference = logits + 0.2 * torch.randn(ROWS, columns, generator=source)
    targets = torch.randint(0, columns, (ROWS,), generator=source)
    return logits.to(dtype), reference.to(dtype), targets, torch.randn(3, ROWS, generator=source)


def _eager(logits: Tensor, reference: Tensor, targets: Tensor, grads: Tensor, temperature: float) -> Numbers:
    """What plain torch says in the dtype it is given, gradients by autograd."""
    logits = logits.detach().requires_grad_()
    log_p, log_q = (logits / temperature).log_softmax(1), (reference / temperature).log_softmax(1)
    p = log_p.exp()
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    entropy, kl = -(p * log_p).sum(1), (p * (log_p - log_q)).sum(1)
    found = {"log-prob": chosen, "entropy": entropy, "KL": kl}
    for count in (1, 2, 3):
        total = sum((x * g.to(x)).sum() for x, g in zip(list(found.values())[:count], grads, strict=False))
        assert isinstance(total, Tensor)
        (found[f"gradient of {count}"],) = torch.autograd.grad(total, logits, retain_graph=True)
    return {name: x.detach() for name, x in found.items()}


def _ours(logits: Tensor, reference: Tensor, targets: Tensor, grads: Tensor, temperature: float) -> Numbers:
    """What the local pass over a whole vocabulary says."""
    where: dict[str, Any] = {"vocab_start": 0, "columns": logits.shape[1], "temperature": temperature}
    m, S, Z, t, D, reference_m, reference_S, _ = logprob.kl_stats(logits, reference, targets, **where).double()
    plain = logprob.stats(logits, targets, **where)
    torch.testing.assert_close(plain.double(), torch.stack([m, S, Z, t]), rtol=3e-7, atol=0)
    real = plain.dtype
    sums = torch.stack([m, S.log()]).to(real), torch.stack([reference_m, reference_S.log()]).to(real)
    entropy, kl = S.log() - Z / S, D / S - S.log() + reference_S.log()
    found = {"log-prob": (t - m) - S.log(), "entropy": entropy, "KL": kl}
    g, h, k = grads.to(real)
    rows = entropy.to(real), kl.to(real)
    for count, given in ((1, (g, None, None)), (2, (g, h, None)), (3, (g, h, k))):
        out = torch.full_like(logits, 7)
        found[f"gradient of {count}"] = logprob.backward(
            logits, reference, targets, sums[0], *rows, sums[1], *given, **where, out_NV=out
        )
    return found


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize(("temperature", "offset"), [(1.0, 0.0), (0.7, 0.0), (1.0, 40.0)])
def test_error_is_at_most_twice_that_of_eager(path: str, columns: int, temperature: float, offset: float) -> None:
    """Of log-prob, entropy, KL and gradients in float32, logits with an offset included.

    The root of the mean square is what is compared; the largest error of a few rows is luck, which changes with the
    CPU's instructions, and is held to four times eager's.
    """
    logits, reference, targets, grads = _draw(columns, torch.float32, offset)
    exact = _eager(logits.double(), reference.double(), targets, grads.double(), temperature)
    eager = _eager(logits, reference, targets, grads, temperature)
    ours = _ours(logits, reference, targets, grads, temperature)
    for name, right in exact.items():
        wrong, theirs = ((x[name].double() - right).abs() for x in (ours, eager))
        # a rounding of the result itself is granted, eager may have been lucky
        error, allowed = wrong.square().mean().sqrt(), theirs.square().mean().sqrt()
        rounding = 2**-24 * right.square().mean().sqrt()
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, eager {allowed:.2e}"
        assert wrong.max() <= 4 * theirs.max() + 2**-24 * right.abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("columns", [1003, 6288])
def test_low_precision_is_float32_rounded_once(path: str, dtype: torch.dtype, columns: int) -> None:
    """Numbers of 16-bit logits are those of the same logits in float32; gradients are those, rounded."""
    logits, reference, targets, grads = _draw(columns, dtype)
    ours = _ours(logits, reference, targets, grads, 0.7)
    wide = _ours(logits.float(), reference.float(), targets, grads, 0.7)
    for name, x in ours.items():
        assert torch.equal(x, wide[name].to(x.dtype)), name


def test_float64_is_float64(path: str) -> None:
    logits, reference, targets, grads = _draw(1003, torch.float64)
    exact = _eager(logits, reference, targets, grads.double(), 0.7)
    torch.testing.assert_close(_ours(logits, reference, targets, grads.double(), 0.7), exact, rtol=0, atol=1e-12)


def test_every_16_bit_number_is_read_and_rounded_as_torch_does(kernels: None) -> None:
    """A gradient of p = 1 - p' words: read all finite float16 and bfloat16, write them back through a KL of slope 1."""
    for dtype in (torch.float16, torch.bfloat16):
        words = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = words[words.isfinite()][:, None].contiguous()
        targets = torch.zeros(len(x), dtype=torch.int64)
        stats = logprob.stats(x, targets, vocab_start=0, columns=1, temperature=1.0)
        assert torch.equal(stats[0], x[:, 0].float()) and torch.equal(stats[3], x[:, 0].float())
        grad = torch.cat([torch.randn(10000) * 10.0 ** torch.randint(-9, 5, (10000,)), torch.tensor([65519.9, 65520])])
        pairs = torch.zeros(len(grad), 2, dtype=dtype)
        sums = torch.tensor([0.0, 0.0])[:, None].expand(2, len(grad)).contiguous()
        targets = torch.full((len(grad),), 1 << 40)
        none = (None,) * 5
        out = logprob.backward(
            pairs,
            None,
            targets,
            sums,
            *none[:3],
            -grad,
            *none[:2],
            vocab_start=0,
            columns=2,
            temperature=1.0,
            out_NV=torch.empty_like(pairs),
        )
        assert torch.equal(out, grad.to(dtype)[:, None].expand(-1, 2))


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 63, 2047, 2048, 2049, 4100])
def test_every_tail_of_a_row(path: str, columns: int) -> None:
    """Rows of any length, with padding of NaN behind the words that is neither read nor kept."""
    logits, reference, targets, grads = _draw(columns, torch.float32)
    exact = _eager(logits.double(), reference.double(), targets, grads.double(), 1.0)
    where: dict[str, Any] = {"vocab_start": 5, "columns": columns, "temperature": 1.0}
    padded = torch.nn.functional.pad(logits, (0, 3), value=torch.nan)
    m, S, Z, t = logprob.stats(padded, targets + 5, **where)
    torch.testing.assert_close((t - m) - S.log(), exact["log-prob"].float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(S.log() - Z / S, exact["entropy"].float(), rtol=0, atol=2e-6)
    sums = torch.stack([m, S.log()])
    rest: list[Any] = [exact["entropy"].float(), None, None, grads[0], grads[1], None]
    out = logprob.backward(padded, None, targets + 5, sums, *rest, **where, out_NV=padded)
    assert out.data_ptr() == padded.data_ptr() and not out[:, columns:].any()
    torch.testing.assert_close(out[:, :columns], exact["gradient of 2"].float(), rtol=0, atol=2e-6)


def test_ignored_rows_are_zeroed_and_not_read(path: str) -> None:
    """Their numbers are m = 0, S = 1, rest 0, whatever lies there; their gradient is 0."""
    logits, reference, targets, grads = _draw(1003, torch.float32)
    logits[[1, 7]], reference[[1, 7]], targets[[1, 7]] = torch.nan, torch.inf, -100
    where: dict[str, Any] = {"vocab_start": 0, "columns": 1003, "temperature": 0.7}
    numbers = logprob.kl_stats(logits, reference, targets, **where)
    assert numbers[:, 1].tolist() == [0, 1, 0, 0, 0, 0, 1, 0] and numbers[:, 7].tolist() == numbers[:, 1].tolist()
    assert numbers.isfinite().all()
    sums = torch.stack([numbers[0], numbers[1].log()])
    rest: list[Any] = [torch.zeros(ROWS), torch.zeros(ROWS), sums, *grads]
    out = logprob.backward(logits, reference, targets, sums, *rest, **where, out_NV=torch.full_like(logits, 7))
    assert out.isfinite().all() and not out[[1, 7]].any() and out[[0, 2]].all(1).any()


def test_a_slice_without_words(path: str) -> None:
    """m = -inf and no sums; the gradient of its padding is 0."""
    logits, targets = torch.full((3, 4), torch.nan), torch.tensor([0, 1, -1])
    where: dict[str, Any] = {"vocab_start": 8, "columns": -4, "temperature": 1.0}
    assert logprob.stats(logits, targets, **where).tolist() == [[-math.inf] * 3, [0] * 3, [0] * 3, [0] * 3]
    numbers = logprob.kl_stats(logits, logits, targets, **where)
    assert numbers[[0, 5]].isneginf().all() and not numbers[[1, 2, 3, 4, 6, 7]].any()
    given: list[Any] = [torch.zeros(2, 3), None, None, None, torch.ones(3), None, None]
    assert not logprob.backward(logits, None, targets, *given, **where, out_NV=logits).any()


def test_infinities(path: str) -> None:
    """Words of -inf count for nothing; a row of them alone has no weight; inf and NaN are loud."""
    x = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3, [0, math.inf, 1], [0, math.nan, 1], [math.nan] * 3])
    x = torch.nn.functional.pad(x, (0, 3000), value=-math.inf)
    targets = torch.tensor([2, 0, 0, 0, 0])
    where: dict[str, Any] = {"vocab_start": 0, "columns": x.shape[1], "temperature": 1.0}
    m, S, Z, t = logprob.stats(x, targets, **where)
    torch.testing.assert_close(S[:2], torch.tensor([1 + math.exp(-1), 0]))
    torch.testing.assert_close(Z[:2], torch.tensor([-math.exp(-1), 0]))
    assert m[:2].tolist() == [1, -math.inf] and t[:2].tolist() == [1, -math.inf]
    assert S[2:].isnan().all()
    D = logprob.kl_stats(x, x + 1, targets, **where)[4]
    assert D[:2].tolist() == [0, 0] and D[2:].isnan().all()
    nowhere = torch.tensor([[0.0, 0.0, -math.inf]])
    nowhere = torch.nn.functional.pad(nowhere, (0, 3000), value=-math.inf)
    assert logprob.kl_stats(x[:1], nowhere, targets[:1], **where)[4].tolist() == [math.inf]
    sums = torch.stack([m, S.log()])
    given: list[Any] = [S.log() - Z / S, None, None, torch.ones(5), torch.ones(5), None]
    out = logprob.backward(x, None, targets, sums, *given, **where, out_NV=torch.empty_like(x))
    assert out[0].isfinite().all() and not out[0, 3:].any() and out[3:].isnan().any(1).all()


def test_rows_may_lie_apart(path: str) -> None:
    """A slice of a wider tensor is read where it lies; words apart from each other are left to the reference."""
    logits, _, targets, grads = _draw(1003, torch.float32)
    where: dict[str, Any] = {"vocab_start": 0, "columns": 500, "temperature": 1.0}
    targets = targets % 500
    plain = logprob.stats(logits[:, 100:600].contiguous(), targets, **where)
    assert torch.equal(logprob.stats(logits[:, 100:600], targets, **where), plain)
    sums = torch.stack([plain[0], plain[1].log()])
    given: list[Any] = [None, None, None, grads[0], None, None]
    wanted = logprob.backward(logits[:, 100:600], None, targets, sums, *given, **where, out_NV=torch.empty(ROWS, 500))
    before = logits.clone()
    logprob.backward(logits[:, 100:600], None, targets, sums, *given, **where, out_NV=logits[:, 100:600])
    assert torch.equal(logits[:, 100:600], wanted)
    assert torch.equal(logits[:, :100], before[:, :100]) and torch.equal(logits[:, 600:], before[:, 600:])
    turned = before.t().contiguous().t()[:, 100:600]
    torch.testing.assert_close(logprob.stats(turned, targets, **where), plain, rtol=1e-6, atol=0)


def test_offsets_beyond_two_to_the_31(path: str) -> None:
    """Three rows 1.2 billion elements apart: the memory between them is never touched."""
    stride, columns = 1_200_000_007, 1003
    try:
        whole = torch.empty(2 * stride + columns, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for 4.8 GB: {error}")
    logits, _, targets, grads = _draw(columns, torch.bfloat16)
    apart = whole.as_strided((3, columns), (stride, 1))
    apart.copy_(logits[:3])
    where: dict[str, Any] = {"vocab_start": 0, "columns": columns, "temperature": 1.0}
    found = logprob.stats(apart, targets[:3], **where)
    assert torch.equal(found, logprob.stats(logits[:3], targets[:3], **where))
    given: list[Any] = [torch.stack([found[0], found[1].log()]), None, None, None, grads[0, :3], None, None]
    wanted = logprob.backward(logits[:3], None, targets[:3], *given, **where, out_NV=torch.empty_like(logits[:3]))
    logprob.backward(apart, None, targets[:3], *given, **where, out_NV=apart)
    assert torch.equal(apart, wanted)


@pytest.fixture
def threads() -> Iterator[None]:
    held = torch.get_num_threads()
    yield
    torch.set_num_threads(held)


def test_threads_change_no_bit(kernels: None, threads: None) -> None:
    """One, two and five threads give the same bits, rows ignored here and there."""
    logits, reference, targets, grads = _draw(50304, torch.float32)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(_ours(logits, reference, targets, grads, 0.7))
    for again in found[1:]:
        assert all(torch.equal(x, found[0][name]) for name, x in again.items())


@pytest.fixture
def instruction_set() -> Iterator[Any]:
    choose = ctypes.CDLL(str(library.PATH)).mrlhf_instruction_set if library.loaded() else None
    yield choose
    if choose is not None:
        choose(2)


@pytest.mark.parametrize(("level", "name"), [(0, "generic"), (1, "avx2"), (2, "avx512")])
def test_every_instruction_set_is_right(kernels: None, instruction_set: Any, level: int, name: str) -> None:
    """Each that this machine has agrees with float64 to float32's rounding."""
    if instruction_set(level) != level:
        pytest.skip(f"this machine has no {name}")
    logits, reference, targets, grads = _draw(6288, torch.float32)
    exact = _eager(logits.double(), reference.double(), targets, grads.double(), 1.0)
    for found, right in zip(_ours(logits, reference, targets, grads, 1.0).values(), exact.values(), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("ignored", [[], [0, 3], [0, 1, 2, 3, 4, 5, 6]])
def test_row_chunks_of_the_reference_change_nothing(ignored: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time and all at once give the same bits."""
    logits, _, targets, grads = _draw(1003, torch.float32)
    logits, targets, grads = logits[:7], targets[:7], grads[:, :7]
    targets[ignored] = -1
    where: dict[str, Any] = {"vocab_start": 0, "columns": 1003, "temperature": 0.9}
    whole = logprob_reference.stats(logits, targets, **where)
    given: list[Any] = [torch.stack([whole[0], whole[1].log()]), whole[2], None, None, grads[0], grads[1], None]
    gradient = logprob_reference.backward(logits, None, targets, *given, **where, out_NV=torch.full_like(logits, 7))
    monkeypatch.setattr(logprob_reference, "_CHUNK", 2 * 1003)
    assert len(logprob_reference._chunks(logits, targets)) == max(1, math.ceil((7 - len(ignored)) / 2))
    assert torch.equal(logprob_reference.stats(logits, targets, **where), whole)
    again = logprob_reference.backward(logits, None, targets, *given, **where, out_NV=torch.full_like(logits, 7))
    assert torch.equal(again, gradient)


def test_opcheck(kernels: None) -> None:
    """Schemas, fakes and dispatch are what torch expects of an operator."""
    logits, reference, targets, grads = _draw(33, torch.bfloat16)
    ops = torch.ops.megatron_rlhf
    torch.library.opcheck(ops.logprob_stats, (logits, targets, 0, 31, 0.7))
    torch.library.opcheck(ops.logprob_kl_stats, (logits, reference, targets, 0, 31, 0.7))
    sums, rows = torch.randn(2, ROWS), torch.randn(ROWS)
    every = (logits, reference, targets, sums, rows, rows, sums, *grads, 0, 31, 0.7, torch.empty_like(logits))
    torch.library.opcheck(ops.logprob_backward, every)
    none = (logits, None, targets, sums, None, None, None, grads[0], None, None, 0, 31, 0.7, torch.empty_like(logits))
    torch.library.opcheck(ops.logprob_backward, none)


def test_a_wrong_argument_is_refused(kernels: None) -> None:
    """The kernels never read beside an array."""
    logits, reference, targets, _ = _draw(33, torch.float32)
    ops = torch.ops.megatron_rlhf
    for arguments in (
        (logits, targets[1:], 0, 33, 1.0),
        (logits, targets.int(), 0, 33, 1.0),
        (logits, targets, 0, 34, 1.0),
        (logits.t().contiguous().t(), targets, 0, 33, 1.0),
        (logits.int(), targets, 0, 33, 1.0),
    ):
        with pytest.raises(RuntimeError):
            ops.logprob_stats(*arguments)
    with pytest.raises(RuntimeError):
        ops.logprob_kl_stats(logits, reference[:, 1:], targets, 0, 33, 1.0)
    sums = torch.zeros(ROWS)
    with pytest.raises(RuntimeError):
        ops.logprob_backward(logits, None, targets, sums, *(None,) * 6, 0, 33, 1.0, torch.empty_like(logits))
