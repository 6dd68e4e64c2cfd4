"""The usual attribution methods, by captum, under attrib's contract.

captum computes; this module adds what it leaves to the caller: noise from each sample's own
stream, no more rows at a time than the model allows, maps (B, H, W) with their sign, and nets
whose activations are shared, functional or of a class captum does not know.

All explain the logit of the target (several labels: the sum of their logits). ``reduce`` says how
channels become one map: "sum" keeps the sign and the method's completeness; "abs_max" is what
Simonyan et al. draw; "abs_sum" is the L1 norm.

The input of a text is its embedded tokens (see ``inputs``): the channels are the numbers of a
token's vector, and the map is (B, T). The plain sum of a token's gradient says little, and exactly
nothing where a LayerNorm follows the embedding, as in BERT: there it is always zero. So take
reduce=abs_sum or abs_max for the gradient and SmoothGrad of texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from captum import attr
from torch import Tensor, nn

from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs, Reduce
from attrib.methods.parts.layout import resize
from attrib.methods.parts.propagation import hookable, without_overlap
from attrib.models import Classifier
from attrib.models.activations import ELEMENTWISE, RELU_LIKE
from attrib.noise import Noise
from attrib.types import Batch, UserError


def _check_fields(method: Any) -> None:
    """The ``__post_init__`` of the methods here. Raises UserError for a field that cannot be computed with."""
    name, fields = type(method).__name__, vars(method)
    reduce = fields.get("reduce", "sum")
    if reduce not in get_args(Reduce):
        raise UserError(f"{name}.reduce is {reduce!r}, must be one of {', '.join(get_args(Reduce))}")
    for field in ("steps", "samples", "stride"):
        if fields.get(field, 1) < 1:
            raise UserError(f"{name}.{field} is {fields[field]}, must be at least 1")
    if fields.get("stride", 0) > fields.get("window", 0):
        raise UserError(f"{name}.stride is {fields['stride']}, must not be larger than window, {fields['window']}")


@dataclass(frozen=True)
class Random(Method):
    """Uniform noise on [0, 1): what any method must beat."""

    NAME: ClassVar[str] = "attrib.methods.baselines.Random"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    MAPS: ClassVar[Mapping[str, str]] = {"map": "uniform on [0, 1), no information"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        if batch.mask is None:
            return {"map": noise.uniform(*batch.x.shape[2:])}
        return {"map": noise.uniform(batch.x.shape[1], ragged=0) * batch.mask}


@dataclass(frozen=True)
class Gradient(Method):
    """Gradient of the target's logit (Simonyan et al., 2014, section 3)."""

    NAME: ClassVar[str] = "attrib.methods.baselines.Gradient"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "change of the logit per unit of input, signed"}
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        method = attr.Saliency(inputs.score())

        def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
            return method.attribute(x, abs=False, additional_forward_args=args)

        return {"map": inputs.reduce(inputs.chunked(model, explain), self.reduce)}


