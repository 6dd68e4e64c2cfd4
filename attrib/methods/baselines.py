"""The usual attribution methods, by captum, under attrib's contract.

captum computes; this module adds what it leaves to the caller: noise from each sample's own
stream, no more rows at a time than the model allows, maps (B, H, W) with their sign, and nets
whose activations are shared, functional or of a class captum does not know.

All explain the logit of the target (several labels: the sum of their logits). ``reduce`` says how
channels become one map: "sum" keeps the sign and the method's completeness; "abs_max" is what
Simonyan et al. draw; "abs_sum" is the L1 norm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from captum import attr
from torch import Tensor, fx, nn

from attrib.methods import Method, State
from attrib.methods.layout import resize
from attrib.methods.losses import target_score
from attrib.models import Classifier
from attrib.models.activations import ELEMENTWISE, RELU_LIKE, separated
from attrib.noise import Noise
from attrib.types import Batch, UserError

Reduce = Literal["sum", "abs_sum", "abs_max"]


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


class _Score(nn.Module):
    """(x, target) -> the target's score, as a module, because captum hooks modules."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return target_score(self.net(x), target)


@contextmanager
def _captum() -> Iterator[None]:
    """captum runs on inputs that need gradients, and warns of its own hooks at every call."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


def _over_channels(attribution: Tensor, reduce: Reduce) -> Tensor:
    """(B, C, H, W) -> (B, H, W)."""
    attribution = attribution.detach()
    if reduce == "sum":
        return attribution.sum(1)
    return attribution.abs().sum(1) if reduce == "abs_sum" else attribution.abs().amax(1)


def _chunked(
    model: Classifier,
    batch: Batch,
    explain: Callable[[Tensor, Tensor, slice], Tensor],
    cost: int = 1,
    least: int | None = None,
) -> Tensor:
    """``explain(x, target, samples)`` over pieces of the batch that fit the model's row limit."""

    def piece(samples: slice) -> Tensor:
        with _captum():
            return explain(batch.x[samples].clone(), batch.target[samples], samples).detach()

    return model.chunked(piece, len(batch), cost, least)


class _Windows(nn.Module):
    """The windows of a max-pooling side by side, (N, C, H, W) -> (N, C, h, w * places of a window)."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        self.kernel, self.stride, self.padding, self.dilation = (_pair(size) for size in sizes)
        self.ceil = pool.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        options = (self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        h, w = F.max_pool2d(x.detach(), *options).shape[-2:]
        # What the last window needs beyond the image, per axis; with ceil_mode more than the padding.
        beyond = [
            max(0, (n - 1) * s + d * (k - 1) + 1 - size - p)
            for n, size, k, s, p, d in zip((h, w), x.shape[-2:], *options[:4], strict=True)
        ]
        edges = (self.padding[1], beyond[1], self.padding[0], beyond[0])
        padded = F.pad(x, edges, value=torch.finfo(x.dtype).min)
        places = F.unfold(padded, self.kernel, self.dilation, stride=self.stride)
        return places.reshape(len(x), x.shape[1], -1, h, w).permute(0, 1, 3, 4, 2).flatten(3)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _without_overlap(net: fx.GraphModule) -> fx.GraphModule:
    """Max-poolings whose windows overlap are done window by window.

    captum's rule for them keeps one window's share of a pixel and forgets the others'.
    """
    for node in list(net.graph.nodes):
        pool = net.get_submodule(node.target) if node.op == "call_module" else None
        if type(pool) is nn.MaxPool2d:
            windows = _Windows(pool)
            reach = [d * (k - 1) for d, k in zip(windows.dilation, windows.kernel, strict=True)]
            if any(r >= s for r, s in zip(reach, windows.stride, strict=True)):
                places = windows.kernel[0] * windows.kernel[1]
                net.add_submodule(node.target, nn.Sequential(windows, nn.MaxPool2d((1, places))))
    return net


def _hookable(model: Classifier, as_relu: tuple[type[nn.Module], ...]) -> fx.GraphModule:
    """The net ``separated``, and with an input of its own for every activation and pooling.

    captum's hooks rewrite the gradient of the tensor that goes into a module. That tensor must not
    be another consumer's too (a residual), nor another activation's output (max-pooling of a ReLU):
    there captum mixes up the gradients, and DeepLIFT is not complete.
    """
    net = separated(model.module, as_relu)
    for node in list(net.graph.nodes):
        if node.op == "call_module" and not any(True for _ in net.get_submodule(node.target).parameters()):
            with net.graph.inserting_before(node):
                for shared in node.all_input_nodes:
                    node.replace_input_with(shared, net.graph.call_method("clone", (shared,)))
    net.recompile()
    return net


@dataclass(frozen=True)
class Random(Method):
    """Uniform noise on [0, 1): what any method must beat."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "uniform on [0, 1), no information"}

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        return {"map": noise.uniform(*batch.x.shape[-2:])}


