"""Rules for normalisation. Papers: see ``rules_linear``.

No paper on CD defines norms whose statistics depend on the input. Here each part is centred by its own mean, which is
linear, and the standard deviation is that of the whole and counts as a constant: the rule of Ali et al., *XAI for
Transformers: Better Explanations through Conservative Propagation*, ICML 2022, section 3.3, for LRP. (The code of
Singh 2019 normalises each part by itself; those do not add up to the whole.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import batchnorm

from attrib.decomposition.call import Call
from attrib.decomposition.rules_linear import channels
from attrib.decomposition.values import PlainValue, TensorPair


def batch_norm_module(call: Call) -> TensorPair:
    """In eval mode a scale and a bias per channel, the bias in proportion (code of Singh 2019).

    Where both parts are zero, all of the bias is irrelevant, as in that code, and unlike for convolution.
    """
    module = call.module_as(batchnorm._NormBase)
    return _batch_norm(call, module.running_mean, module.running_var, module.weight, module.bias, module.eps)


def batch_norm_function(call: Call) -> TensorPair:
    """``F.batch_norm``, as ``batch_norm_module``."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, call.args)) | call.kwargs
    if given.get("training", False):
        raise call.refuse("with the statistics of the batch")
    mean, variance, weight, bias = (given.get(name) for name in names[1:5])
    return _batch_norm(call, mean, variance, weight, bias, given.get("eps", 1e-5))


def norm_and_activation(call: Call) -> Any:
    """timm's batch norm with an activation in one module: one rule after the other."""
    module = call.module_as(nn.BatchNorm2d)
    pair = batch_norm_module(call)
    for name in ("drop", "act"):
        pair = call.apply(getattr(module, name), pair, name)
    return pair


def _batch_norm(
    call: Call, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> TensorPair:
    if mean is None or variance is None:
        raise call.refuse("with the statistics of the batch")
    (pair,) = call.pairs
    zero = torch.zeros_like(mean)
    scaled = pair.linear(lambda part, _: F.batch_norm(part, zero, variance, weight, None, False, 0.0, eps))
    shift = -mean * torch.rsqrt(variance + eps)
    shift = shift if weight is None else shift * weight
    shift = shift if bias is None else shift + bias
    return call.with_bias(scaled, channels(shift, pair.whole), tie=0.0)


def layer_norm_module(call: Call) -> TensorPair:
    """Each part less its own mean, over the standard deviation of the whole; the bias in proportion."""
    module = call.module_as(nn.LayerNorm)
    return _layer_norm(call, module.normalized_shape, module.weight, module.bias, module.eps)


def layer_norm_function(call: Call) -> TensorPair:
    """``F.layer_norm``, as ``layer_norm_module``."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), call.args)) | call.kwargs
    shape = given["normalized_shape"]
    shape = shape.whole if isinstance(shape, PlainValue) else shape  # such as x.shape[1:]
    return _layer_norm(call, shape, given.get("weight"), given.get("bias"), given.get("eps", 1e-5))


def rms_norm_module(call: Call) -> TensorPair:
    """As layer norm, without a mean and a bias."""
    module, (pair,) = call.module_as(nn.RMSNorm), call.pairs
    eps = torch.finfo(pair.whole.dtype).eps if module.eps is None else module.eps
    dims = list(range(-len(module.normalized_shape), 0))
    scale = torch.rsqrt(pair.whole.square().mean(dims, keepdim=True) + eps)
    weight = 1.0 if module.weight is None else module.weight
    return pair.linear(lambda part, spread: part * spread(scale) * weight)


def group_norm_module(call: Call) -> TensorPair:
    """As layer norm, over each group of channels."""
    module = call.module_as(nn.GroupNorm)
    return _group_norm(call, module.num_groups, module.weight, module.bias, module.eps)


def group_norm_function(call: Call) -> TensorPair:
    """``F.group_norm``, as ``group_norm_module``."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), call.args)) | call.kwargs
    return _group_norm(call, given["num_groups"], given.get("weight"), given.get("bias"), given.get("eps", 1e-5))


def instance_norm_module(call: Call) -> TensorPair:
    """Group norm with one channel per group; with running statistics it is batch norm."""
    module = call.module_as(batchnorm._NormBase)
    if module.running_mean is not None:
        return batch_norm_module(call)
    return _group_norm(call, call.pairs[0].whole.shape[1], module.weight, module.bias, module.eps)


def _layer_norm(call: Call, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> TensorPair:
    (pair,) = call.pairs
    dims = list(range(-len(shape), 0))
    normed = _normed(pair, dims, eps, lambda value: value if weight is None else value * weight)
    return normed if bias is None else call.with_bias(normed, bias)


def _group_norm(call: Call, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> TensorPair:
    (pair,) = call.pairs
    grouped = pair.linear(lambda part, _: part.unflatten(1, (groups, -1)))
    dims = list(range(2, grouped.whole.ndim))
    normed = _normed(grouped, dims, eps, lambda value: value)
    gain = 1.0 if weight is None else channels(weight, pair.whole)
    normed = normed.linear(lambda part, _: part.flatten(1, 2) * gain)
    return normed if bias is None else call.with_bias(normed, channels(bias, pair.whole))


def _normed(pair: TensorPair, dims: list[int], eps: float, gain: Callable[[Tensor], Tensor]) -> TensorPair:
    variance = pair.whole.var(dims, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    return pair.linear(lambda part, spread: gain((part - part.mean(dims, keepdim=True)) * spread(scale)))
