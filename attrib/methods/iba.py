"""IBA: the per-sample information bottleneck at a layer.

Schulz, Sixt, Tombari & Landgraf, *Restricting the Flow: Information Bottlenecks for
Attribution*, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts import layout
from attrib.methods.parts.layout import Places
from attrib.methods.parts.losses import target_loss
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.models import Classifier, Front
from attrib.models.reading import check_layout
from attrib.noise import Noise
from attrib.types import Batch


class Gaussian(NamedTuple):
    """The prior of the layer's units, Q(Z) = N(mean, std^2); each tensor has the layer's shape without B."""

    mean: Tensor
    std: Tensor
    active: Tensor  # 0 or 1; units with 0, which are (nearly) always zero, are cut off and have no capacity

    @classmethod
    def of(cls, state: State, min_std: float, active_threshold: float, like: Tensor) -> Gaussian:
        """From a state of ``FeatureStatistics``, on the device and in the dtype of ``like``."""
        return cls(
            state["mean"].to(like),
            state["std"].to(like).clamp(min=min_std),
            # Compared in the state's own precision, so that the result does not depend on the dtype of ``like``.
            (state["active"] > active_threshold).to(like),
        )


def capacity(r: Tensor, lam: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """KL[P(Z|R) || Q(Z)] in nats per unit; equation 4 and appendix E of the paper.

    It is 0 at lam = 0, and infinite at lam = 1, where Z is R without any noise.
    """
    mu = (r - mean) / std * lam
    var = (1 - lam) ** 2
    return 0.5 * (mu**2 + var - 1 - var.log())


class Restricted(NamedTuple):
    """Noisy passes through the bottleneck, ``draws`` for every sample."""

    loss: Tensor  # (B,) the target's loss, mean over the draws
    grad: Tensor  # (B, *layer) gradient of the loss with respect to lambda


def restrict(
    model: Classifier,
    role: str | None,
    front: Front,
    lam: Tensor,
    prior: Gaussian,
    noise: Noise,
    draws: int,
    target: Tensor,
    relu: bool = False,
    real: Tensor | None = None,
) -> Restricted:
    """Replace the layer's output R by Z = lam R + (1 - lam) eps, eps ~ N(mean, std^2), ``draws`` times.

    Equation 3 of the paper. Z is linear in lambda, so the gradient needs no graph: dL/dlam is the mean
    over the draws of dL/dZ (R - eps). ``relu`` clamps Z at zero. ``role`` and ``real``: see ``optimise``.
    """
    r, lam = front.z.unsqueeze(1), lam.detach().unsqueeze(1)
    eps = noise.normal(draws, *front.z.shape[1:], ragged=None if real is None else 1)
    eps.mul_(prior.std).add_(prior.mean)
    z = (lam * r + (1 - lam) * eps).mul_(prior.active)
    if real is not None:
        z.mul_(real.unsqueeze(1))
    if relu:
        open_units = z >= 0
        z.clamp_(min=0)
    target = target.repeat_interleave(draws, dim=0)
    losses, grad = model.gradient(
        z.flatten(0, 1), lambda logits, rows: target_loss(logits, target[rows], model.link), role, front.rest
    )
    grad = grad.unflatten(0, (-1, draws)).mul_(prior.active)
    if relu:
        grad.mul_(open_units)
    return Restricted(losses.unflatten(0, (-1, draws)).mean(1), (grad * (r - eps)).mean(1))


class Optimised(NamedTuple):
    """B optimised bottlenecks."""

    alpha: Tensor  # (B, *layer) after the last step
    capacity: Tensor  # (B, *layer) nats, in the last forward pass, which precedes the last step
    losses: dict[str, Tensor]  # "loss", "loss_model" and "loss_info" at each step, (B, steps)


def optimise(
    model: Classifier,
    role: str | None,
    front: Front,
    target: Tensor,
    prior: Gaussian,
    noise: Noise,
    *,
    beta: float,
    steps: int,
    lr: float,
    draws: int,
    initial_alpha: float = 5.0,
    relu: bool = False,
    smooth: Callable[[Tensor], Tensor] = lambda lam: lam,
    real: Tensor | None = None,
    kl: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = capacity,
) -> Optimised:
    """Minimise loss + beta * mean capacity over alpha, where lambda = smooth(sigmoid(alpha)), by Adam.

    All samples together: Adam treats each unit separately and the losses are summed, so each sample gets
    exactly what it would get alone.

    role    of the layer whose output is ``front.z``; None: the bottleneck is at the input
    real    (B, T, 1), 0 on the padding of texts, whose units have no capacity and do not count in the mean
    kl      the capacity, if it is not that of this module
    beta, steps, lr, draws, initial_alpha, relu   as in ``IBA``, where ``draws`` is called ``batch``
    """
    alpha = torch.full_like(front.z, initial_alpha).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=lr)
    curves: list[tuple[Tensor, Tensor]] = []
    last = torch.zeros_like(front.z)
    units = None if real is None else real.expand_as(front.z).flatten(1).sum(1)
    below_one = 1 - torch.finfo(front.z.dtype).eps  # at lambda = 1 the capacity is infinite
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            lam = smooth(alpha.sigmoid()).clamp(max=below_one)
            nats = kl(front.z, lam, prior.mean, prior.std) * prior.active
            nats = nats if real is None else nats * real
            info = nats.flatten(1).mean(1) if units is None else nats.flatten(1).sum(1) / units
        restricted = restrict(model, role, front, lam, prior, noise, draws, target, relu, real)
        torch.autograd.backward([lam, info], [restricted.grad, torch.full_like(info, beta)])
        optimizer.step()
        last = nats.detach()
        curves.append((restricted.loss, info.detach()))
    model_loss, info_loss = (torch.stack(curve, dim=1) for curve in zip(*curves, strict=True))
    losses = {"loss": model_loss + beta * info_loss, "loss_model": model_loss, "loss_info": info_loss}
    return Optimised(alpha.detach(), last, losses)


@dataclass(frozen=True)
class IBA(Method):
    """The per-sample bottleneck (section 3.2).

    Noise is added to the output of a layer so that as little information as possible passes while the class
    is still predicted; the map says how many bits pass at each place.

    layer    role of the layer: a conv map, tokens of an image or text, or a vector
    beta     weight of the information loss, which is a mean over units
    steps, lr   of Adam
    batch    noise draws per step
    sigma    standard deviation of the smoothing of lambda, in places; None for none. Texts are not smoothed:
             neighbouring words are not similar as neighbouring pixels are
    min_std  smaller standard deviations of units are raised to this
    initial_alpha   lambda starts as sigmoid of this
    active_neurons_threshold   units are cut off unless they are non-zero in more than this share of samples
    relu     clamp the bottleneck's output at zero, for a layer whose output is never negative
    layout   which axes of the layer are places: "auto" finds out; see ``attrib.models.reading``

    The capacity is that of the last forward pass, before the last step, as in the authors' code.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> bits = attrib.explain(net, x, method=IBA(steps=2), fit=torch.rand(8, 1, 32, 32), layers="conv2").map
    >>> bits.shape, bool((bits >= 0).all())
    (torch.Size([1, 32, 32]), True)
    """

    NAME: ClassVar[str] = "attrib.methods.iba.IBA"
    VERSION: ClassVar[int] = 1
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    MAPS: ClassVar[Mapping[str, str]] = {
        "map": "information in bits per pixel or sample, upsampled from the layer, or in bits per token; >= 0"
    }
    EXTRAS: ClassVar[Mapping[str, str]] = {
        "capacity": "bits per place of the layer, summed over channels, (h, w), (l,) or (T,)",
        "loss": "total loss at each step",
        "loss_model": "cross-entropy of the target at each step",
        "loss_info": "mean capacity in nats at each step, before beta",
    }
    TOKENS: ClassVar[tuple[str, ...]] = ("capacity",)

    layer: str = "bottleneck"
    beta: float = 10.0
    steps: int = 10
    lr: float = 1.0
    batch: int = 10
    sigma: float | None = 1.0
    min_std: float = 0.01
    initial_alpha: float = 5.0
    active_neurons_threshold: float = 0.01
    relu: bool = False
    layout: str = "auto"

    def __post_init__(self) -> None:
        require(self, "steps", "batch", at_least=1)
        require(self, "beta", at_least=0)
        require(self, "lr", "min_std", above=0)  # of a unit that never varies min_std is the deviation
        require(self, "sigma", at_least=0, or_none=True)
        require(self, "initial_alpha")
        require(self, "active_neurons_threshold", at_least=0, below=1)
        check_layout(type(self).__name__, self.layout)

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def laid(self) -> Mapping[str, str]:
        return {self.layer: self.layout}

    @property
    def fit(self) -> FeatureStatistics:
        return FeatureStatistics(self.layer)

    def optimise(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> tuple[Optimised, Places]:
        """The optimised bottlenecks, from which ``attribute`` makes the map, and how the layer lies on the input."""
        front = model.until(self.layer, batch.x)
        places = layout.places(model, self.layer, batch, front.z, self.layout)
        prior = Gaussian.of(state, self.min_std, self.active_neurons_threshold, front.z)
        found = optimise(
            model,
            self.layer,
            front,
            batch.target,
            prior,
            noise,
            beta=self.beta,
            steps=self.steps,
            lr=self.lr,
            draws=self.batch,
            initial_alpha=self.initial_alpha,
            relu=self.relu,
            smooth=lambda lam: places.smooth(lam, self.sigma),
            real=places.real,
        )
        return found, places

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        found, places = self.optimise(model, batch, state, noise)
        bits = places.bits(found.capacity)
        return {"map": places.spread(bits), "capacity": bits, **found.losses}