@dataclass(frozen=True)
class InputXGradient(Method):
    """Input times gradient (Shrikumar et al., 2016); the input is the normalised image, or the embedded text."""

    NAME: ClassVar[str] = "attrib.methods.baselines.InputXGradient"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed"}
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        method = attr.InputXGradient(inputs.score())

        def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
            return method.attribute(x, additional_forward_args=args)

        return {"map": inputs.reduce(inputs.chunked(model, explain), self.reduce)}


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """Gradients along the line from a constant baseline to the input (Sundararajan et al., 2017, eq. 1).

    baseline   value of every (normalised) input of the baseline; 0 is the data's mean colour, or the zero
               vector for every token of a text
    steps      points of the Gauss-Legendre rule
    ``delta`` is the error of completeness: sum of the map minus the change of the logit.
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.IntegratedGradients"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the change of the logit"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"delta": "error of completeness, logit units"}
    steps: int = 50
    baseline: float = 0.0
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        method, baseline = attr.IntegratedGradients(inputs.score()), inputs.constant(self.baseline)

        def explain(x: Tensor, args: tuple[Tensor, ...], samples: slice) -> Tensor:
            return method.attribute(
                x,
                baselines=baseline[samples],
                additional_forward_args=args,
                n_steps=self.steps,
                internal_batch_size=max(model.rows, len(x)),
            )

        found = inputs.real(inputs.chunked(model, explain, cost=self.steps, least=1))
        start, end = inputs.scores(model, torch.cat((inputs.x, baseline))).chunk(2)
        return {"map": inputs.reduce(found, self.reduce), "delta": found.flatten(1).sum(1) - (start - end)}


@dataclass(frozen=True)
class SmoothGrad(Method):
    """Mean gradient over noisy copies of the input (Smilkov et al., 2017).

    sigma   standard deviation of the noise as a share of each image's range (the paper's noise level); of a
            text, the range of its embedded tokens
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.SmoothGrad"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "change of the logit per unit of input, signed, mean over noise"}
    samples: int = 25
    sigma: float = 0.15
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        method = attr.Saliency(inputs.score())
        sigma = (self.sigma * inputs.spread()).view(-1, *[1] * (inputs.x.ndim - 1))
        total = torch.zeros_like(inputs.x)
        for _ in range(self.samples):  # one draw of the whole batch at a time: memory does not grow with samples
            noisy = replace(inputs, x=inputs.x + sigma * inputs.normal(noise))

            def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
                return method.attribute(x, abs=False, additional_forward_args=args)

            total += noisy.chunked(model, explain)
        return {"map": inputs.reduce(total / self.samples, self.reduce)}


def _through_relus(method: Any, rule: type, what: str, model: Classifier, batch: Batch) -> Tensor:
    """(B, H, W): the gradient by one of captum's rules for ReLUs. Raises UserError on a net without any."""
    net = hookable(model, RELU_LIKE)
    if not any(isinstance(m, nn.ReLU) for m in net.modules()):
        raise UserError(f"{what} is defined for ReLUs; {type(model.module).__name__} has none")
    inputs = Inputs(batch.x, batch.target, net)
    by = rule(inputs.score())

    def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
        return by.attribute(x, additional_forward_args=args)

    return inputs.reduce(inputs.chunked(model, explain), method.reduce)


@dataclass(frozen=True)
class GuidedBackprop(Method):
    """Gradient with negative parts cut off at every ReLU (Springenberg et al., 2015).

    ReLU6 counts as a ReLU. Raises UserError on a net without ReLUs, where the method is not defined.
    Images only: the nets of texts have gates and GELUs, not ReLUs.
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.GuidedBackprop"
    VERSION: ClassVar[int] = 2
    MAPS: ClassVar[Mapping[str, str]] = {"map": "guided gradient, signed"}
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        return {"map": _through_relus(self, attr.GuidedBackprop, "guided backpropagation", model, batch)}


@dataclass(frozen=True)
class Deconvolution(Method):
    """The way back through the net with a ReLU of the signal in the place of a ReLU's own gradient
    (Zeiler & Fergus, 2014, section 2.1; as a gradient: Simonyan et al., 2014, section 4).

    Max-poolings send the signal to where their maximum was, as the paper's switches do. ReLUs do not
    look at what they let through on the way in; that is the difference to guided backpropagation, and
    why the map depends little on the target (Nie et al., 2018). ReLU6 counts as a ReLU. Raises
    UserError on a net without ReLUs. Images only.
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.Deconvolution"
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "signal at the input, signed"}
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        return {"map": _through_relus(self, attr.Deconvolution, "deconvolution", model, batch)}


