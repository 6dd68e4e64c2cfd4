"""Which rule each operation has. For one that is not listed here ``rule_of`` raises UserError, which names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from attrib.decomposition.call import Call
from attrib.decomposition.rules_attention import multihead_attention, scaled_dot_product_attention
from attrib.decomposition.rules_linear import (
    add,
    affine_function,
    affine_module,
    attribute,
    concatenate,
    divide,
    embedding,
    facts,
    fill,
    item,
    linear,
    multiply,
    pad,
)
from attrib.decomposition.rules_norm import (
    batch_norm_function,
    batch_norm_module,
    group_norm_function,
    group_norm_module,
    instance_norm_module,
    layer_norm_function,
    layer_norm_module,
    norm_and_activation,
    rms_norm_module,
)
from attrib.decomposition.rules_pointwise import activation, power, shapley, softmax
from attrib.decomposition.rules_pooling import max_pool, maximum
from attrib.decomposition.rules_recurrent import padded_recurrent, recurrent
from attrib.models.text import Recurrent

Rule = Callable[[Call], Any]

# A subclass has its parent's rule unless it has a ``forward`` of its own.
MODULES: Mapping[type[nn.Module], Rule] = {
    nn.Conv1d: affine_module, nn.Conv2d: affine_module, nn.Conv3d: affine_module, nn.Linear: affine_module,
    nn.ConvTranspose1d: affine_module, nn.ConvTranspose2d: affine_module, nn.ConvTranspose3d: affine_module,
    nn.BatchNorm1d: batch_norm_module, nn.BatchNorm2d: batch_norm_module, nn.BatchNorm3d: batch_norm_module,
    nn.SyncBatchNorm: batch_norm_module, nn.LayerNorm: layer_norm_module, nn.RMSNorm: rms_norm_module,
    nn.GroupNorm: group_norm_module, nn.InstanceNorm1d: instance_norm_module,
    nn.InstanceNorm2d: instance_norm_module, nn.InstanceNorm3d: instance_norm_module,
    nn.ReLU: activation, nn.ReLU6: activation, nn.LeakyReLU: activation, nn.PReLU: activation, nn.ELU: activation,
    nn.CELU: activation, nn.SELU: activation, nn.GELU: activation, nn.SiLU: activation, nn.Mish: activation,
    nn.Hardswish: activation, nn.Tanh: shapley, nn.Hardtanh: shapley, nn.Softsign: shapley, nn.Sigmoid: shapley,
    nn.Hardsigmoid: shapley, nn.Softplus: shapley, nn.LogSigmoid: shapley, nn.Softmax: softmax, nn.LogSoftmax: shapley,
    nn.Threshold: shapley, nn.RReLU: shapley, nn.Tanhshrink: shapley, nn.Softshrink: shapley, nn.Hardshrink: shapley,
    nn.MaxPool1d: max_pool, nn.MaxPool2d: max_pool, nn.MaxPool3d: max_pool, nn.AdaptiveMaxPool1d: max_pool,
    nn.AdaptiveMaxPool2d: max_pool, nn.AdaptiveMaxPool3d: max_pool,
    nn.AvgPool1d: linear, nn.AvgPool2d: linear, nn.AvgPool3d: linear, nn.AdaptiveAvgPool1d: linear,
    nn.AdaptiveAvgPool2d: linear, nn.AdaptiveAvgPool3d: linear,
    nn.Identity: linear, nn.Flatten: linear, nn.Unflatten: linear, nn.Dropout: linear, nn.Dropout1d: linear,
    nn.Dropout2d: linear, nn.Dropout3d: linear, nn.AlphaDropout: linear, nn.FeatureAlphaDropout: linear,
    nn.Upsample: linear, nn.PixelShuffle: linear, nn.PixelUnshuffle: linear, nn.ChannelShuffle: linear,
    nn.ZeroPad1d: pad, nn.ZeroPad2d: pad, nn.ZeroPad3d: pad, nn.ConstantPad1d: pad, nn.ConstantPad2d: pad,
    nn.ConstantPad3d: pad, nn.ReflectionPad1d: linear, nn.ReflectionPad2d: linear, nn.ReflectionPad3d: linear,
    nn.ReplicationPad1d: linear, nn.ReplicationPad2d: linear, nn.ReplicationPad3d: linear,
    nn.CircularPad1d: linear, nn.CircularPad2d: linear, nn.CircularPad3d: linear,
    nn.Embedding: embedding, nn.LSTM: recurrent, nn.GRU: recurrent, nn.RNN: recurrent, Recurrent: padded_recurrent,
    nn.MultiheadAttention: multihead_attention,
}  # fmt: skip

# Modules of libraries that need not be installed, by the name of the class.
MODULES_BY_NAME: Mapping[str, Rule] = {
    "timm.layers.norm_act.BatchNormAct2d": norm_and_activation,
    "timm.layers.conv2d_same.Conv2dSame": affine_module,
    "timm.layers.std_conv.StdConv2d": affine_module,
}

# Functions and methods by name: ``torch.relu``, ``F.relu``, ``x.relu()`` and ``x.relu_()`` are all "relu". A name that
# ends in "_" is looked up without it, because in-place operations return a new tensor here.
FUNCTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), affine_function),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), affine_function),
    **dict.fromkeys(("add", "iadd", "sub", "isub", "subtract"), add),
    **dict.fromkeys(("mul", "imul", "multiply", "matmul", "imatmul", "bmm", "mm", "einsum"), multiply),
    **dict.fromkeys(("truediv", "itruediv", "div", "divide", "true_divide"), divide),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), concatenate),
    **dict.fromkeys(("neg", "pos", "negative", "positive"), linear),
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "permute", "transpose", "swapaxes", "t"), linear),
    **dict.fromkeys(("unsqueeze", "squeeze", "movedim", "moveaxis", "expand", "expand_as", "repeat"), linear),
    **dict.fromkeys(("tile", "repeat_interleave", "broadcast_to", "view_as", "reshape_as", "contiguous"), linear),
    **dict.fromkeys(("clone", "to", "type_as", "float", "double", "alias"), linear),
    **dict.fromkeys(("chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select"), linear),
    **dict.fromkeys(("gather", "take_along_dim", "flip", "roll", "rot90", "unfold", "tril", "triu"), linear),
    **dict.fromkeys(("sum", "mean", "cumsum"), linear),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"), linear),
    **dict.fromkeys(("adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample"), linear),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), linear),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), linear),
    **dict.fromkeys(("feature_alpha_dropout", "feature_dropout", "stochastic_depth", "drop_path"), linear),
    **dict.fromkeys(("size", "dim", "ndimension", "numel", "new_zeros", "new_ones", "new_full"), facts),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "new_empty", "new_tensor", "len"), facts),
    "getattr": attribute,
    "getitem": item,
    "masked_fill": fill,
    "pad": pad,
    "embedding": embedding,
    "batch_norm": batch_norm_function,
    "layer_norm": layer_norm_function,
    "group_norm": group_norm_function,
    **dict.fromkeys(("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu"), activation),
    **dict.fromkeys(("mish", "hardswish"), activation),
    **dict.fromkeys(("tanh", "sigmoid", "hardsigmoid", "softplus", "softsign", "logsigmoid"), shapley),
    **dict.fromkeys(("hardtanh", "clamp", "clip", "log_softmax"), shapley),
    **dict.fromkeys(("threshold", "_threshold", "rrelu", "tanhshrink", "softshrink", "hardshrink"), shapley),
    **dict.fromkeys(("clamp_min", "clamp_max", "abs", "absolute", "square"), shapley),
    "pow": power,
    **dict.fromkeys(("exp", "expm1", "sin", "cos", "atan", "arctan", "erf"), shapley),
    "softmax": softmax,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), max_pool),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), max_pool),
    **dict.fromkeys(("amax", "max"), maximum),
    "scaled_dot_product_attention": scaled_dot_product_attention,
}

# Packages whose functions have the meaning above; one of the same name elsewhere may do anything.
_HOMES = ("torch", "torchvision", "timm", "_operator", "builtins")

# Operations that read a tensor's shape or type, and none of its values.
SIZES = frozenset(name for name, rule in FUNCTIONS.items() if rule is facts)


def function_name(target: Callable[..., Any] | str) -> str:
    """The name of a function or method, without the "_" of in-place operations."""
    if isinstance(target, str):
        name = target
    else:
        home = target.__module__  # None for functions of torch that are written in C++
        name = target.__name__ if home is None or home.split(".")[0] in _HOMES else f"{home}.{target.__name__}"
    return name if name.endswith("__") else name.removesuffix("_")


def rule_of(call: Call) -> Rule:
    """Raises UserError for an operation without a rule."""
    if call.module is None:
        found = FUNCTIONS.get(call.name)
    else:
        kind = type(call.module)
        parents = (p for p in kind.__mro__ if issubclass(p, nn.Module) and p in MODULES and p.forward is kind.forward)
        named = MODULES_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
        found = named or MODULES.get(next(parents, kind))
    if found is None:
        raise call.refuse("yet; add one to attrib/decomposition/table.py, or take another method")
    return found
