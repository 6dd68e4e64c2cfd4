"""The usual attribution methods, computed by captum, with the promises that every method of attrib makes.

This module adds what captum leaves to its caller: noise from each sample's own stream, no more
rows at a time than the model allows, signed maps (B, H, W), and nets whose activations are shared
between layers, are functions instead of modules, or are of a class that captum does not know.

All methods explain the target's logit (several labels: the sum of their logits). ``reduce`` says how
channels become one map: "sum" keeps the sign and the method's completeness; "abs_max", the largest
absolute value, is what Simonyan et al. show; "abs_sum" is the L1 norm.

The input of a text is its embedded tokens (see ``parts.inputs``): the channels are the numbers of a
token's vector, and the map is (B, T). The plain sum of a token's gradient says little, and where a
LayerNorm follows the embedding, as in BERT, it is always zero. So take reduce=abs_sum or abs_max
for Gradient and SmoothGrad on texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.cam import GradCAM as GradCAM  # where it stood before its family had a home of its own
from attrib.methods.parts.inputs import EMBEDDING, Inputs, Reduce
from attrib.methods.parts.losses import target_score
from attrib.methods.parts.propagation import Rule, deconvolution, guided, relus
from attrib.methods.parts.rescale import check_complete, deep_lift
from attrib.models import Classifier
from attrib.models.graph import check_same
from attrib.noise import Noise
from attrib.types import Batch, UserError


def _check_baseline(owner: object, value: object) -> None:
    """Raises UserError unless the field ``baseline`` of ``owner`` is a finite number or "mean"."""
    if value == "mean":
        return
    if isinstance(value, str):
        raise UserError(f"{type(owner).__name__}.baseline is {value!r}, must be a finite number or mean")
    require(owner, "baseline")


@dataclass(frozen=True)
class Random(Method):
    """Uniform noise on [0, 1), which every method must beat.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=Random()).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.Random"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    MAPS: ClassVar[Mapping[str, str]] = {"map": "uniform on [0, 1), no information"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        if batch.mask is None:
            return {"map": noise.uniform(*batch.x.shape[2:])}
        return {"map": noise.uniform(batch.x.shape[1], ragged=0) * batch.mask}


