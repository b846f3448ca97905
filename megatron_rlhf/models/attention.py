"""Core attention over torch's scaled dot product, with an optional cache for generation.

s sequence, b batch, n query heads and g key-value heads of this shard, d width of a head. Rows start at position 0 and
are padded on the right, so training and prefill need no mask but the causal one; a query never sees a pad before it.
Rows packed end to end come with their segments, and attention is block-diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def block_diagonal(segments_bs: Tensor) -> Tensor:
    """True where a query (dim 2) may look: at its own segment, up to itself; [b, 1, s, s]."""
    return (segments_bs[:, None, :, None] == segments_bs[:, None, None, :]).tril()


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, [b, g, T, d], and how many slots of each row are filled, `lengths_b`."""

    keys: Tensor
    values: Tensor
    lengths_b: Tensor
    decoding: bool = False


class CoreAttention(MegatronModule):
    """softmax(q kᵀ / √d) v, causal; reads and fills `cache` while one is set."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Take the arguments every Megatron core attention takes; those that need fused kernels are unused."""
        super().__init__(config=config)
        assert pg_collection is not None, "core attention needs its process groups"
        self.tp_group = pg_collection.tp
        self.layer_number = max(1, layer_number)
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cache: LayerCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Context [s, b, n·d] from q [s, b, n, d] and k, v [s, b, g, d], heads already rotated.

        `attention_mask`, where given, holds the segment of each position, int64 [b, s]: a query sees its own alone.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        if self.cache is not None and self.cache.decoding:
            mask = self._append(self.cache, key, value)
            context = F.scaled_dot_product_attention(
                query, self.cache.keys, self.cache.values, attn_mask=mask, scale=self.scale, enable_gqa=grouped
            )
        else:
            if self.cache is not None:
                self.cache.keys[:, :, : key.shape[2]] = key
                self.cache.values[:, :, : value.shape[2]] = value
            dropout = self.dropout if self.training else 0.0
            blocks = None if attention_mask is None else block_diagonal(attention_mask)
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=blocks,
                is_causal=blocks is None,
                dropout_p=dropout,
                scale=self.scale,
                enable_gqa=grouped,
            )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    @staticmethod
    def _append(cache: LayerCache, key: Tensor, value: Tensor) -> Tensor:
        rows = torch.arange(key.shape[0], device=key.device)
        cache.keys[rows, :, cache.lengths_b] = key[:, :, 0]
        cache.values[rows, :, cache.lengths_b] = value[:, :, 0]
        seen = torch.arange(cache.keys.shape[2], device=key.device) <= cache.lengths_b[:, None]
        return seen[:, None, None, :]
