"""Which ATen calls are element-wise, linear, or a ReLU; see ``graph`` for the graph that they are in."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from attrib.models.calls import operation

# Each number of the result is a function of the number at its place (of several inputs: of the numbers).
ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "celu", "clamp", "clamp_max",
    "clamp_min", "cos", "cosh", "elu", "erf", "erfc", "exp", "exp2", "expm1", "floor", "fmax", "fmin", "fmod", "frac",
    "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "heaviside", "hypot", "leaky_relu", "log", "log10",
    "log1p",
    "log2", "log_sigmoid_forward", "logit", "maximum", "minimum", "mish", "nan_to_num", "pow", "_prelu_kernel",
    "reciprocal", "relu", "relu6", "remainder", "round", "rrelu_with_noise_functional", "rsqrt", "selu", "sgn",
    "sigmoid", "sign",
    "silu", "sin", "sinc", "sinh", "softplus", "softshrink", "special_expit", "sqrt", "square", "tan", "tanh",
    "threshold", "trunc", "where", "xlogy", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
    "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "isnan", "isinf", "add", "sub", "rsub",
    "mul", "div", "neg", "_to_copy", "clone", "masked_fill", "positive", "addcmul", "addcdiv", "lerp", "fill", "copy",
))  # fmt: skip

# Linear (up to a constant) in these arguments together, if no other argument depends on the input. Of those that
# are not named it is the first.
LINEAR: dict[str, tuple[int, ...]] = dict.fromkeys((
    "reshape", "view", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze",
    "slice", "select", "narrow", "unbind", "split", "split_with_sizes", "chunk", "diagonal", "as_strided", "unfold",
    "flip", "roll", "repeat", "pad", "tril", "triu", "rot90",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im", "constant_pad_nd", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "cumsum", "index", "index_select", "gather",
    "grid_sampler_2d", "grid_sampler_3d", "max_unpool2d", "max_unpool3d", "real", "imag", "view_as_real",
    "view_as_complex", "_conj", "_fft_r2c", "_fft_c2c", "_fft_c2r", "neg", "positive", "clone", "_to_copy",
), (0,)) | {
    "add": (0, 1), "sub": (0, 1), "rsub": (0, 1), "cat": (0,), "stack": (0,), "slice_scatter": (0, 1),
    "select_scatter": (0, 1), "diagonal_scatter": (0, 1), "as_strided_scatter": (0, 1), "copy": (1,), "fill": (1,),
    "where": (1, 2), "index_put": (0, 2), "index_add": (0, 3), "scatter": (0, 3), "scatter_add": (0, 3),
    "masked_fill": (0, 2),
}  # fmt: skip

# Linear in each of the two arguments, if not in both together; in the third named it is linear beside them.
BILINEAR: dict[str, tuple[tuple[int, int], int | None]] = {
    "mul": ((0, 1), None), "mm": ((0, 1), None), "bmm": ((0, 1), None), "mv": ((0, 1), None), "dot": ((0, 1), None),
    "matmul": ((0, 1), None), **dict.fromkeys((
        "linear", "convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
        "conv_transpose3d",
    ), ((0, 1), 2)),
    "addmm": ((1, 2), 0), "baddbmm": ((1, 2), 0), "addmv": ((1, 2), 0),
}  # fmt: skip

# A loop over steps, which is taken apart.
RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))

# Eval mode: linear. With the input's own statistics: not. (Name -> where the argument ``training`` is.)
BATCH_NORM: dict[str, int | None] = {
    "native_batch_norm": 5, "_native_batch_norm_legit": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5,
    "_native_batch_norm_legit_no_training": None, "_batch_norm_no_update": None,
}  # fmt: skip


def _argument(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def is_zero(value: Any) -> bool:
    """Also of a node that makes a tensor of zeros, or of a tensor that the net keeps."""
    if not isinstance(value, fx.Node):
        return value is not None and value == 0
    if value.op == "get_attr":
        constant = operator.attrgetter(str(value.target))(value.graph.owning_module)
        return isinstance(constant, Tensor) and not constant.any()
    if operation(value) in ("zeros", "zeros_like", "new_zeros", "zero"):
        return True
    if operation(value) in ("full", "full_like", "new_full", "scalar_tensor"):
        fill = value.args[{"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}[operation(value)]]
        return is_zero(fill)
    kept = ("expand", "reshape", "_to_copy", "unsqueeze")
    return operation(value) in kept and is_zero(value.args[0])


def _clamped(node: fx.Node) -> int | None:
    # A ceiling makes a ReLU6 of it.
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    return 0 if is_zero(low) and (high is None or (not isinstance(high, fx.Node) and high > 0)) else None


def _negated(node: Any, x: Any) -> bool:
    """Whether a node is x < 0 or x <= 0, or the opposite of x > 0 or x >= 0."""
    if not isinstance(node, fx.Node):
        return False
    if operation(node) in ("logical_not", "bitwise_not"):
        return _compared(node.args[0], x, ("gt", "ge"))
    return _compared(node, x, ("lt", "le"))


def _compared(node: Any, x: Any, how: tuple[str, ...]) -> bool:
    return isinstance(node, fx.Node) and operation(node) in how and node.args[0] is x and is_zero(node.args[1])


def _positive(node: Any, x: Any) -> bool:
    """Whether a node is x > 0 or x >= 0, perhaps as a number."""
    while isinstance(node, fx.Node) and operation(node) == "_to_copy":
        node = node.args[0]
    if isinstance(node, fx.Node) and operation(node) in ("logical_not", "bitwise_not"):
        return _compared(node.args[0], x, ("lt", "le"))
    return _compared(node, x, ("gt", "ge"))


def _where(node: fx.Node) -> int | None:
    which, one, other = node.args
    if _positive(which, one) and is_zero(other):
        return 1
    return 2 if _negated(which, other) and is_zero(one) else None


def _overwrites_negative(node: fx.Node) -> bool:
    """Whether it is x[x < 0] = 0."""
    at: Any = node.args[1]
    return len(at) == 1 and _negated(at[0], node.args[0]) and is_zero(node.args[2]) and len(node.args) < 4


def _either(node: fx.Node, fits: Callable[[Any, Any], bool]) -> int | None:
    """The argument for which the other one fits."""
    return next((i for i in (0, 1) if isinstance(node.args[i], fx.Node) and fits(node.args[1 - i], node.args[i])), None)


# What computes max(x, 0), or min(max(x, 0), ceiling): the operation -> which argument is x; None if it is no ReLU.
def _cuts(node: fx.Node) -> int | None:
    # F.lp_pool2d has a ReLU of absolute values inside, which cuts nothing off and is no activation.
    given = node.args[0]
    return None if isinstance(given, fx.Node) and operation(given) == "abs" else 0


RELU_LIKE: dict[str, Callable[[fx.Node], int | None]] = {
    "relu": _cuts,
    "relu6": lambda node: 0,
    "hardtanh": _clamped,
    "clamp": _clamped,
    "clamp_min": lambda node: 0 if is_zero(_argument(node, 1, "min")) else None,
    "threshold": lambda node: 0 if is_zero(node.args[1]) and is_zero(node.args[2]) else None,
    "maximum": lambda node: _either(node, lambda other, x: is_zero(other)),
    "mul": lambda node: _either(node, lambda other, x: _positive(other, x)),
    "fmax": lambda node: _either(node, lambda other, x: is_zero(other)),
    "where": _where,
    "masked_fill": lambda node: 0 if _negated(node.args[1], node.args[0]) and is_zero(node.args[2]) else None,
    "index_put": lambda node: 0 if _overwrites_negative(node) else None,
    "leaky_relu": lambda node: 0 if len(node.args) > 1 and node.args[1] == 0 else None,
}
