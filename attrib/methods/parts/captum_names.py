"""What the package captum has: its algorithms by name, their arguments, and what of both cannot be used here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from captum import attr

from attrib.types import UserError, did_you_mean

REFUSED: Mapping[str, str] = {  # what neither the signature nor a run tells, and what does the same
    "FeaturePermutation": "exchanges a feature among the samples of a batch, so a sample has no map of its own; take "
    "FeatureAblation",
    "LayerFeaturePermutation": "exchanges a feature among the samples of a batch, so a sample has no map of its own; "
    "take LayerFeatureAblation",
    "NeuronDeepLift": "reports no error of completeness, by which activations would show that captum does not see; "
    "take DeepLift, or NeuronIntegratedGradients",
    **dict.fromkeys(
        ("DeepLiftShap", "LayerDeepLiftShap", "NeuronDeepLiftShap"),
        "needs several baselines, which are no plain value; take DeepLift, LayerDeepLift or method=deep_lift_shap",
    ),
}
OURS = (  # set by attrib, how many rows go through the net at a time among them
    "forward_func", "model", "layer", "inputs", "inp", "target", "additional_forward_args", "feature_mask",
    "perturbations_per_eval", "internal_batch_size", "nt_samples_batch_size", "show_progress", "verbose", "device_ids",
    "return_convergence_delta", "return_input_shape", "attribute_to_layer_input",
)  # fmt: skip
OBJECTS = (  # what no plain value stands for
    "attr_method", "tokenizer", "dataloader", "interpretable_model", "similarity_func", "perturb_func", "perm_func",
    "from_interp_rep_transform", "to_interp_rep_transform", "custom_attribution_func", "grad_kwargs", "layer_mask",
)  # fmt: skip


def named(name: str) -> Any:
    """The class of captum with this name. Raises UserError for one that there is not, or that is refused."""
    known = {k: v for k, v in vars(attr).items() if inspect.isclass(v) and callable(getattr(v, "attribute", None))}
    if name not in known:
        usable = sorted(known.keys() - REFUSED.keys())
        hint = did_you_mean(name, usable)
        raise UserError(f"captum has no algorithm {name!r}{hint} (it has: {', '.join(usable)})")
    if name in REFUSED:
        raise UserError(f"captum's {name} cannot be used here: it {REFUSED[name]}")
    return known[name]


def signature(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if name != "self" and p.kind not in variable}


def tuples(value: Any) -> Any:
    return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