@dataclass(frozen=True)
class DeepLiftShap(Method):
    """DeepLIFT (rescale rule) averaged over baselines (Lundberg & Lee, 2017, section 4.2).

    The baselines are ``samples`` noise images N(0, sigma^2) in normalised units, of each sample's
    own stream; with samples=1 and sigma=0 this is DeepLIFT with the mean colour as baseline.
    ``delta`` is the error of completeness; it is large on nets with operations that the rescale
    rule does not cover (attention, gates that multiply). Where captum alone is not complete
    (max-pooling behind a ReLU, windows that overlap, residuals around an activation), this is.
    Images only: the rule does not cover the gates of an LSTM, nor attention.
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.DeepLiftShap"
    VERSION: ClassVar[int] = 2
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the change of the logit"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"delta": "error of completeness, logit units"}
    samples: int = 5
    sigma: float = 0.5
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        net = without_overlap(hookable(model, ELEMENTWISE))
        inputs = Inputs(batch.x, batch.target, net)
        total, delta = torch.zeros_like(batch.x), torch.zeros_like(batch.x[:, 0, 0, 0])
        whole = Inputs.of(model, batch)
        for _ in range(self.samples):
            baseline = self.sigma * inputs.normal(noise)
            method = attr.DeepLift(inputs.score())

            def explain(x: Tensor, args: tuple[Tensor, ...], at: slice, base=baseline, by=method) -> Tensor:
                return by.attribute(x, baselines=base[at], additional_forward_args=args)

            found = inputs.chunked(model, explain, cost=2)
            ends = whole.scores(model, batch.x) - whole.scores(model, baseline)
            total += found
            delta += found.flatten(1).sum(1) - ends
        return {"map": inputs.reduce(total / self.samples, self.reduce), "delta": delta / self.samples}


@dataclass(frozen=True)
class GradCAM(Method):
    """Activations of the layer with role ``layer``, weighted by their mean gradients (Selvaraju et al., 2017).

    ``relu=False`` keeps what speaks against the class (negative values); the paper cuts it off.
    Images only: it needs a conv map.
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.GradCAM"
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, >= 0 unless relu=false, upsampled from the layer"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"cam": "the same at the layer's resolution, (h, w)"}
    layer: str = "cam"
    relu: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        method = attr.LayerGradCam(inputs.score(), model.layer(self.layer))

        def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
            cam = method.attribute(x, additional_forward_args=args, relu_attributions=self.relu)
            if cam.ndim != 4:
                raise UserError(
                    f"Grad-CAM needs a conv map (N, C, H, W); {model.path(self.layer)} gives something else"
                )
            return cam[:, 0]

        cam = inputs.chunked(model, explain)
        return {"map": resize(cam, tuple(batch.x.shape[-2:])), "cam": cam}


@dataclass(frozen=True)
class Occlusion(Method):
    """Fall of the logit when a square is covered (Zeiler & Fergus, 2014), mean over squares on a pixel.

    Of a sound a stretch of time is covered. Of a text, the fall when one token alone is replaced; it has no
    window and stride.

    window, stride   side of the square and its step, in pixels; of sounds, in samples
    baseline         value of the covering, in normalised units; 0 is the data's mean colour, or the zero
                     vector in the place of an embedded token
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.Occlusion"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "fall of the logit, signed"}
    window: int = 32
    stride: int = 16
    baseline: float = 0.0
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        method = attr.Occlusion(inputs.score())
        window, step = self._window(inputs)
        spans = zip(inputs.x.shape[1:], window, step, strict=True)
        places = math.prod(max(0, -(-(side - w) // s)) + 1 for side, w, s in spans)

        def explain(x: Tensor, args: tuple[Tensor, ...], _: slice) -> Tensor:
            return method.attribute(
                x,
                sliding_window_shapes=window,
                strides=step,
                baselines=self.baseline,
                additional_forward_args=args,
                perturbations_per_eval=max(1, model.rows // len(x)),
            )

        # Covering all channels at once, every channel gets the same value.
        found = inputs.chunked(model, explain, cost=places + 1)
        return {"map": found[:, 0] if inputs.mask is None else inputs.real(found[..., 0])}

    def _window(self, inputs: Inputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is covered at a time, and by how much it moves, along every dimension of x."""
        if inputs.mask is not None:
            return (1, inputs.x.shape[2]), (1, inputs.x.shape[2])
        channels, *size = inputs.x.shape[1:]
        if self.window > min(size):
            raise UserError(f"Occlusion.window is {self.window}, must not be larger than the input, {tuple(size)}")
        return (channels, *(self.window for _ in size)), (channels, *(self.stride for _ in size))
