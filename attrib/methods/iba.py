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

from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts import layout
from attrib.methods.parts.layout import Places
from attrib.methods.parts.losses import target_loss
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.models import Classifier, Front
from attrib.noise import Noise
from attrib.types import Batch, UserError


class Gaussian(NamedTuple):
    """What the bottleneck assumes of the layer's units, each without B: Q(Z) = N(mean, std^2)."""

    mean: Tensor
    std: Tensor
    active: Tensor  # 0 or 1: units that are (nearly) always zero carry and cost nothing

    @classmethod
    def of(cls, state: State, min_std: float, active_threshold: float, like: Tensor) -> Gaussian:
        return cls(
            state["mean"].to(like),
            state["std"].to(like).clamp(min=min_std),
            # In the state's own precision: a share of just the threshold is off whatever the dtype of ``like``.
            (state["active"] > active_threshold).to(like),
        )


def capacity(r: Tensor, lam: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """KL[P(Z|R) || Q(Z)] in nats per unit; equation 4 and appendix E of the paper.

    Zero at lam = 0; +inf at lam = 1, where Z is R and no noise is left.
    """
    mu = (r - mean) / std * lam
    var = (1 - lam) ** 2
    return 0.5 * (mu**2 + var - 1 - var.log())


class Restricted(NamedTuple):
    """One noisy pass through the bottleneck for every sample."""

    loss: Tensor  # (B,) the target's loss, mean over the noise draws
    grad: Tensor  # (B, *layer) its gradient with respect to lambda


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

    Z is linear in lambda, so its gradient needs no graph: dL/dlam = sum over draws of
    dL/dZ (R - eps). Equation 3 of the paper. ``real``: see ``optimise``.
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
        z.flatten(0, 1), lambda logits, rows: target_loss(logits, target[rows]), role, front.rest
    )
    grad = grad.unflatten(0, (-1, draws)).mul_(prior.active)
    if relu:
        grad.mul_(open_units)
    return Restricted(losses.unflatten(0, (-1, draws)).mean(1), (grad * (r - eps)).mean(1))


class Optimised(NamedTuple):
    """B bottlenecks after their optimisation."""

    alpha: Tensor  # (B, *layer) after the last step
    capacity: Tensor  # (B, *layer) nats, of the last forward pass, before the last step
    losses: dict[str, Tensor]  # "loss", "loss_model", "loss_info", each (B, steps)


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
    """Minimise loss + beta * mean capacity over alpha, lambda = smooth(sigmoid(alpha)), by Adam.

    All samples at once: Adam works unit by unit and the losses are summed, so each sample sees
    just what it would see alone. ``real`` (B, T, 1) is 0 on the padding of texts, whose units do
    not exist: they have no capacity, and the mean is taken over the others. Without a role the
    bottleneck is at the input, ``front.z``; ``kl`` is another capacity than that of this module.
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
    """Per-sample bottleneck (section 3.2).

    Noise is added to the layer with role ``layer`` so that as little information as possible
    passes while the class is kept; the map is how many bits pass at each place.

    layer   conv map, tokens of a transformer or of a text, or vector (see ``layout``)
    beta    weight of the information loss, which is a mean over units
    batch   noise draws per step
    sigma   standard deviation of the smoothing of lambda, in places; None for none. Not of texts: neighbouring
            words are not alike as neighbouring pixels are
    active_neurons_threshold   units that are non-zero in a smaller share of samples are cut off
    relu    clamp the bottleneck's output at zero, for a layer whose output is never negative

    The capacity is that of the last forward pass, before the last step, as in the authors' code.
    """

    NAME: ClassVar[str] = "attrib.methods.iba.IBA"
    VERSION: ClassVar[int] = 1
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
    layout: layout.Name = "auto"

    def __post_init__(self) -> None:
        for field in ("steps", "batch"):
            if getattr(self, field) < 1:
                raise UserError(f"IBA.{field} is {getattr(self, field)}, must be at least 1")

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def fit(self) -> FeatureStatistics:
        return FeatureStatistics(self.layer)

    def optimise(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> tuple[Optimised, Places]:
        """The optimised bottlenecks themselves, for those who want more than the map."""
        front = model.until(self.layer, batch.x)
        places = layout.places(batch, front.z, self.layout)
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
