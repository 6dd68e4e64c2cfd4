"""Rules for pooling and other choices among numbers. Papers: see ``rules_linear``. Average pooling is linear."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.decomposition.call import Call
from attrib.decomposition.values import PlainValue, TensorPair

log = logging.getLogger(__name__)

_LOOKED = "attrib.decomposition.ties"  # in the meta of a node: whether its first windows were looked at
_POOLS: dict[str, Callable[..., Any]] = {
    "max_pool1d": F.max_pool1d, "max_pool2d": F.max_pool2d, "max_pool3d": F.max_pool3d,
    "adaptive_max_pool1d": F.adaptive_max_pool1d, "adaptive_max_pool2d": F.adaptive_max_pool2d,
    "adaptive_max_pool3d": F.adaptive_max_pool3d,
}  # fmt: skip


def max_pool(call: Call) -> Any:
    """Each part's value where the whole has its maximum (Singh 2019, section 3.1); the first of several equal ones.

    The places are found once per sample; the values are gathered for all channels and masks at once. For fixed and
    adaptive windows.
    """
    pair, name = call.pair, call.name.removesuffix("_with_indices")
    options = {key: value for key, value in call.args.items() if key != "self" and value != []}
    values, places = _POOLS[name](pair.whole, **options, return_indices=True)
    dims = int(name[-2])
    if not pair.rows.both and not call.node.meta.setdefault(_LOOKED, False):
        call.node.meta[_LOOKED] = True
        rest = pair.whole.flatten(-dims).scatter(-1, places.flatten(-dims), -torch.inf).view_as(pair.whole)
        share = (_POOLS[name](rest, **options) == values).float().mean().item()
        if share:
            log.warning(
                "%.0f%% of the windows of %s have several equal maxima, as on a flat background; the first one counts. "
                "In the authors' code rounding chooses one, so units there may have other scores, and trees other "
                "components (method acd: as_released=true)",
                100 * share,
                call.where,
            )
    flat = pair.linear(lambda part, _: part.flatten(-dims)).picked(places.flatten(-dims))
    pooled = flat.linear(lambda part, _: part.unflatten(-1, places.shape[-dims:]))
    single = call.name in ("max_pool1d", "max_pool2d", "max_pool3d")
    return pooled if single else (pooled, pooled.plain(places))


def extreme(call: Call) -> TensorPair:
    """``amax``, ``amin``: as ``max_pool`` (no paper defines it)."""
    pair, dim = call.pair, call.args["dim"]
    if len(dim) == 0:
        raise call.refuse("over the whole tensor")
    dims, ends = [d % pair.whole.ndim for d in dim], list(range(-len(dim), 0))
    flat = pair.linear(lambda part, _: part.movedim(dims, ends).flatten(-len(dims)))
    places = flat.whole.argmax(-1, keepdim=True) if call.name == "amax" else flat.whole.argmin(-1, keepdim=True)

    def shaped(part: Tensor, _: object) -> Tensor:
        part = part.unflatten(-1, (1,) * len(dims)).movedim(ends, dims)
        return part if call.args["keepdim"] else part.squeeze(tuple(dims))

    return flat.picked(places).linear(shaped)


def chosen(call: Call) -> tuple[TensorPair, PlainValue]:
    """``max``, ``sort``, ``topk``, ``median`` ... along one dimension: both parts at the places of the whole's values.

    As ``max_pool`` (no paper defines it).
    """
    if "dim" not in call.args:
        raise call.refuse("over the whole tensor")
    pair, dim = call.pair, call.args["dim"]
    _, places = call.whole()
    if call.args.get("keepdim", True):
        picked = pair.picked(places, dim)
    else:
        picked = pair.picked(places.unsqueeze(dim), dim).linear(lambda part, _: part.squeeze(dim))
    return picked, picked.plain(places)
