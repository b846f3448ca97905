"""Tiny models of transformers with random weights, saved as published ones are, and what they compute.

Only for the test's own process: on the ranks, what parallel/cpu.py puts in torch's place leaves buffers of
transformers unset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlhf.batch import Rows

VOCABULARY = 101
"""Odd, so that every layout with tp pads it."""
_GPT2 = {"n_layer": 4, "n_head": 8, "n_embd": 64, "n_positions": 64, "vocab_size": VOCABULARY}
_ROTARY = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "GPT2": {**_GPT2, "activation_function": "gelu"},
    "Llama": _ROTARY,
    "Qwen2": _ROTARY,
    "Mistral": {**_ROTARY, "sliding_window": None},
    "GPTNeoX": {
        **{name: size for name, size in _ROTARY.items() if name != "num_key_value_heads"},
        "use_parallel_residual": False,
    },
}
_STORED = {"GPTNeoX": {"lm_head.weight": "embed_out.weight"}}
"""What transformers calls a tensor in memory, and in files."""


@dataclass(frozen=True, slots=True)
class Published:
    """A folder, its tensors as they were saved, ragged rows, and what transformers computes of them in float64."""

    path: Path
    tensors: dict[str, Tensor]
    rows: Rows
    logits: Tensor
    """[b, T, V] of a language model, [b] scores of a scalar one."""


def publish(path: Path, family: str, *, head: str = "ForCausalLM", shards: int = 1, **changes: Any) -> Published:
    """A random model of `family`, saved in `shards` files.

    Its weights are small but for the head's, as in tests/parity/test_llama.py, so that float32 errs little.
    """
    transformers = pytest.importorskip("transformers")
    kind = "LMHeadModel" if family == "GPT2" and head == "ForCausalLM" else head
    labels = {} if head == "ForCausalLM" else {"num_labels": 1, "pad_token_id": 0}
    ids = {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**SETTINGS[family] | labels | ids | changes)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            head = name.endswith(("lm_head.weight", "score.weight", "wte.weight"))
            head = head or (config.tie_word_embeddings and name.endswith(("embed_tokens.weight", "embed_in.weight")))
            spread = 0.2 if head else 0.08
            mean = 1.0 if "norm.weight" in name or ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + torch.randn(parameter.shape, generator=generator) * spread)
        rows = _rows(generator)
        real = torch.arange(rows.tokens_BT.shape[1]) < rows.lengths_B[:, None]
        stored = _STORED.get(family, {})
        kept = {stored.get(name, name): tensor.clone() for name, tensor in model.state_dict().items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        model.save_pretrained(path, max_shard_size=10 * size if shards == 1 else int(size / (shards - 0.7)))
        logits = model.double()(rows.tokens_BT, attention_mask=real.long()).logits.float()
    logits = logits if head == "ForCausalLM" else logits.squeeze(-1)
    files = list(path.glob("*.safetensors"))
    assert len(files) == shards, [file.name for file in files]
    if config.tie_word_embeddings:
        kept.pop(stored.get("lm_head.weight", "lm_head.weight"), None)
    return Published(path, kept, rows, logits)


def _rows(generator: torch.Generator) -> Rows:
    lengths_B = torch.randint(30, 60, (4,), generator=generator)
    tokens_BT = torch.randint(1, VOCABULARY, (4, int(lengths_B.max())), generator=generator)
    real = torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    return Rows(tokens_BT.masked_fill(~real, 0), torch.ones_like(lengths_B), lengths_B)
