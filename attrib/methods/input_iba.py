"""InputIBA: an information bottleneck at the input, whose prior is fitted to the sample by a small GAN.

Zhang, Khakzar, Li, Farshad, Kim & Navab, *Fine-Grained Neural Network Explanation by Identifying
Input Features with Predictive Information*, NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attrib.fit import State
from attrib.methods import Method
from attrib.methods.iba import IBA, Gaussian, Optimised, optimise
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.methods.parts.layout import Layout, Places, TextLayout
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.methods.parts.wgan import WGAN, ConvCritics, Critics, Push, Trained, critic_parameters
from attrib.methods.parts.wgan_text import LSTMCritics
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
    """The last stage: a bottleneck at the pixels or at the embedded words, optimised as IBA's is.

    batch        noise draws per step
    sigma        standard deviation of the smoothing of lambda, in pixels; None for none. Images only
    mean, std    of the noise, in units of the normalised input, or of the embedding
    """

    NAME: ClassVar[str] = "attrib.methods.input_iba.InputBottleneck"
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

    def optimise(self, model: Classifier, inputs: Inputs, mask: Tensor, noise: Noise) -> Optimised:
        """mask, of the inputs' shape, is the prior's, see ``capacity``."""
        x, text = inputs.x, inputs.mask is not None
        grid = TextLayout.of(x, inputs.mask) if text else Layout.of(x, tuple(x.shape[-2:]), "channels_first")
        prior = Gaussian(x.new_tensor(self.mean), x.new_tensor(self.std), x.new_ones(()))
        return optimise(
            model,
            EMBEDDING if text else None,
            Front(x, inputs.rest),
            inputs.target,
            prior,
            noise,
            beta=self.beta,
            steps=self.steps,
            lr=self.lr,
            draws=self.batch,
            initial_alpha=self.initial_alpha,
            smooth=lambda lam: grid.smooth(lam, self.sigma),
            real=grid.real,
            kl=partial(capacity, mask=mask),
        )


class Stages(NamedTuple):
    """What the three stages found for B samples."""

    feature: Optimised
    places: Places  # of the feature bottleneck
    bits: Tensor  # (B, h, w) per place of the layer; texts: (B, T), or (B, 1) of a vector
    map: Tensor  # (B, H, W) the same per pixel; texts: (B, T)
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
    exceed 1; the generator's mask begins as sigmoid(bits per pixel), of texts sigmoid(nats per token),
    so it is at least a half; and the map ``input`` is sigmoid(alpha) after the last step, not smoothed.
    The grid of a conv map or of tokens is what the critics of images see; a vector is a grid of one place.

    The input of a text is its embedded tokens, the output of the layer with role "embedding", and the
    critics are LSTMs over the tokens. (The authors' code averages the text masks over the wrong axis,
    and lets a text have 100 numbers per token only.)
    """

    NAME: ClassVar[str] = "attrib.methods.input_iba.InputIBA"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {
        "input": "share of the input that passes the bottleneck there, 0 .. 1, mean over channels or embedding",
        "gan": "mask of the generator, 0 .. 1, mean over channels or embedding",
        "feature": "information in bits at the layer, per pixel, upsampled, or per token; >= 0",
    }
    EXTRAS: ClassVar[Mapping[str, str]] = {
        "capacity": "bits per place of the layer, summed over channels, (h, w) or (T,)",
        "loss_feature": "feature bottleneck: total loss at each step",
        "loss_feature_model": "feature bottleneck: loss of the target at each step",
        "loss_feature_info": "feature bottleneck: mean capacity in nats at each step, before beta",
        "loss_critic": "GAN: loss of the critic at each of its steps",
        "loss_generator": "GAN: loss of the generator at each of its steps",
        "loss_input": "input bottleneck: total loss at each step",
        "loss_input_model": "input bottleneck: loss of the target at each step",
        "loss_input_info": "input bottleneck: mean capacity in nats at each step, before beta",
    }
    TOKENS: ClassVar[tuple[str, ...]] = ("capacity",)

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

    def bytes_per_sample(self, model: Classifier, batch: Batch) -> int | None:
        """A critic of an image in training, and what a step keeps of its rows. The critics of texts are small.

        None, too, without training (``gan.epochs=0``), which has no critics.

        Three times the critic's parameters; for each row of a step eight times the features and four
        times the input. Rather less than was measured (resnet18 at layer2: 250 of 350 MiB).
        """
        if batch.mask is not None or not self.gan.epochs:
            return None
        z = model.until(self.feature.layer, batch.x[:1]).z
        grid = Layout.of(z, tuple(batch.x.shape[-2:]), self.feature.layout).to_grid(z)
        kept = 8 * z.numel() + 4 * batch.x[0].numel()
        return (3 * critic_parameters(grid.shape[1], tuple(grid.shape[2:])) + self.gan.batch * kept) * z.element_size()

    def nets(self, model: Classifier) -> tuple[Classifier, Classifier, Classifier]:
        """Which net each of the stages explains."""
        return model, model, model

    def stages(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Stages:
        """The three stages themselves, for those who want more than the maps.

        Every stage has random streams of its own, so that the length of one does not change the
        noise of the next. Raises SampleError with the stage's name if it diverged.
        """
        first, second, last = self.nets(model)
        role, inputs = self.feature.layer, Inputs.of(second, batch)
        feature, places = self.feature.optimise(first, batch, state, noise.child("feature"))
        bits = places.bits(feature.capacity)
        spread = places.spread(bits)
        _check("feature bottleneck", batch, feature.alpha, feature.capacity, *feature.losses.values())

        text = inputs.mask is not None
        alpha = (spread * math.log(2)).unsqueeze(2) if text else spread.unsqueeze(1)
        begin = alpha.expand_as(inputs.x)
        if self.gan.epochs:
            features, streams = second.until(role, batch.x).z, noise.child("gan")
            push, critics = _pieces(second, role, batch, places, features, streams.child("critic"))
            gan = self.gan.train(push, inputs.x, features, feature.capacity, begin, critics, streams, text)
            del critics, features
        else:  # critics are large, and would judge nothing
            gan = Trained.untrained(inputs.x, begin)
        _check("GAN", batch, gan.mask, gan.mean, gan.std, gan.critic_loss, gan.generator_loss)

        mask = gan.mask if self.gan_prior else torch.zeros_like(gan.mask)
        inputs = inputs if last is second else Inputs.of(last, batch)
        found = self.input.optimise(last, inputs, mask, noise.child("input"))
        _check("input bottleneck", batch, found.alpha, *found.losses.values())
        return Stages(feature, places, bits, spread, gan, found)

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        found = self.stages(model, batch, state, noise)
        channels = 1 if batch.mask is None else -1
        real = 1 if batch.mask is None else batch.mask
        return {
            "input": found.input.alpha.sigmoid().mean(channels) * real,
            "gan": found.gan.mask.mean(channels) * real,
            "feature": found.map,
            "capacity": found.bits,
            **_named("feature", found.feature.losses),
            "loss_critic": found.gan.critic_loss,
            "loss_generator": found.gan.generator_loss,
            **_named("input", found.input.losses),
        }


def _pieces(
    model: Classifier, role: str, batch: Batch, places: Places, features: Tensor, noise: Noise
) -> tuple[Push, Critics]:
    """The net from the input to the layer, and critics of that layer."""
    if isinstance(places, TextLayout):
        start = (EMBEDDING, batch.x)
        return partial(model.vjp, role, start=start), LSTMCritics.initial(noise, places, features)
    return partial(model.vjp, role), ConvCritics.initial(noise, places, features)


def _named(stage: str, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("loss", f"loss_{stage}", 1): curve for name, curve in losses.items()}


def _check(stage: str, batch: Batch, *values: Tensor) -> None:
    """Raises SampleError that names the stage and the first sample for which a value is not finite."""
    for i, uid in enumerate(batch.uids):
        if not all(value[i].isfinite().all() for value in values):
            raise SampleError(f"{uid}: the {stage} diverged (NaN or infinite values); lower its lr")
