"""Attention as products and a softmax, where torch has one call for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T scale + mask) value, (..., L, E), (..., S, E), (..., S, V) -> (..., L, V).

    As the documentation of ``torch.nn.functional.scaled_dot_product_attention`` defines it. A row whose mask hides
    every place attends to none, as in torch.
    """
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        attn_mask = query.new_ones(query.size(-2), key.size(-2), dtype=torch.bool).tril()
    if attn_mask is None:
        return torch.matmul(scores.softmax(-1), value)
    if attn_mask.dtype != torch.bool:
        return torch.matmul((scores + attn_mask).softmax(-1), value)
    # Not -inf: a row that is hidden whole would be NaN, and so would its gradient.
    weights = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.matmul(weights.masked_fill(~attn_mask, 0.0), value)
