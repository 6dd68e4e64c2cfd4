"""Functional (Fisher) information, and SmoothGrad and VarGrad from the same draws.

Gat, Calderon, Reichart & Hazan, *A Functional Information Perspective on Model Interpretation*, ICML 2022.
For a positive function f of an input z ~ N(x, S) the log-Sobolev inequality bounds the functional entropy,

    Ent(f) = E[f log f] - E[f] log E[f]  <=  1/2 E[ <S grad f, grad f> / f ] = 1/2 I(f),

and the information I(f) is a sum over features, whose terms are the map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.covariance import Covariance, Spread
from attrib.methods.parts.fisher_sets import Sets, hierarchy
from attrib.methods.parts.inputs import EMBEDDING, Inputs, Reduce
from attrib.methods.parts.perturbed import ACTIVATIONS, Activation, Draws, Mean, Outputs, Perturbations
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Partition

ABOUT = {
    "functional_information": "mean of (df/dx)^2 / f over the noise: information per unit of variance, >= 0",
    "covariance_functional_information": "mean of (S grad f) * grad f / f: information, signed; its sum is >= 0",
    "set_information": "information of the place's unit given all others, divided equally among its places, >= 0",
    "covariance_gradients": "mean of S grad f over the noise, signed",
    "smooth_grad": "mean of df/dx over the noise, signed",
    "smooth_grad_sq": "mean of (df/dx)^2 over the noise, >= 0",
    "var_grad": "variance of df/dx over the noise, >= 0",
}
SIGNED = ("covariance_gradients", "smooth_grad")
POINTS = 20  # of the curves over the number of draws
FIRST = 10  # draws at the first point


@dataclass(frozen=True)
class FunctionalInformation(Method):
    """Measures of the gradient of f, the target's output, at noisy copies of the input.

    measures    names in ``ABOUT``; all are computed from the same draws
    samples     the largest number of draws
    var_spread  the covariance of the noise is this times S. The formulas have S itself, as in the paper's code: for
                the information of the noise's own distribution, multiply by ``var_spread``
    covariance  S, see ``Covariance``. By default it is not that of the data, but each sample's own variance
    activation  what f is: a probability ("softmax"), its logarithm ("log_softmax"), or a logit ("none"). Information
                is defined for functions of one sign and is that of \\|f\\|, for log_softmax of the surprisal. For
                logits that change their sign it has no meaning
    channels    each: every channel (number of a token's vector) is a feature, and a place gets the sum over them.
                summed: gradients are summed over channels first, as in the released code; where a LayerNorm follows
                the embedding, as in BERT, that sum is always zero
    reduce      for signed measures with channels=each: how channels become one map
    labels      "target" for that alone; or other classes beside it: "all", the k most probable (a number), or a
                list. The map is always the target's; theirs are in ``<measure>_by_label``
    tolerance   a sample needs no more draws when the relative standard error of all its maps is at most this; None:
                always ``samples`` draws
    units       for ``set_information``: the sets
    levels      for ``set_information``: if above 1, the sum over this many levels of units, see ``hierarchy``
    as_released channels=summed, the variance of *squared* gradients for VarGrad, and f with its sign

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> list(attrib.explain(net, x, method=FunctionalInformation(samples=2)).maps)
    ['functional_information']
    """

    NAME: ClassVar[str] = "attrib.methods.fisher.FunctionalInformation"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    measures: tuple[str, ...] = ("functional_information",)
    samples: int = 100
    var_spread: float = 0.15
    covariance: Covariance = field(default_factory=Covariance)
    activation: Activation = "softmax"
    channels: Literal["each", "summed"] = "each"
    reduce: Reduce = "sum"
    labels: Literal["target", "all"] | int | tuple[int, ...] = "target"
    tolerance: float | None = None
    units: Partition = field(default_factory=Partition)
    levels: int = 1
    as_released: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "measures", tuple(self.measures))  # YAML has lists
        if isinstance(self.labels, list):
            object.__setattr__(self, "labels", tuple(self.labels))

        twice = len(set(self.measures)) < len(self.measures)
        if not self.measures or twice or not set(self.measures) <= set(ABOUT):
            raise UserError(
                f"FunctionalInformation.measures is {self.measures}, must be a list, without repetition, "
                f"of {', '.join(ABOUT)}"
            )
        require(self, "samples", at_least=2)
        require(self, "var_spread", above=0)
        require(self, "activation", one_of=ACTIVATIONS)
        require(self, "channels", one_of=("each", "summed"))
        require(self, "reduce", one_of=get_args(Reduce))
        require(self, "tolerance", above=0, or_none=True)
        require(self, "levels", at_least=1)
        if isinstance(self.labels, str):
            good = self.labels in ("target", "all")
        elif isinstance(self.labels, tuple):
            good = bool(self.labels) and all(type(label) is int and label >= 0 for label in self.labels)
        else:
            good = type(self.labels) is int and self.labels > 0
        if not good:
            raise UserError(
                f"FunctionalInformation.labels is {self.labels!r}, must be target, all, a number of labels, "
                "or a list of labels"
            )

    # ---- what it declares -----------------------------------------------------------------------

    @property
    def MAPS(self) -> Mapping[str, str]:  # noqa: N802  as in ``Method``
        return {name: ABOUT[name] for name in self.measures}

    @property
    def EXTRAS(self) -> Mapping[str, str]:  # noqa: N802
        found = {"draws": "number of noisy copies that were drawn"}
        for name in self.measures:
            found[f"stderr_{name}"] = "standard error over the draws of the map, place by place"
            found[f"error_{name}"] = "x: draws; y: relative standard error"
        if self.labels != "target":
            found["labels"] = "the classes that <measure>_by_label explains"
            found |= {
                f"{name}_by_label": "the map of each of these labels, (*places, labels)" for name in self.measures
            }
        return found

    @property
    def TOKENS(self) -> tuple[str, ...]:  # noqa: N802
        more = () if self.labels == "target" else tuple(f"{name}_by_label" for name in self.measures)
        return (*(f"stderr_{name}" for name in self.measures), *more)

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.activation != "none" or isinstance(self.labels, int)

    @property
    def CONTRASTS(self) -> bool:  # noqa: N802
        return not self.covariance.per_class

    @property
    def fit(self) -> Covariance | None:
        return self.covariance if self.covariance.fitted else None

    @property
    def counts(self) -> list[int]:
        """The numbers of draws at which the curves ``error_*`` have points, and at which a sample may be finished."""
        first = min(self.samples, FIRST)
        points = min(POINTS, self.samples - first + 1)
        return [first + round(i * (self.samples - first) / max(1, points - 1)) for i in range(points)]

    # ---- computation ------------------------------------------------------------------------------

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        labels = self._labels(model, batch)
        outputs = Outputs(self.activation, batch.target, labels, model.link)
        spread = self.covariance.of(batch, inputs, state)
        sets = Sets(spread, hierarchy(self.units, self.levels, batch)) if "set_information" in self.measures else None
        terms = _Terms(self, spread, sets, text=inputs.mask is not None)
        measures = {name: _Measure(self, name, terms, outputs.count, inputs.x) for name in self.measures}

        source = Perturbations(model, inputs, outputs, spread, self.var_spread, noise)
        at, drawn = torch.arange(len(batch), device=inputs.x.device), 0
        draws = torch.zeros(len(batch), dtype=torch.long, device=inputs.x.device)
        errors: dict[str, list[Tensor]] = {name: [] for name in measures}
        for count in self.counts:
            while len(at) and drawn < count:
                found = source.draw(at, min(count - drawn, source.most(len(at))))
                for measure in measures.values():
                    measure.add(at, found)
                drawn += found.sign.shape[1]
                del found
            draws[at] = drawn
            done = torch.ones_like(draws, dtype=torch.bool)
            for name, measure in measures.items():
                errors[name].append(measure.relative_error())
                done &= errors[name][-1] <= (self.tolerance or -1)
            if self.tolerance:
                at = at[~done[at]]

        result = {"draws": draws.to(inputs.x.dtype)}
        if self.labels != "target":
            result["labels"] = labels.to(inputs.x.dtype)
        for name, measure in measures.items():
            maps = measure.map
            result |= {name: maps[:, 0], f"stderr_{name}": measure.error, f"error_{name}": torch.stack(errors[name], 1)}
            if self.labels != "target":
                result[f"{name}_by_label"] = maps[:, 1:].movedim(1, -1)
        return result

    def _labels(self, model: Classifier, batch: Batch) -> Tensor:
        """(B, L) the classes to explain beside the target."""
        if self.labels == "target":
            return torch.empty(len(batch), 0, dtype=torch.long, device=batch.x.device)
        logits = model.logits(batch.x)
        classes = logits.shape[1]
        if isinstance(self.labels, int):
            if self.labels > classes:
                raise UserError(f"FunctionalInformation.labels is {self.labels}, but the net has {classes} classes")
            return logits.topk(self.labels, 1).indices
        wanted = tuple(range(classes)) if self.labels == "all" else self.labels
        if max(wanted) >= classes:
            raise UserError(f"FunctionalInformation.labels: no class {max(wanted)}, the net has {classes}")
        return torch.tensor(wanted, device=batch.x.device).expand(len(batch), -1)


class _Terms:
    """The terms whose mean over the draws is a measure: (b, d, L, *places), or for signed measures (b, d, L, *x)."""

    def __init__(self, method: FunctionalInformation, spread: Spread, sets: Sets | None, text: bool) -> None:
        self.spread, self.sets, self.text, self.as_released = spread, sets, text, method.as_released
        self.summed = method.channels == "summed" or method.as_released

    def over_channels(self, value: Tensor) -> Tensor:
        """Summed over channels, which vectors (B, D) do not have."""
        return value.sum(-1) if self.text else value.sum(3) if value.ndim > 4 else value

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.summed:
            return self.over_channels(a) * self.over_channels(b)
        return self.over_channels(a * b)

    def signed(self, value: Tensor, sign: Tensor) -> Tensor:
        return value * sign.view(*sign.shape, *[1] * (value.ndim - 3)) if self.as_released else value

    def functional_information(self, draws: Draws, at: Tensor) -> Tensor:
        return self.signed(self.product(draws.score, draws.score), draws.sign)

    def covariance_functional_information(self, draws: Draws, at: Tensor) -> Tensor:
        return self.signed(self.product(self.spread.apply(draws.score, at), draws.score), draws.sign)

    def set_information(self, draws: Draws, at: Tensor) -> Tensor:
        assert self.sets is not None  # as this is one of the measures
        local = None
        if self.spread.independent:
            local = self.over_channels(self.spread.apply(draws.score, at) * draws.score)
        return self.sets.of(draws.score, local, at)

    def covariance_gradients(self, draws: Draws, at: Tensor) -> Tensor:
        return self.spread.apply(draws.grad, at)

    def smooth_grad(self, draws: Draws, at: Tensor) -> Tensor:
        return draws.grad

    def smooth_grad_sq(self, draws: Draws, at: Tensor) -> Tensor:
        return self.product(draws.grad, draws.grad)


class _Measure:
    """One measure of all samples and labels, as its mean over the draws so far."""

    def __init__(self, method: FunctionalInformation, name: str, terms: _Terms, labels: int, x: Tensor) -> None:
        self.name, self.terms = name, terms
        self.reduce = "sum" if terms.summed else method.reduce
        self.whole = name in SIGNED and self.reduce != "sum"  # keep all channels: abs comes after the mean
        probe = x.new_zeros(len(x), 1, labels, *x.shape[1:])
        places = terms.over_channels(probe)
        self.total = Mean((probe if self.whole else places)[:, 0].shape, x)
        squared = name == "var_grad"
        # Mean of that whose variance VarGrad is.
        self.centre = Mean((places if terms.summed else probe)[:, 0].shape, x) if squared else None
        self.drawn = 0  # of each sample that is not finished

    def add(self, at: Tensor, draws: Draws) -> None:
        if self.centre is not None:
            self.total.add(at, self._increments(self.centre, at, draws.grad))
            self.drawn += draws.grad.shape[1]
            return
        found: Callable[[Draws, Tensor], Tensor] = getattr(self.terms, self.name)
        value = found(draws, at)
        signed = self.name in SIGNED and not self.whole
        self.total.add(at, self.terms.over_channels(value) if signed else value)

    def _increments(self, centre: Mean, at: Tensor, grad: Tensor) -> Tensor:
        """Welford's increments: (i - 1) / i times the squared distance of draw i from the mean of those before it.

        The unbiased variance of n draws is the mean of n - 1 increments, and the expectation of each is the
        variance. So VarGrad is a mean over draws like the other measures, and has a standard error like theirs.
        """
        terms = self.terms
        value = terms.over_channels(grad) if terms.summed else grad
        value = value.square() if terms.as_released else value
        n, d = self.drawn, value.shape[1]
        before = centre.mean[at].unsqueeze(1)
        away = value - before
        i = torch.arange(n + 1, n + d + 1, device=grad.device, dtype=grad.dtype).view(-1, *[1] * (value.ndim - 2))
        # The mean of all earlier draws, relative to ``before``.
        shift = (away.cumsum(1) - away) / (i - 1).clamp(min=1)
        squares = (away - shift).square() * ((i - 1) / i)
        centre.add(at, value)
        squares = squares if terms.summed else terms.over_channels(squares)
        return squares[:, 1:] if n == 0 else squares

    def _reduced(self, value: Tensor, chosen: Tensor) -> Tensor:
        """(B, L, *x) -> (B, L, *places): \\|value\\| summed over channels, or where \\|chosen\\| is largest."""
        if not self.whole or (not self.terms.text and value.ndim < 4):
            return value.abs() if self.whole else value
        channels = -1 if self.terms.text else 2
        if self.reduce == "abs_sum":
            return value.abs().sum(channels)
        return value.abs().gather(channels, chosen.abs().argmax(channels, keepdim=True)).squeeze(channels)

    @property
    def map(self) -> Tensor:
        """(B, L, *places)"""
        return self._reduced(self.total.mean, self.total.mean)

    @property
    def error(self) -> Tensor:
        """(B, *places) standard error of the target's map; for abs_sum an upper bound, the sum over the channels."""
        return self._reduced(self.total.error, self.total.mean)[:, 0]

    def relative_error(self) -> Tensor:
        """(B,) root mean square of the standard error, divided by that of the map; 0 for a map of zeros."""
        error, size = (v.flatten(1).norm(dim=1) for v in (self.error, self.map[:, 0]))
        return torch.where(size > 0, error / size.where(size > 0, 1), 0)
