"""Rules for pooling. Papers: see ``rules_linear``. Average pooling is linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attrib.decomposition.call import Call
from attrib.decomposition.values import TensorPair

_BY_NAME: dict[str, Callable[..., Any]] = {
    "maxpool1d": F.max_pool1d, "maxpool2d": F.max_pool2d, "maxpool3d": F.max_pool3d,
    "adaptivemaxpool1d": F.adaptive_max_pool1d, "adaptivemaxpool2d": F.adaptive_max_pool2d,
    "adaptivemaxpool3d": F.adaptive_max_pool3d,
}  # fmt: skip
_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "output_size")


def max_pool(call: Call) -> TensorPair:
    """Each part's value where the whole has its maximum (Singh 2019, section 3.1); the first of several equal ones.

    The places are found once per sample; the values are gathered for all channels and masks at once. For fixed and
    adaptive windows, modules and functions.
    """
    (pair,) = call.pairs
    function = _BY_NAME[call.name.lower().replace("_", "").removesuffix("withindices")]
    if call.module is not None:
        options = {name: getattr(call.module, name) for name in _OPTIONS if name in vars(call.module)}
        wants = call.module.return_indices
    else:
        names = ("input", *(n for n in _parameters(function) if n != "input"))
        options = dict(zip(names[1:], call.args[1:])) | call.kwargs
        options.pop("input", None)
        wants = options.pop("return_indices", False)
    if wants:
        raise call.refuse("that returns indices")
    dims = int(function.__name__[-2])
    _, places = function(pair.whole, **options, return_indices=True)
    flat = pair.linear(lambda part, _: part.flatten(-dims)).picked(places.flatten(-dims))
    return flat.linear(lambda part, _: part.unflatten(-1, places.shape[-dims:]))


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    fixed = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    adaptive = ("input", "output_size", "return_indices")
    return adaptive if "adaptive" in function.__name__ else fixed


def maximum(call: Call) -> Any:
    """``amax`` and ``max`` along dimensions, as ``max_pool`` (no paper defines it)."""
    (pair,) = call.pairs
    named = dict(zip(("dim", "keepdim"), call.args[1:])) | call.kwargs
    dim = named.get("dim")
    if dim is None or dim == () or isinstance(dim, TensorPair):
        raise call.refuse("over the whole tensor, or of two tensors")
    dims = [d % pair.whole.ndim for d in ((dim,) if isinstance(dim, int) else dim)]

    ends = list(range(-len(dims), 0))
    flat = pair.linear(lambda part, _: part.movedim(dims, ends).flatten(-len(dims)))
    chosen = flat.picked(flat.whole.argmax(-1, keepdim=True))

    def shaped(part: Tensor, _: object) -> Tensor:
        part = part.unflatten(-1, (1,) * len(dims)).movedim(ends, dims)
        return part if named.get("keepdim", False) else part.squeeze(tuple(dims))

    result = chosen.linear(shaped)
    return result if call.name == "amax" else (result, None)
