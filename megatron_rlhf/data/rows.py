"""Token lists to the rectangular Rows an engine takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rlhf.batch import Rows


def pad_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rows:
    """Rows `[prompt, response, pad]` of int64, as wide as the longest (at least 1); padding is 0.

    ValueError unless there is one response a prompt.
    """
    joined = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max([1, *map(len, joined)])
    tokens_BT = torch.zeros(len(joined), width, dtype=torch.int64)
    for place, row in enumerate(joined):
        tokens_BT[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return Rows(
        tokens_BT=tokens_BT,
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
        lengths_B=torch.tensor([len(row) for row in joined], dtype=torch.int64),
    )
