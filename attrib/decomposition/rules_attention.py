"""Rules for attention. Papers: see ``rules_linear``.

No paper on CD for these nets defines attention. Here the attention weights are those of the whole and count as
constants, so that attention is linear in its values, and the relevant part of its output comes from that of the values:
the rule of Ali et al., *XAI for Transformers: Better Explanations through Conservative Propagation*, ICML 2022,
section 3.2, for LRP. The effect of a mask on queries and keys is not counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.decomposition.call import Call
from attrib.decomposition.values import PlainValue, TensorPair


def _whole(value: Any) -> Any:
    return value.whole if isinstance(value, (TensorPair, PlainValue)) else value


def multihead_attention(call: Call) -> tuple[TensorPair, PlainValue | None]:
    """``nn.MultiheadAttention``: values and outputs are projected as by a linear layer."""
    module = call.module_as(nn.MultiheadAttention)
    names = (
        "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
    )  # fmt: skip
    given = dict(zip(names, call.args)) | call.kwargs
    value = given["value"]
    if not isinstance(value, TensorPair) or value.whole.ndim != 3:
        raise call.refuse("whose values do not depend on the input, or that has no batch dimension")
    if module.bias_k is not None or module.add_zero_attn:
        raise call.refuse("with add_bias_kv or add_zero_attn")
    wanted = given.get("need_weights", True)
    settings = {name: _whole(v) for name, v in given.items()} | {"need_weights": True, "average_attn_weights": False}
    _, weights = module(**settings)  # (S, heads, to, from)
    value = value if module.batch_first else value.linear(lambda part, _: part.transpose(0, 1))
    size, heads = module.embed_dim, module.num_heads
    packed = module.in_proj_weight is not None
    weight = module.in_proj_weight[2 * size :] if packed else module.v_proj_weight
    projected = value.linear(lambda part, _: F.linear(part, weight))
    if module.in_proj_bias is not None:
        projected = call.with_bias(projected, module.in_proj_bias[2 * size :])
    attended = projected.linear(
        lambda part, spread: (spread(weights) @ part.unflatten(-1, (heads, -1)).transpose(1, 2)).transpose(1, 2)
    )
    out = call.apply(module.out_proj, attended.linear(lambda part, _: part.flatten(-2)), "out_proj")
    out = out if module.batch_first else out.linear(lambda part, _: part.transpose(0, 1))
    if not wanted:
        return out, None
    shown = weights.mean(1) if given.get("average_attn_weights", True) else weights
    return out, PlainValue(value.repeated(shown), shown)


def scaled_dot_product_attention(call: Call) -> TensorPair:
    """``F.scaled_dot_product_attention``."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, call.args)) | call.kwargs
    value = given.pop("value")
    if not isinstance(value, TensorPair) or given.get("enable_gqa", False):
        raise call.refuse("whose values do not depend on the input, or with grouped queries")
    places: Tensor = torch.eye(value.whole.shape[-2], dtype=value.whole.dtype, device=value.whole.device)
    places = places.expand(*value.whole.shape[:-2], -1, -1)
    # With unit vectors as values, the output is the attention weights themselves, scale and mask included.
    weights = F.scaled_dot_product_attention(**{name: _whole(v) for name, v in given.items()}, value=places)
    return value.linear(lambda part, spread: spread(weights) @ part)
