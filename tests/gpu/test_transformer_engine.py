"""Proves, where a GPU and Transformer Engine are, that its layers compute what ours compute from the same weights.

Not proved here: speed; several GPUs; fp8.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

HAVE_BOTH = importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not HAVE_BOTH, reason="needs Transformer Engine and a GPU")


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_logprobs_are_ours(style: str) -> None:
    """fp32, one GPU: every log-prob of ragged rows, to 1e-4."""
    from megatron_rlhf.models import roles, transformer_engine
    from megatron_rlhf.parallel import grid
    from megatron_rlhf.reshard import move
    from tests.helpers import roles as tiny

    if not dist.is_initialized():
        grid.connect()
    assert transformer_engine.usable()
    model = replace(tiny.STYLES[style], hidden=256)
    ours, theirs = (tiny.engine("tp1", roles.logprobs(), model=model, engine=kind) for kind in ("never", "auto"))
    assert ours.network.directory.keys() == theirs.network.directory.keys()
    move.copy(ours.network, theirs.network)
    rows = tiny.rows(16)
    torch.testing.assert_close(theirs.forward(rows), ours.forward(rows), rtol=1e-4, atol=1e-4)
