"""InputIBA: an information bottleneck at the input, whose prior is fitted to the sample by a small GAN.

Zhang, Khakzar, Li, Farshad, Kim & Navab, *Fine-Grained Neural Network Explanation by Identifying
Input Features with Predictive Information*, NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attrib.methods import Method, State
from attrib.methods.iba import IBA, Gaussian, Optimised, optimise
from attrib.methods.layout import Layout, Places
from attrib.methods.statistics import FeatureStatistics
from attrib.methods.wgan import WGAN, ConvCritics, Trained
from attrib.models import Classifier, Front
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError


def capacity(x: Tensor, lam: Tensor, mean: Tensor, std: Tensor, mask: Tensor) -> Tensor:
    """KL[P(Z|X) || Q(Z)] in nats per unit, Z = lam X + (1 - lam) eps, eps ~ N(mean, std^2).

    Q is what the same bottleneck gives for the generator's input mask X + (1 - mask) eps instead,
    N(lam mask X + (1 - lam mask) mean, ((1 - lam mask) std)^2). So what the mask keeps is free, and
    where it is 0 the capacity is ``iba.capacity``. Appendix of the paper.
    """
    mu = (x - mean) * (1 - mask) / ((1 - mask * lam) * std) * lam
    var = (1 - lam) ** 2 / (1 - mask * lam) ** 2
    return 0.5 * (mu**2 + var - 1 - var.log())


@dataclass(frozen=True)
class InputBottleneck:
    """The last stage: a bottleneck at the pixels, optimised as IBA's is.

    batch        noise draws per step
    sigma        standard deviation of the smoothing of lambda, in pixels; None for none
    mean, std    of the noise, in units of the normalised input
    """

    beta: float = 20.0
    steps: int = 60
    lr: float = 1.0
    batch: int = 10
    sigma: float | None = 1.0
    initial_alpha: float = 5.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"InputBottleneck.{name} is {getattr(self, name)}, must be at least 1")
        if self.std <= 0:
            raise UserError(f"InputBottleneck.std is {self.std}, must be above 0")

    def optimise(self, model: Classifier, x: Tensor, target: Tensor, mask: Tensor, noise: Noise) -> Optimised:
        """x, mask (B, C, H, W); the mask is the prior's, see ``capacity``."""
        places = Layout.of(x, tuple(x.shape[-2:]), "channels_first")
        prior = Gaussian(x.new_tensor(self.mean), x.new_tensor(self.std), x.new_ones(()))
        return optimise(
            model,
            None,
            Front(x, ()),
            target,
            prior,
            noise,
            beta=self.beta,
            steps=self.steps,
            lr=self.lr,
            draws=self.batch,
            initial_alpha=self.initial_alpha,
            smooth=lambda lam: places.smooth(lam, self.sigma),
            kl=partial(capacity, mask=mask),
        )


class Stages(NamedTuple):
    """What the three stages found for B samples."""

    feature: Optimised
    places: Places  # of the feature bottleneck
    bits: Tensor  # (B, h, w) per place of the layer
    map: Tensor  # (B, H, W) the same per pixel
    gan: Trained
    input: Optimised


@dataclass(frozen=True)
class InputIBA(Method):
    """Three stages, each for every sample of its own.

    feature   the bottleneck at the layer ``feature.layer``: what passes there, in nats
    gan       a generator masks the input with noise such that, at the layer, it is taken for the
              features behind that bottleneck; its mask is what the input must at least keep
    input     the bottleneck at the input, which pays for what it keeps beyond the generator's mask
    gan_prior   False: the bottleneck at the input knows nothing of the generator, whose mask counts
              as 0; with ``gan.epochs=0`` the generator is not trained either (an ablation)

    As in the authors' code the capacity in nats serves as the mask of the features although it may
    exceed 1; the generator's mask begins as sigmoid(bits per pixel), so it is at least a half; and
    the map ``input`` is sigmoid(alpha) after the last step, not smoothed. The grid of a conv map or
    of tokens is what the critics see; a vector is a grid of one place.
    """

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {
        "input": "share of the input that passes the bottleneck there, 0 .. 1, mean over channels",
        "gan": "mask of the generator, 0 .. 1, mean over channels",
        "feature": "information in bits per pixel at the layer, upsampled; >= 0",
    }
    EXTRAS: ClassVar[Mapping[str, str]] = {
        "capacity": "bits per place of the layer, summed over channels, (h, w)",
        "loss_feature": "feature bottleneck: total loss at each step",
        "loss_feature_model": "feature bottleneck: loss of the target at each step",
        "loss_feature_info": "feature bottleneck: mean capacity in nats at each step, before beta",
        "loss_critic": "GAN: loss of the critic at each of its steps",
        "loss_generator": "GAN: loss of the generator at each of its steps",
        "loss_input": "input bottleneck: total loss at each step",
        "loss_input_model": "input bottleneck: loss of the target at each step",
        "loss_input_info": "input bottleneck: mean capacity in nats at each step, before beta",
    }

    feature: IBA = field(default_factory=lambda: IBA(beta=20.0, sigma=None))
    gan: WGAN = field(default_factory=WGAN)
    input: InputBottleneck = field(default_factory=InputBottleneck)
    gan_prior: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        return self.feature.roles

    @property
    def fit(self) -> FeatureStatistics:
        return self.feature.fit

    def stages(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Stages:
        """The three stages themselves, for those who want more than the maps.

        Every stage has random streams of its own, so that the length of one does not change the
        noise of the next. Raises SampleError with the stage's name if it diverged.
        """
        role, x = self.feature.layer, batch.x
        feature, places = self.feature.optimise(model, batch, state, noise.child("feature"))
        bits = places.bits(feature.capacity)
        upsampled = places.spread(bits)
        _check("feature bottleneck", batch, feature.alpha, feature.capacity, *feature.losses.values())

        features = model.until(role, x).z
        streams = noise.child("gan")
        critics = ConvCritics.initial(streams.child("critic"), places, features)
        alpha = upsampled.unsqueeze(1).expand_as(x)
        push = partial(model.vjp, role)
        gan = self.gan.train(push, x, features, feature.capacity, alpha, critics, streams)
        del critics, features
        _check("GAN", batch, gan.mask, gan.mean, gan.std, gan.critic_loss, gan.generator_loss)

        mask = gan.mask if self.gan_prior else torch.zeros_like(gan.mask)
        found = self.input.optimise(model, x, batch.target, mask, noise.child("input"))
        _check("input bottleneck", batch, found.alpha, *found.losses.values())
        return Stages(feature, places, bits, upsampled, gan, found)

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        found = self.stages(model, batch, state, noise)
        return {
            "input": found.input.alpha.sigmoid().mean(1),
            "gan": found.gan.mask.mean(1),
            "feature": found.map,
            "capacity": found.bits,
            **_named("feature", found.feature.losses),
            "loss_critic": found.gan.critic_loss,
            "loss_generator": found.gan.generator_loss,
            **_named("input", found.input.losses),
        }


def _named(stage: str, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("loss", f"loss_{stage}", 1): curve for name, curve in losses.items()}


def _check(stage: str, batch: Batch, *values: Tensor) -> None:
    """Raises SampleError that names the stage and the first sample for which a value is not finite."""
    for i, uid in enumerate(batch.uids):
        if not all(value[i].isfinite().all() for value in values):
            raise SampleError(f"{uid}: the {stage} diverged (NaN or infinite values); lower its lr")