@dataclass(frozen=True)
class Gradient(Method):
    """Gradient of the target's logit (Simonyan et al., 2014, section 3).

    >>> import attrib, torch
    >>> net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2, bias=False)), torch.rand(1, 1, 4, 4)
    >>> map = attrib.explain(net, x, 1, Gradient()).map
    >>> torch.allclose(map.flatten(), net[1].weight[1])
    True
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.Gradient"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "change of the logit per unit of input, signed"}
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        from captum import attr  # takes half a second to import

        inputs = Inputs.of(model, batch)
        method = attr.Saliency(inputs.score())

        def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
            return method.attribute(x, abs=False, additional_forward_args=args)

        return {"map": inputs.reduce(inputs.chunked(model, explain), self.reduce)}


@dataclass(frozen=True)
class InputXGradient(Method):
    """Input times gradient (Shrikumar et al., 2016). The input is the normalised image, or the embedded text.

    >>> import attrib, torch
    >>> net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2, bias=False)), torch.rand(1, 1, 4, 4)
    >>> map = attrib.explain(net, x, 1, InputXGradient()).map
    >>> torch.allclose(map.sum(), net(x)[0, 1], atol=1e-5)
    True
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.InputXGradient"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed"}
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        from captum import attr  # takes half a second to import

        inputs = Inputs.of(model, batch)
        method = attr.InputXGradient(inputs.score())

        def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
            return method.attribute(x, additional_forward_args=args)

        return {"map": inputs.reduce(inputs.chunked(model, explain), self.reduce)}


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """Gradients along the line from a constant baseline to the input (Sundararajan et al., 2017, eq. 1).

    steps      points of the Gauss-Legendre rule
    baseline   the value of all numbers of the baseline, in normalised units: 0 is the data's mean colour, or
               the zero vector for every token of a text. "mean": of images and sounds, the sample's mean per channel

    ``delta`` is the error of completeness: the sum of the map minus the change of the logit.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> found = attrib.explain(net, x, method=IntegratedGradients(steps=8))
    >>> found.map.shape, found.extras["delta"].shape
    (torch.Size([1, 32, 32]), torch.Size([1]))
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.IntegratedGradients"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the change of the logit"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"delta": "error of completeness, logit units"}
    steps: int = 50
    baseline: float | Literal["mean"] = 0.0
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "steps", at_least=1)
        _check_baseline(self, self.baseline)
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        baseline = inputs.constant(self.baseline)
        way, total, done = inputs.x - baseline, torch.zeros_like(inputs.x), 0
        places, weights = np.polynomial.legendre.leggauss(self.steps)  # between -1 and 1, with a sum of 2
        places, weights = (1 + places) / 2, (weights / 2).astype(np.float32)  # which captum rounds, too
        while done < self.steps:  # as many steps of all samples at a time as the rows allow
            some = slice(done, done + max(1, model.rows // len(batch)))
            on_the_way = torch.stack([baseline + place * way for place in places[some].tolist()], 1)
            for grad, weight in zip(inputs.gradients(model, on_the_way).unbind(1), weights[some].tolist(), strict=True):
                total += grad * weight
            done += on_the_way.shape[1]
        found = inputs.real(total * way)
        start, end = inputs.scores(model, torch.cat((inputs.x, baseline))).chunk(2)
        return {"map": inputs.reduce(found, self.reduce), "delta": found.flatten(1).sum(1) - (start - end)}


@dataclass(frozen=True)
class SmoothGrad(Method):
    """Mean gradient over noisy copies of the input (Smilkov et al., 2017).

    samples   noisy copies
    sigma     standard deviation of the noise as a share of each image's range (the paper's noise level), or of
              the range of a text's embedded tokens

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=SmoothGrad(samples=2)).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.SmoothGrad"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "change of the logit per unit of input, signed, mean over noise"}
    samples: int = 25
    sigma: float = 0.15
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "samples", at_least=1)
        require(self, "sigma", at_least=0)
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        sigma = (self.sigma * inputs.spread()).view(-1, *[1] * (inputs.x.ndim - 1))
        total, drawn = torch.zeros_like(inputs.x), 0
        while drawn < self.samples:  # as many draws of the whole batch at a time as the rows allow
            count = min(max(1, model.rows // len(batch)), self.samples - drawn)
            noisy = torch.stack([inputs.x + sigma * inputs.normal(noise) for _ in range(count)], 1)
            for grad in inputs.gradients(model, noisy).unbind(1):
                total += grad
            drawn += count
        return {"map": inputs.reduce(total / self.samples, self.reduce)}


def _through_relus(rule: Rule, what: str, reduce: Reduce, model: Classifier, batch: Batch) -> Tensor:
    """(B, H, W): the gradient by a rule for ReLUs. Raises UserError on a net without any."""
    net, inputs = relus(model), Inputs.of(model, batch)
    model.check_gradient(batch.x)

    def piece(rows: slice) -> tuple[Tensor, Tensor]:
        if not net.found(batch.x[rows]):
            name, others = type(model.module).__name__, net.others(batch.x[rows])
            has = f" (but {', '.join(others)})" if others else ""
            raise UserError(f"{what} is defined for ReLUs; {name} has none{has}. Take method=gradient, say")
        with torch.enable_grad():
            x = batch.x[rows].detach().requires_grad_()
            logits = net(x.clone(), rule)
            (found,) = torch.autograd.grad(target_score(logits, batch.target[rows]).sum(), x)
        return found, logits.detach()

    found, logits = model.chunked(piece, len(batch.x))
    check_same(model.module, logits, model.logits(batch.x))
    return inputs.reduce(found, reduce)


@dataclass(frozen=True)
class GuidedBackprop(Method):
    """Gradient whose negative parts are set to zero at every ReLU (Springenberg et al., 2015).

    What counts as a ReLU is what computes one, or a multiple of it, however it is written: also a clamp, threshold or
    maximum at zero, x * (x > 0), (x + |x|) / 2. So does one with a ceiling, such as ReLU6; where it is cut off, nothing
    passes.
    Raises UserError on a net without ReLUs, where the method is not defined.
    Images only: the nets of texts have gates and GELUs, not ReLUs.

    >>> import attrib, torch
    >>> layers = torch.nn.Flatten(), torch.nn.Linear(16, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
    >>> attrib.explain(torch.nn.Sequential(*layers), torch.rand(1, 1, 4, 4), method=GuidedBackprop()).map.shape
    torch.Size([1, 4, 4])
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.GuidedBackprop"
    VERSION: ClassVar[int] = 4
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "guided gradient, signed"}
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        return {"map": _through_relus(guided, "guided backpropagation", self.reduce, model, batch)}


@dataclass(frozen=True)
class Deconvolution(Method):
    """Backward pass in which every ReLU applies a ReLU to the signal instead of its own gradient
    (Zeiler & Fergus, 2014, section 2.1; described as a gradient by Simonyan et al., 2014, section 4).

    Max-poolings send the signal to where their maximum was, as the paper's switches do. Other than in
    guided backpropagation, it does not matter which ReLUs were active in the forward pass, so the map
    depends little on the target (Nie et al., 2018). What counts as a ReLU is the same as there; a ceiling,
    as that of ReLU6, does not matter either. Raises UserError on a net without ReLUs. Images only.

    >>> import attrib, torch
    >>> layers = torch.nn.Flatten(), torch.nn.Linear(16, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
    >>> attrib.explain(torch.nn.Sequential(*layers), torch.rand(1, 1, 4, 4), method=Deconvolution()).map.shape
    torch.Size([1, 4, 4])
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.Deconvolution"
    VERSION: ClassVar[int] = 3
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "signal at the input, signed"}
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        return {"map": _through_relus(deconvolution, "deconvolution", self.reduce, model, batch)}


@dataclass(frozen=True)
class DeepLiftShap(Method):
    """DeepLIFT (rescale rule) averaged over baselines (Lundberg & Lee, 2017, section 4.2).

    The baselines are ``samples`` noise images N(0, sigma^2) in normalised units, from each sample's
    own stream; with samples=1 and sigma=0 this is DeepLIFT with the mean colour as baseline.
    The rules are in ``attrib.methods.parts.rescale_rules``. A net with a call that none of them covers is refused.
    Every rule is complete, so the map sums to the change of the logit; ``delta`` is by how much it does not, and a
    sample for which that is more than rounding fails. Images only.

    >>> import attrib, torch
    >>> net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), torch.rand(1, 1, 4, 4)
    >>> attrib.explain(net, x, method=DeepLiftShap(), fit=torch.rand(3, 1, 4, 4)).map.shape
    torch.Size([1, 4, 4])
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.DeepLiftShap"
    VERSION: ClassVar[int] = 4
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the change of the logit"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"delta": "error of completeness, logit units, >= 0"}
    COLUMNS: ClassVar[Mapping[str, str]] = {"delta": "lower"}
    samples: int = 5
    sigma: float = 0.5
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "samples", at_least=1)
        require(self, "sigma", at_least=0)
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        total = torch.zeros_like(batch.x)
        change, most = torch.zeros_like(batch.x[:, 0, 0, 0]), torch.zeros_like(batch.x[:, 0, 0, 0])
        logits = model.logits(batch.x)
        got: list[Tensor] = []
        wanted: list[Tensor] = []
        for _ in range(self.samples):
            baseline = self.sigma * inputs.normal(noise)

            def piece(rows: slice, base: Tensor = baseline) -> tuple[Tensor, Tensor, Tensor]:
                return deep_lift(model, batch.x[rows], base[rows], batch.target[rows])

            found, end, start = model.chunked(piece, len(batch.x), cost=2)
            got += end, start
            wanted += logits, model.logits(baseline)
            total += found / self.samples
            change += (target_score(end, batch.target) - target_score(start, batch.target)) / self.samples
            most = most.maximum(found.flatten(1).abs().sum(1))
        check_same(model.module, torch.cat(got), torch.cat(wanted))
        delta = (total.flatten(1).sum(1) - change).abs()
        check_complete(batch.uids, delta, most, "DeepLIFT")
        return {"map": inputs.reduce(total, self.reduce), "delta": delta}


@dataclass(frozen=True)
class Occlusion(Method):
    """Fall of the logit when a square is covered (Zeiler & Fergus, 2014); at each pixel the mean over its squares.

    In sounds a stretch of time is covered, in texts one token at a time, for which window and stride do not matter.

    window, stride   side of the square and its step, in pixels; for sounds, in samples
    baseline         the value that covers, in normalised units: 0 is the data's mean colour, or the zero vector
                     for a token of a text. "mean": of images and sounds, the sample's mean per channel

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=Occlusion(window=16, stride=16)).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.Occlusion"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "fall of the logit, signed"}
    window: int = 32
    stride: int = 16
    baseline: float | Literal["mean"] = 0.0

    def __post_init__(self) -> None:
        require(self, "window", "stride", at_least=1)
        _check_baseline(self, self.baseline)
        if self.stride > self.window:
            raise UserError(f"Occlusion.stride is {self.stride}, must not be larger than window, {self.window}")

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        from captum import attr  # takes half a second to import

        inputs = Inputs.of(model, batch)
        method = attr.Occlusion(inputs.score())
        window, step = self._window(inputs)
        own = inputs.constant("mean") if self.baseline == "mean" else None
        spans = zip(inputs.x.shape[1:], window, step, strict=True)
        places = math.prod(max(0, -(-(side - w) // s)) + 1 for side, w, s in spans)

        def explain(x: Tensor, args: tuple[Tensor, ...], samples: slice) -> Tensor:
            return method.attribute(
                x,
                sliding_window_shapes=window,
                strides=step,
                baselines=self.baseline if own is None else own[samples],
                additional_forward_args=args,
                perturbations_per_eval=max(1, model.rows // len(x)),
            )

        # All channels are covered at once, so they all get the same value.
        found = inputs.chunked(model, explain, cost=places + 1)
        return {"map": found[:, 0] if inputs.mask is None else inputs.real(found[..., 0])}

    def _window(self, inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Size and step of what is covered, along every dimension of x without B."""
        if inputs.mask is not None:
            return (1, inputs.x.shape[2]), (1, inputs.x.shape[2])
        channels, *size = inputs.x.shape[1:]
        if self.window > min(size):
            raise UserError(f"Occlusion.window is {self.window}, must not be larger than the input, {tuple(size)}")
        return (channels, *(self.window for _ in size)), (channels, *(self.stride for _ in size))
