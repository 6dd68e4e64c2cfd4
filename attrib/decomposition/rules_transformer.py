"""The rules of CD-T, contextual decomposition for transformers, where they differ from the others.

Hsu, Zhou, Cherapanamjeri, Huang, Odisho, Carroll & Yu, *Efficient Automated Circuit Discovery in Transformers using
Contextual Decomposition*, ICLR 2025 (arXiv 2407.00886), as its code has them (github.com/adelaidehsu/CD_Circuit,
pyfunctions/cdt_core.py and cdt_basic.py). What is the same there and here: attention weights are those of the whole and
count as constants; each part is centred and divided by the deviation of the whole; biases of linear layers are shared
out in proportion. That code also lets the larger part take all wherever the two have opposite signs, after each step of
BERT's blocks; this belongs to its loops over layers and is not done here.
"""

from __future__ import annotations

from attrib.decomposition import rules_pointwise
from attrib.decomposition.call import Call
from attrib.decomposition.rules_norm import normed_layer
from attrib.decomposition.values import TensorPair, proportion


def activation(call: Call) -> TensorPair:
    """irrelevant -> f(irrelevant), relevant -> f(whole) - f(irrelevant): ``prop_act``, for GELU, tanh and all others.

    The mirror image of ``rules_pointwise.activation``: the relevant part gets what it adds to the other.
    """
    other = call.irrelevant()
    like = TensorPair(other, call.whole(), call.rows)
    relevant = like.spread(like.whole) - other
    return call.rows.sum(relevant, other) if call.rows.both else call.rows.pair(relevant, like.whole)


def power(call: Call) -> TensorPair:
    """``activation`` where that is defined."""
    return activation(call) if rules_pointwise.is_whole(call.args["exponent"]) else rules_pointwise.power(call)


def layer_norm(call: Call) -> TensorPair:
    """``prop_layer_norm``: the bias is shared out by the magnitudes of the parts before the norm, not after it."""
    normed, bias = normed_layer(call), call.args["bias"]
    if bias is None:
        return normed
    before = call.pairs[0]
    share = proportion(before.relevant, before.irrelevant)
    relevant = normed.relevant + share * bias
    if normed.other is not None:
        return call.rows.sum(relevant, normed.other + (1 - share) * bias)
    return call.rows.pair(relevant, normed.whole + bias)
