"""Run as a script by an environment under test: prints as JSON what the installed ops are and how far they err.

Needs nothing but megatron_rlhf and torch.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

import megatron_rlhf
from megatron_rlhf.ops import gae, library, logprob, sample

OPERATORS = ("logprob_stats", "logprob_kl_stats", "logprob_backward", "sample", "gae")


def largest_difference() -> float:
    """Between the ops as they are installed and their Python references, each op once; and from float64's log-sum."""
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(2, 5, 1003, generator=draw)
    keys = torch.randint(0, 1 << 32, (2, 5), generator=draw)
    ours = _numbers(given, keys)
    with library.references():
        plain = _numbers(given, keys)
    truth = (given[0, :, :1000].double() / 0.7).logsumexp(1)
    log_sum = ours[0][0].double() + ours[0][1].double().log()
    pairs = [(log_sum[[0, 1, 3, 4]], truth[[0, 1, 3, 4]]), *zip(ours, plain, strict=True)]
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs)


def _numbers(given: Tensor, keys: Tensor) -> list[Tensor]:
    x, y = given
    targets, ones, mask = torch.tensor([0, 3, -1, 999, 7]), torch.ones(5), torch.ones(5, 9)
    place = {"vocab_start": 0, "columns": 1000, "temperature": 0.7}
    stats = logprob.stats(x, targets, **place)
    sums = torch.stack([*stats[:2], stats[2] / stats[1]])
    grad = logprob.backward(x, None, targets, sums, None, ones, ones, None, out_NV=torch.empty_like(x), **place)
    kl = logprob.kl_stats(x, y, targets, **place)
    drawn = sample.best(x, keys, **place)
    return [stats, kl, grad, drawn, *gae.advantages(x[:, :9], y[:, :9], mask, gamma=1.0, lam=0.95)]


def kernels() -> list[str]:
    """The devices for which every operator has a kernel."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    devices = () if library.WHY_NOT else ("CPU", "CUDA")
    return [key for key in devices if all(has(f"megatron_rlhf::{name}", key) for name in OPERATORS)]


def schemas() -> list[str]:
    """The operators' signatures as this torch reads them."""
    names = () if library.WHY_NOT else OPERATORS
    return [str(getattr(torch.ops.megatron_rlhf, name).default._schema) for name in names]


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "file": megatron_rlhf.__file__,
                "why_not": library.WHY_NOT,
                "kernels": kernels(),
                "difference": largest_difference(),
                "schemas": schemas(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
            }
        )
    )
