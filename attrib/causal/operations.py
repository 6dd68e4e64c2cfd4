"""Names of functions and tensor methods, grouped by what they do to channels (see ``structure``)."""

from __future__ import annotations

_ACTIVATIONS = (
    "relu relu_ relu6 gelu silu silu_ mish sigmoid sigmoid_ tanh tanh_ hardswish hardsigmoid hardtanh hardtanh_ "
    "leaky_relu leaky_relu_ elu elu_ selu celu softplus softsign logsigmoid threshold rrelu prelu"
)
_ARITHMETIC = (
    "add add_ iadd sub sub_ isub mul mul_ imul div div_ truediv itruediv neg abs exp sqrt rsqrt square pow clamp "
    "clamp_ clip minimum maximum"
)
_NORMALISATION = "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm"
_NOTHING = (
    "contiguous clone detach float double half to type type_as dropout dropout_ dropout2d dropout3d alpha_dropout "
    "feature_dropout stochastic_depth drop_path"
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALIGNED = _names(f"{_ACTIVATIONS} {_ARITHMETIC} {_NORMALISATION} {_NOTHING}")
PLACES = _names(
    "max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d "
    "adaptive_max_pool2d lp_pool2d interpolate upsample pad"
)
RESHAPED = _names("flatten view reshape squeeze unsqueeze")
PERMUTED = _names("permute transpose swapaxes")
REDUCED = _names("mean sum amax")
JOINED = _names("cat concat concatenate")
