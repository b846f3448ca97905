"""A draw over a slice of the vocabulary by perturbed maxima, in one pass that also gives what its log-prob needs.

N rows, V columns of this slice, of which the first `columns` are words; x = logits / T. parallel/vocab.py finds the
winner of the slices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhf.ops import library, noise


def best(logits_NV: Tensor, keys_2N: Tensor | None, *, vocab_start: int, columns: int, temperature: float) -> Tensor:
    """[5, N] float32: the largest x + noise, its word's global number, m = max x, S = sum e^(x-m), and x at that word.

    The noise is `noise.gumbel` of the keys, none without keys; the first of equal words wins. Numbers of words are
    exact below 2^24. A slice without words gives -inf, 0, -inf, 0, 0; float64 is computed in float32.
    """
    if logits_NV.dtype == torch.float64:
        logits_NV = logits_NV.float()
    if not library.serves(logits_NV):
        return _reference(logits_NV, keys_2N, vocab_start, columns, temperature)
    # 32-bit keys travel as int32: few of torch's operators know uint32
    keys = None if keys_2N is None else (keys_2N - ((keys_2N >> 31) << 32)).to(torch.int32).contiguous()
    return torch.ops.megatron_rlhf.sample(logits_NV, keys, vocab_start, columns, temperature)


def _reference(logits_NV: Tensor, keys_2N: Tensor | None, vocab_start: int, columns: int, temperature: float) -> Tensor:
    result = torch.zeros((5, len(logits_NV)), dtype=torch.float32, device=logits_NV.device)
    result[0:3:2] = -torch.inf
    if columns <= 0:
        return result
    x = logits_NV[:, :columns].float() / temperature
    perturbed = x if keys_2N is None else x + noise.gumbel(keys_2N, vocab_start, columns)
    result[0], column = perturbed.max(1)
    result[1] = column + vocab_start
    result[2] = x.amax(1)
    result[3] = (x - result[2].masked_fill(result[2] == -torch.inf, 0)[:, None]).exp_().sum(1)
    result[4] = x.gather(1, column[:, None])[:, 0]
    return result


if library.loaded():

    @torch.library.register_fake("megatron_rlhf::sample")
    def _fake(logits: Tensor, keys: Tensor | None, vocab_start: int, columns: int, temperature: float) -> Tensor:
        return logits.new_empty((5, logits.shape[0]), dtype=torch.float32)
