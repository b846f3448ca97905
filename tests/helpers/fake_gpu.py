"""`python -m tests.helpers.fake_gpu`: the operators on tensors of a device that is none, forward and backward.

The device is torch's spare one, given a Python stand-in, which lasts as long as the process: hence a program of its
own. Fake tensors have a device and a shape and no numbers; a mix of devices raises, and so does a look at a value.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megatron_rlhf.ops import gae, library
from megatron_rlhf.parallel import random, vocab

GPU = "gpu_of_no_machine"
ROWS, COLUMNS, WORDS = 5, 40, 37
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _stays(*found: Tensor | None) -> None:
    assert all(x is not None and x.device.type == GPU for x in found), found


def _logprobs(dtype: torch.dtype) -> None:
    """Log-probs, entropy and KL, with their gradients, out of place and in place."""
    reference = torch.empty(ROWS, COLUMNS, dtype=dtype, device=GPU)
    targets = torch.empty(ROWS, dtype=torch.int64, device=GPU)
    leaf = torch.empty(ROWS, COLUMNS, dtype=dtype, device=GPU, requires_grad=True)
    for inplace in (False, True):
        where = {"vocab_start": 0, "vocab_size": WORDS, "temperature": 0.7, "inplace": inplace}
        both = vocab.logprobs(leaf * 2, targets, **where, entropy=True)
        every = vocab.kl(leaf * 2, reference, targets, **where)
        _stays(*both, *every)
        for answers in (both[:1], both, every[:3]):
            total = sum(x.sum() for x in answers)  # type: ignore[union-attr]
            _stays(*torch.autograd.grad(total, leaf, retain_graph=not inplace or answers is not every))
            if inplace:
                break


def _others() -> None:
    """Draws and advantages."""
    logits, place = torch.empty(ROWS, COLUMNS, device=GPU), torch.arange(ROWS, device=GPU)
    for keys in (None, random.row_keys(3, 1, place, place)):
        _stays(*vocab.draw(logits, keys, vocab_start=0, vocab_size=WORDS, temperature=0.7))
    rewards, values, mask = torch.empty(3, ROWS, 9, device=GPU).unbind(0)
    _stays(*gae.advantages(rewards, values, mask, gamma=1.0, lam=0.95))


def _notices() -> None:
    """What this program relies on: waiting and mixing raise."""
    x = torch.empty(3, device=GPU)
    for problem, wrong in ((DataDependentOutputException, lambda: bool(x.any())), (RuntimeError, lambda: x.cpu() + x)):
        try:
            wrong()
        except problem:
            continue
        raise AssertionError("a fake tensor let it pass")


def main() -> None:
    """Every operator by its reference, and through the fakes of the kernels where there are kernels."""
    _setup_privateuseone_for_python_backend(GPU)
    library._devices |= {GPU} if library.loaded() else frozenset()
    with FakeTensorMode(allow_non_fake_inputs=False):
        _notices()
        for path in (contextlib.nullcontext, library.references):
            with path():
                for dtype in DTYPES:
                    _logprobs(dtype)
                _others()
    print("nothing left the device, nothing waited for it")


if __name__ == "__main__":
    main()