@dataclass(frozen=True)
class Gradient(Method):
    """Gradient of the target's logit (Simonyan et al., 2014, section 3)."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "change of the logit per unit of input, signed"}
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        method = attr.Saliency(_Score(model.module))

        def explain(x: Tensor, target: Tensor, _: slice) -> Tensor:
            return method.attribute(x, abs=False, additional_forward_args=(target,))

        return {"map": _over_channels(_chunked(model, batch, explain), self.reduce)}


@dataclass(frozen=True)
class InputXGradient(Method):
    """Input times gradient (Shrikumar et al., 2016); the input is the normalised image."""

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed"}
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        method = attr.InputXGradient(_Score(model.module))

        def explain(x: Tensor, target: Tensor, _: slice) -> Tensor:
            return method.attribute(x, additional_forward_args=(target,))

        return {"map": _over_channels(_chunked(model, batch, explain), self.reduce)}


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """Gradients along the line from a constant baseline to the input (Sundararajan et al., 2017, eq. 1).

    baseline   value of every (normalised) input of the baseline; 0 is the data's mean colour
    steps      points of the Gauss-Legendre rule
    ``delta`` is the error of completeness: sum of the map minus the change of the logit.
    """

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the change of the logit"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"delta": "error of completeness, logit units"}
    steps: int = 50
    baseline: float = 0.0
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        method = attr.IntegratedGradients(_Score(model.module))

        def explain(x: Tensor, target: Tensor, _: slice) -> Tensor:
            return method.attribute(
                x,
                baselines=self.baseline,
                additional_forward_args=(target,),
                n_steps=self.steps,
                internal_batch_size=max(model.rows, len(x)),
            )

        found = _chunked(model, batch, explain, cost=self.steps, least=1)
        ends = torch.cat((batch.x, torch.full_like(batch.x, self.baseline)))
        start, end = target_score(model.logits(ends), batch.target.repeat(2, *[1] * (batch.target.ndim - 1))).chunk(2)
        return {"map": _over_channels(found, self.reduce), "delta": found.flatten(1).sum(1) - (start - end)}


@dataclass(frozen=True)
class SmoothGrad(Method):
    """Mean gradient over noisy copies of the input (Smilkov et al., 2017).

    sigma   standard deviation of the noise as a share of each image's range (the paper's noise level)
    """

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "change of the logit per unit of input, signed, mean over noise"}
    samples: int = 25
    sigma: float = 0.15
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        method = attr.Saliency(_Score(model.module))
        spread = self.sigma * (batch.x.flatten(1).amax(1) - batch.x.flatten(1).amin(1))
        total = torch.zeros_like(batch.x)
        for _ in range(self.samples):  # one draw of the whole batch at a time: memory does not grow with samples
            noisy = batch.x + spread[:, None, None, None] * noise.normal(*batch.x.shape[1:])

            def explain(_: Tensor, target: Tensor, at: slice, noisy: Tensor = noisy) -> Tensor:
                return method.attribute(noisy[at], abs=False, additional_forward_args=(target,))

            total += _chunked(model, batch, explain)
        return {"map": _over_channels(total / self.samples, self.reduce)}


@dataclass(frozen=True)
class GuidedBackprop(Method):
    """Gradient with negative parts cut off at every ReLU (Springenberg et al., 2015).

    ReLU6 counts as a ReLU. Raises UserError on a net without ReLUs, where the method is not defined.
    """

    VERSION: ClassVar[int] = 2
    MAPS: ClassVar[Mapping[str, str]] = {"map": "guided gradient, signed"}
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        net = _hookable(model, RELU_LIKE)
        if not any(isinstance(m, nn.ReLU) for m in net.modules()):
            raise UserError(f"guided backpropagation is defined for ReLUs; {type(model.module).__name__} has none")
        method = attr.GuidedBackprop(_Score(net))

        def explain(x: Tensor, target: Tensor, _: slice) -> Tensor:
            return method.attribute(x, additional_forward_args=(target,))

        return {"map": _over_channels(_chunked(model, batch, explain), self.reduce)}


@dataclass(frozen=True)
class DeepLiftShap(Method):
    """DeepLIFT (rescale rule) averaged over baselines (Lundberg & Lee, 2017, section 4.2).

    The baselines are ``samples`` noise images N(0, sigma^2) in normalised units, of each sample's
    own stream; with samples=1 and sigma=0 this is DeepLIFT with the mean colour as baseline.
    ``delta`` is the error of completeness; it is large on nets with operations that the rescale
    rule does not cover (attention, gates that multiply). Where captum alone is not complete
    (max-pooling behind a ReLU, windows that overlap, residuals around an activation), this is.
    """

    VERSION: ClassVar[int] = 2
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the change of the logit"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"delta": "error of completeness, logit units"}
    samples: int = 5
    sigma: float = 0.5
    reduce: Reduce = "sum"
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        net = _without_overlap(_hookable(model, ELEMENTWISE))
        total, delta = torch.zeros_like(batch.x), torch.zeros_like(batch.x[:, 0, 0, 0])
        for _ in range(self.samples):
            baseline = self.sigma * noise.normal(*batch.x.shape[1:])
            method = attr.DeepLift(_Score(net))

            def explain(x: Tensor, target: Tensor, at: slice, base: Tensor = baseline, by: attr.DeepLift = method):
                return by.attribute(x, baselines=base[at], additional_forward_args=(target,))

            found = _chunked(model, batch, explain, cost=2)
            ends = target_score(model.logits(batch.x) - model.logits(baseline), batch.target)
            total += found
            delta += found.flatten(1).sum(1) - ends
        return {"map": _over_channels(total / self.samples, self.reduce), "delta": delta / self.samples}


@dataclass(frozen=True)
class GradCAM(Method):
    """Activations of the layer with role ``layer``, weighted by their mean gradients (Selvaraju et al., 2017).

    ``relu=False`` keeps what speaks against the class (negative values); the paper cuts it off.
    """

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, >= 0 unless relu=false, upsampled from the layer"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"cam": "the same at the layer's resolution, (h, w)"}
    layer: str = "cam"
    relu: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        method = attr.LayerGradCam(_Score(model.module), model.layer(self.layer))

        def explain(x: Tensor, target: Tensor, _: slice) -> Tensor:
            cam = method.attribute(x, additional_forward_args=(target,), relu_attributions=self.relu)
            if cam.ndim != 4:
                raise UserError(
                    f"Grad-CAM needs a conv map (N, C, H, W); {model.path(self.layer)} gives something else"
                )
            return cam[:, 0]

        cam = _chunked(model, batch, explain)
        return {"map": resize(cam, tuple(batch.x.shape[-2:])), "cam": cam}


@dataclass(frozen=True)
class Occlusion(Method):
    """Fall of the logit when a square is covered (Zeiler & Fergus, 2014), mean over squares on a pixel.

    window, stride   side of the square and its step, in pixels
    baseline         value of the covering, in normalised units; 0 is the data's mean colour
    """

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "fall of the logit, signed"}
    window: int = 32
    stride: int = 16
    baseline: float = 0.0
    __post_init__ = _check_fields

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        method = attr.Occlusion(_Score(model.module))
        channels, *size = batch.x.shape[1:]
        if self.window > min(size):
            raise UserError(f"Occlusion.window is {self.window}, must not be larger than the image, {tuple(size)}")
        steps = [max(0, -(-(side - self.window) // self.stride)) + 1 for side in size]

        def explain(x: Tensor, target: Tensor, _: slice) -> Tensor:
            return method.attribute(
                x,
                sliding_window_shapes=(channels, self.window, self.window),
                strides=(channels, self.stride, self.stride),
                baselines=self.baseline,
                additional_forward_args=(target,),
                perturbations_per_eval=max(1, model.rows // len(x)),
            )

        # Covering all channels at once, every channel gets the same value.
        return {"map": _chunked(model, batch, explain, cost=steps[0] * steps[1] + 1)[:, 0]}
