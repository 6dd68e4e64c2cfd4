"""InputIBA: an information bottleneck at the input, whose prior a small GAN fits to each sample.

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

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.iba import IBA, Gaussian, Optimised, optimise
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.methods.parts.layout import Layout, Places, TextLayout, image_size, on_image
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.methods.parts.wgan import WGAN, ConvCritics, Critics, Push, Trained, critic_parameters
from attrib.methods.parts.wgan_text import LSTMCritics
from attrib.models import Classifier, Front
from attrib.models.precision import computed, multiplied
from attrib.noise import Noise
from attrib.types import Batch, SampleError


def capacity(x: Tensor, lam: Tensor, mean: Tensor, std: Tensor, mask: Tensor) -> Tensor:
    """KL[P(Z|X) || Q(Z)] in nats per unit, Z = lam X + (1 - lam) eps, eps ~ N(mean, std^2).

    Q(Z) is the distribution of Z when the bottleneck reads the generator's input, mask X + (1 - mask) eps:
    N(lam mask X + (1 - lam mask) mean, ((1 - lam mask) std)^2). So what the mask keeps costs nothing, and
    where the mask is 0 the capacity is ``iba.capacity``. Appendix of the paper.
    """
    mu = (x - mean) * (1 - mask) / ((1 - mask * lam) * std) * lam
    var = (1 - lam) ** 2 / (1 - mask * lam) ** 2
    return 0.5 * (mu**2 + var - 1 - var.log())


@dataclass(frozen=True)
class InputBottleneck:
    """The last stage: a bottleneck at the pixels or at the embedded tokens, optimised like that of ``IBA``.

    beta, steps, lr, batch, initial_alpha   see ``IBA``
    sigma        standard deviation of the smoothing of lambda, in pixels; None for none. Images only
    mean, std    of the noise, in units of the normalised input, or of the embedding

    >>> InputIBA(input=InputBottleneck(steps=20)).input.beta
    20.0
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
        require(self, "steps", "batch", at_least=1)
        require(self, "beta", at_least=0)
        require(self, "lr", "std", above=0)
        require(self, "sigma", at_least=0, or_none=True)
        require(self, "initial_alpha", "mean")

    def optimise(self, model: Classifier, inputs: Inputs, mask: Tensor, noise: Noise) -> Optimised:
        """The optimised bottlenecks; ``mask`` (B, *input) is that of ``capacity``."""
        x, role = inputs.x, None if inputs.mask is None else EMBEDDING
        grid: Places = (
            Layout.of(x, image_size(x), "channels_first") if inputs.mask is None else TextLayout.of(x, inputs.mask)
        )
        prior = Gaussian(x.new_tensor(self.mean), x.new_tensor(self.std), x.new_ones(()))
        return optimise(
            model,
            role,
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
    places: Places  # how the layer lies on the input
    bits: Tensor  # (B, h, w) bits per place of the layer; of texts (B, T), or (B, 1) if the layer is a vector
    map: Tensor  # (B, H, W) bits per pixel; of texts (B, T) per token
    gan: Trained
    input: Optimised


@dataclass(frozen=True)
class InputIBA(Method):
    """Three stages, all of them for each sample separately.

    feature     a bottleneck at the layer ``feature.layer`` finds what passes there, in nats
    gan         a generator masks the input with noise, such that a critic cannot tell the layer's output from
                the features after that bottleneck; its mask says what the input must at least keep
    input       a bottleneck at the input, which pays only for what it keeps beyond the generator's mask
    gan_prior   false: the bottleneck at the input ignores the generator, as if its mask were 0 (an ablation; with
                ``gan.epochs=0`` the generator is not trained either)

    As in the authors' code, the capacity in nats serves as the mask of the features although it may exceed 1;
    the generator's mask starts as sigmoid(bits per pixel), for texts sigmoid(nats per token), so it is at
    least a half; and the map ``input`` is sigmoid(alpha) after the last step, without smoothing. Critics of
    images read the layer as a grid (``Layout.to_grid``), where a vector has one place. They are computed in
    ``precision.explain``, as the net is (on a CPU not in float16 but in float32); their weights, RMSprop's numbers
    and the generators stay float32.

    The input of a text is its embedded tokens, the output of the layer with role "embedding", and the
    critics are LSTMs over the tokens. (The authors' code averages the text masks over the wrong axis,
    and works only with 100 numbers per token.)

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> short = ["method.feature.steps=2", "method.gan.epochs=1", "method.input.steps=2"]
    >>> given = {"layers": {"bottleneck": "conv2"}, "fit": torch.rand(8, 1, 32, 32)}
    >>> list(attrib.explain(net, x, method="input_iba", overrides=short, **given).maps)
    ['input', 'gan', 'feature']
    """

    NAME: ClassVar[str] = "attrib.methods.input_iba.InputIBA"
    VERSION: ClassVar[int] = 1
    NEEDS_PROBABILITIES: ClassVar[bool] = True
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
    def laid(self) -> Mapping[str, str]:
        return self.feature.laid

    @property
    def fit(self) -> FeatureStatistics:
        return self.feature.fit

    def bytes_per_sample(self, model: Classifier, batch: Batch) -> int | None:
        """What an image's critic takes while it is trained, with the rows of a step; None if there is none.

        The critics of texts are small, and without training (``gan.epochs=0``) there are none. The estimate is
        three times the critic's parameters, and for each row of a step eight times the features and four
        times the input: somewhat less than was measured (resnet18 at layer2: 250 instead of 350 MiB).
        """
        if batch.mask is not None or not self.gan.epochs:
            return None
        z = model.until(self.feature.layer, batch.x[:1]).z
        grid = on_image(model, self.feature.layer, batch.x, z, self.feature.layout).to_grid(z)
        kept = 8 * z.numel() + 4 * batch.x[0].numel()
        return (3 * critic_parameters(grid.shape[1], image_size(grid)) + self.gan.batch * kept) * z.element_size()

    def nets(self, model: Classifier) -> tuple[Classifier, Classifier, Classifier]:
        """The net that each of the three stages explains."""
        return model, model, model

    def stages(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Stages:
        """The results of all stages, from which ``attribute`` makes the maps.

        Every stage has random streams of its own, so that the length of one does not change the noise
        of the next. Raises SampleError that names the stage if one diverged.
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
            push, critics = _push_and_critics(second, role, batch, places, features, streams.child("critic"))
            with multiplied(second.precision):
                gan = self.gan.train(push, inputs.x, features, feature.capacity, begin, critics, streams, text)
            del critics, features
        else:  # critics are large, and not needed
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


def _push_and_critics(
    model: Classifier, role: str, batch: Batch, places: Places, features: Tensor, noise: Noise
) -> tuple[Push, Critics]:
    """The net from the input to the layer, and untrained critics of that layer."""
    if isinstance(places, TextLayout):
        start = (EMBEDDING, batch.x)
        return partial(model.vjp, role, start=start), LSTMCritics.initial(noise, places, features)
    assert isinstance(places, Layout)  # sounds are not among the modalities
    # A CPU takes hundreds of times as long for gradients at a convolution's weights in float16, which nets do not need.
    slow = model.precision == "float16" and model.device.type == "cpu"
    compute = partial(computed, "float32" if slow else model.precision, model.device, model.dtype)
    return partial(model.vjp, role), ConvCritics.initial(noise, places, features, compute)


def _named(stage: str, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("loss", f"loss_{stage}", 1): curve for name, curve in losses.items()}


def _check(stage: str, batch: Batch, *values: Tensor) -> None:
    """Raises SampleError that names the stage and the first sample for which a value is not finite."""
    finite = torch.stack([value.isfinite().reshape(len(batch), -1).all(1) for value in values]).all(0)
    for uid, fine in zip(batch.uids, finite.tolist(), strict=True):
        if not fine:
            raise SampleError(f"{uid}: the {stage} diverged (NaN or infinite values); lower its lr")
