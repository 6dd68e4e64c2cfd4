"""The decomposition of many samples under many masks each, computed in chunks and checked."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.decomposition.graph import Decomposer
from attrib.models import Classifier
from attrib.types import SampleError

# The error that rounding may cause; a rule that is not complete causes one that is orders of magnitude larger.
_TOLERANCE = {torch.float64: 1e-9}
_TOLERANCE_ELSE = 1e-4


class Decomposition(NamedTuple):
    """relevant + irrelevant = logits, for every mask. N samples, M masks each, K classes."""

    relevant: Tensor  # (N, M, K); (R, K) where ``samples`` was given
    irrelevant: Tensor  # of the same shape
    logits: Tensor  # (N, K); without the last layer's bias for ``output_bias=False``
    error: Tensor  # (N,) the largest |relevant + irrelevant - logits|, as a fraction of the sample's largest |logit|


@torch.no_grad()
def decompose(
    model: Classifier,
    x: Tensor,
    masks: Tensor,
    *,
    samples: Tensor | None = None,
    decomposer: Decomposer | None = None,
    logits: Tensor | None = None,
    both: bool = False,
    checks: int = 1,
    tolerance: float | None = None,
) -> Decomposition:
    """The relevant and irrelevant parts of the logits of x (N, *input) under masks (N, M, *places).

    At most ``model.rows`` masks go through the net at once; what all masks of a sample have in common (the ordinary
    forward pass) is computed once per chunk.

    samples     (R,) the row of x that each mask belongs to; masks are then (R, *places), in any order, and their
                number may differ between samples
    decomposer  ``Decomposer(model)`` if None
    logits      (N, K) ``model.logits(x)``, if they are known already
    both        propagate the irrelevant part of every mask on its own, with the rounding of the authors' code, at
                2 to 3 times the cost. Where max-pooling has several equal maxima (a constant background), that
                rounding decides which of them counts; otherwise the first one does.
    checks      for how many masks per sample the irrelevant part is also propagated on its own, to measure
                ``error``: those that cover nearest to half of the input. (Without it the parts always add up,
                whatever the rules are.)
    tolerance   the largest ``error`` that is accepted; by default 1e-9 for a net that computes in float64
                throughout, else 1e-4

    Raises SampleError, which gives the error, if it is above the tolerance; UserError for an operation without a
    rule; ValueError for masks that do not fit the samples.
    """
    decomposer = decomposer or Decomposer(model)
    shape: torch.Size | None = None
    if samples is None:
        shape = masks.shape[:2]
        samples = torch.arange(shape[0], device=x.device).repeat_interleave(shape[1])
        masks = masks.flatten(0, 1)
    samples = samples.to(x.device)
    if len(masks) != len(samples) or (shape is not None and shape[0] != len(x)):
        raise ValueError(f"{len(samples)} masks for {len(x)} samples do not match masks of shape {tuple(masks.shape)}")

    def parts(chosen: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        known = samples[chosen].cpu()  # once, as a device would have to be waited for by every piece

        def piece(rows: slice) -> tuple[Tensor, Tensor]:
            index = chosen[rows]
            used, own = _distinct(samples[index], len(known[rows].unique()))
            found = decomposer.rows(x[used], masks[index.to(masks.device)].to(x.device), own, both)
            return found[0].to(model.dtype), found[1].to(model.dtype)  # as the logits are, whatever the net ends in

        return model.chunked(piece, len(chosen))

    logits = (model.logits(x) if logits is None else logits) - decomposer.constant(x)
    everything = torch.arange(len(samples), device=x.device)
    relevant, whole = parts(everything, both)
    irrelevant = whole - relevant
    errors = [(everything, relevant + irrelevant)]
    if not both and checks:
        chosen = _nearest_half(masks, samples, checks)
        errors.append((chosen, parts(chosen, True)[1]))
    error = torch.zeros(len(x), dtype=logits.dtype, device=x.device)
    for rows, total in errors:
        of = samples[rows]
        error = error.scatter_reduce(0, of, (total - logits[of]).abs().amax(1), "amax")
    error = error / logits.abs().amax(1).clamp(min=torch.finfo(logits.dtype).tiny)
    limit = tolerance if tolerance is not None else _TOLERANCE.get(decomposer.precision(x), _TOLERANCE_ELSE)
    errors_of = error.tolist()
    worst = max(range(len(x)), key=lambda i: math.inf if math.isnan(errors_of[i]) else errors_of[i])
    if not errors_of[worst] <= limit:
        raise SampleError(
            f"contextual decomposition is not complete: relevant + irrelevant differs from the logits by "
            f"{errors_of[worst]:.2g} of the largest (more than {limit:g}; sample {worst} of {len(x)}), "
            "so either a rule of attrib/decomposition is wrong for this net, or the net needs run.dtype=float64"
        )
    if shape is not None:
        relevant, irrelevant = relevant.unflatten(0, shape), irrelevant.unflatten(0, shape)
    return Decomposition(relevant, irrelevant, logits, error)


def _distinct(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(R,), with ``count`` different values -> these, in ascending order, and for each row which one it has.

    ``unique`` on the CPU would have to be copied to the device, and on a device it is waited for.
    """
    ascending, order = values.sort(stable=True)
    number = F.pad(ascending.diff() != 0, (1, 0)).cumsum(0)
    return ascending.new_empty(count).scatter_(0, number, ascending), torch.empty_like(order).scatter_(0, order, number)


def _nearest_half(masks: Tensor, samples: Tensor, n: int) -> Tensor:
    """The indices of the n masks of each sample that cover nearest to half of it."""
    distance = (masks.flatten(1).mean(1, dtype=torch.float32).to(samples.device) - 0.5).abs()
    order = distance.argsort(stable=True)
    order = order[samples[order].argsort(stable=True)]  # by sample, then by distance
    own = samples[order]
    first = torch.searchsorted(own, own)  # where each sample's masks begin
    return order[torch.arange(len(own), device=own.device) - first < n]
