"""Rules for normalisation. Papers: see ``rules_linear``.

No paper on CD defines norms whose statistics depend on the input, but Hsu et al. (ICLR 2025, see ``rules_transformer``)
do as we do: each part is centred by its own mean, which is linear, and the standard deviation is that of the whole and
counts as a constant. It is also the rule of Ali et al., *XAI for Transformers: Better Explanations through Conservative
Propagation*, ICML 2022, section 3.3, for LRP. (The code of Singh 2019 normalises each part by itself; those do not add
up to the whole.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attrib.decomposition.call import Call, lifted
from attrib.decomposition.rules_linear import channels, times
from attrib.decomposition.values import TensorPair


def batch_norm(call: Call) -> Any:
    """In eval mode a scale and a bias per channel, the bias in proportion (code of Singh 2019).

    Where both parts are zero, all of the bias is irrelevant, as in that code, and unlike for convolution. With the
    statistics of the input itself, which is how torch writes instance norm (samples and channels in one axis), it is a
    layer norm per channel.
    """
    pair = _input(call)
    eps: float = call.args["eps"]
    mean, variance, weight, bias = (call.args.get(n) for n in ("running_mean", "running_var", "weight", "bias"))
    if mean is None or variance is None or call.args.get("training", False):
        if 0 in call.node.all_input_nodes[0].meta["rows"]:
            raise call.refuse("with the statistics of the batch")
        normed = _normed(pair, [0, *range(2, pair.whole.ndim)], eps)
        return _affine(call, normed, *(_channels(value, pair) for value in (weight, bias))), None, None

    def shift(mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        value = -mean * torch.rsqrt(variance + eps)
        value = value if weight is None else value * weight
        return channels(value if bias is None else value + bias, pair.whole)

    scaled = call.given(running_mean=lifted(torch.zeros_like, mean), bias=None).first().linear()
    return call.with_bias(scaled, lifted(shift, mean, variance, weight, bias), tie=0.0), None, None


def layer_norm(call: Call) -> TensorPair:
    """Each part less its own mean, over the standard deviation of the whole; the bias in proportion."""
    bias = call.args["bias"]
    return normed_layer(call) if bias is None else call.with_bias(normed_layer(call), bias)


def normed_layer(call: Call) -> TensorPair:
    """``layer_norm`` without the bias."""
    dims = list(range(-len(call.args["normalized_shape"]), 0))
    return _affine(call, _normed(_input(call), dims, call.args["eps"]), call.args["weight"], None)


def rms_norm(call: Call) -> TensorPair:
    """As layer norm, without a mean and a bias."""
    pair, weight, eps = _input(call), call.args["weight"], call.args["eps"]
    dims = list(range(-len(call.args["normalized_shape"]), 0))
    eps = torch.finfo(pair.whole.dtype).eps if eps is None else eps
    scale = torch.rsqrt(pair.whole.square().mean(dims, keepdim=True) + eps)
    return _affine(call, times(pair, pair.plain(scale)), weight, None)


def group_norm(call: Call) -> TensorPair:
    """As layer norm, over each group of channels."""
    pair, groups = _input(call), call.args["num_groups"]
    grouped = pair.linear(lambda part, _: part.unflatten(1, (groups, -1)))
    normed = _normed(grouped, list(range(2, grouped.whole.ndim)), call.args["eps"])
    normed = normed.linear(lambda part, _: part.flatten(1, 2))
    return _affine(call, normed, *(_channels(call.args[name], pair) for name in ("weight", "bias")))


def _input(call: Call) -> TensorPair:
    """The input, if nothing else depends on the net's input."""
    if len(call.pairs) > 1 or not isinstance(call.args["input"], TensorPair):
        raise call.refuse("with a scale or bias that depends on the input's values")
    return call.pairs[0]


def _channels(value: Any, pair: TensorPair) -> Any:
    return None if value is None else lifted(lambda v: channels(v, pair.whole), value)


def _normed(pair: TensorPair, dims: list[int], eps: float) -> TensorPair:
    scale = torch.rsqrt(pair.whole.var(dims, correction=0, keepdim=True) + eps)
    return pair.linear(lambda part, spread: (part - part.mean(dims, keepdim=True)) * spread(scale))


def _affine(call: Call, normed: TensorPair, weight: Any, bias: Any) -> TensorPair:
    scaled = normed if weight is None else times(normed, weight)
    return scaled if bias is None else call.with_bias(scaled, bias)
