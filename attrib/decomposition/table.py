"""Which rule each operation has. An operation that is not here is refused by its name; nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrib.decomposition import rules_transformer
from attrib.decomposition.call import Call
from attrib.decomposition.rules_linear import LINEAR_IN, add, add_product, affine, embedding, linear, multiply
from attrib.decomposition.rules_norm import batch_norm, group_norm, layer_norm, rms_norm
from attrib.decomposition.rules_pointwise import (
    divide,
    first_of_several,
    function,
    gated,
    power,
    ratio,
    shapley,
)
from attrib.decomposition.rules_pooling import chosen, extreme, max_pool
from attrib.decomposition.rules_recurrent import padded_recurrent, recurrent
from attrib.models.activations import BATCH_NORM, ELEMENTWISE

Rule = Callable[[Call], Any]

FUNCTION = "attrib::function"  # of one value, in several calls: see ``attrib.models.functions``

# Operation -> rule. Of two entries the later one counts.
RULES: Mapping[str, Rule] = {
    **dict.fromkeys((*ELEMENTWISE, FUNCTION), function),
    **dict.fromkeys(LINEAR_IN, linear),
    **dict.fromkeys(("log_softmax", "softmax", "logsumexp", "linalg_vector_norm", "var", "std", "prod"), shapley),
    **dict.fromkeys(("cumprod", "logcumsumexp", "_cdist_forward", "_pdist_forward"), shapley),
    **dict.fromkeys(("log_sigmoid_forward", "rrelu_with_noise", "rrelu_with_noise_functional"), first_of_several),
    **dict.fromkeys(("acos", "acosh", "asin", "atanh", "log", "log10", "log1p", "log2", "logit", "sqrt"), ratio),
    "pow": power,
    "glu": gated,
    **dict.fromkeys(("add", "sub", "rsub"), add),
    **dict.fromkeys(("mul", "matmul", "mm", "bmm", "mv", "dot", "_trilinear"), multiply),
    "div": divide,
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), add_product),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), affine),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), affine),
    "embedding": embedding,
    **dict.fromkeys(BATCH_NORM, batch_norm),
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "rms_norm": rms_norm,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), max_pool),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), max_pool),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), max_pool),
    **dict.fromkeys(("amax", "amin"), extreme),
    **dict.fromkeys(("max", "min", "median", "nanmedian", "mode", "kthvalue"), chosen),
    **dict.fromkeys(("sort", "topk", "cummax", "cummin"), chosen),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    "attrib::padded_lstm": padded_recurrent,
}

# CD-T: as ``RULES``, but for the functions of one number and layer norm.
TRANSFORMER_RULES: Mapping[str, Rule] = {
    **RULES,
    **{name: rules_transformer.activation for name, rule in RULES.items() if rule is function},
    "pow": rules_transformer.power,
    "layer_norm": rules_transformer.layer_norm,
}

# The arguments of which only the whole counts, as that of a constant: what divides (as the deviation in a norm does),
# and places that the net looks at.
READ_WHOLE: Mapping[str, tuple[str, ...]] = {
    "div": ("other",), "addcdiv": ("tensor2",), "grid_sampler_2d": ("grid",), "grid_sampler_3d": ("grid",),
}  # fmt: skip
