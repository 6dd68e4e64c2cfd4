"""The GAN of InputIBA: finds, for every sample, a mask of its input that matches what a layer's bottleneck keeps.

Zhang, Khakzar, Li, Farshad, Kim & Navab, *Fine-Grained Neural Network Explanation by Identifying
Input Features with Predictive Information*, NeurIPS 2021, section 3.2; the details of the training
follow the authors' code. It is a Wasserstein GAN with clipped weights (Arjovsky, Chintala & Bottou, ICML 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.checks import require
from attrib.methods.parts.layout import Layout
from attrib.noise import Noise

_DRAWN = 2**22  # random numbers per sample that are drawn at a time; they take eight bytes each, twice that meanwhile
SLOPE = 0.2  # of the leaky ReLUs
_LEAST = 4  # the smallest side of a grid that the convolutions can read, in places


Compute = Callable[..., Tensor]  # of a function and its arguments


def _as_it_is(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return function(*inputs)


class Push(Protocol):
    """The net from its input to the layer; see ``Classifier.vjp``."""

    def __call__(self, x: Tensor, keep: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]: ...


class Critics(Protocol):
    """B critics; every parameter is (B, ...)."""

    parameters: dict[str, Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """(B, n, *layer) -> (B, n): the higher, the more a critic takes a row for real."""
        ...


# ---- critics --------------------------------------------------------------------------------------


def critic_shapes(channels: int, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of one critic's parameters for a conv map of this size, in the order in which they are drawn."""
    h, w = (max(_LEAST, side) // 4 for side in grid)
    shapes: dict[str, tuple[int, ...]] = {}
    convs = ((channels, 2 * channels, 4), (2 * channels, 4 * channels, 4), (4 * channels, channels, 3))
    for i, (fan_in, fan_out, kernel) in enumerate(convs, 1):
        shapes |= {f"conv{i}.weight": (fan_out, fan_in, kernel, kernel), f"conv{i}.bias": (fan_out,)}
        shapes |= {f"norm{i}.weight": (fan_out,), f"norm{i}.bias": (fan_out,)}
    for i, (fan_in, fan_out) in enumerate(((channels * h * w, 512), (512, 256), (256, 1)), 1):
        shapes |= {f"linear{i}.weight": (fan_out, fan_in), f"linear{i}.bias": (fan_out,)}
    return shapes


def critic_parameters(channels: int, grid: tuple[int, int]) -> int:
    """How many numbers one critic has: 64 million for VGG16's features.17 (512 channels, 28 x 28).

    Training needs memory for three times as many (with gradients and RMSprop's mean squares), and for as
    many again where the optimiser updates all parameters at once (on a GPU).
    """
    return sum(math.prod(shape) for shape in critic_shapes(channels, grid).values())


class ConvCritics:
    """B critics of a layer with places on a grid: three convolutions with batch normalisation, three linear layers.

    Each sample is normalised over its own n rows only, so samples do not influence each other.
    A grid smaller than 4 x 4 places is padded with zeros.

    parameters   see ``critic_shapes``, each with B in front
    compute      calls a function of tensors, in another arithmetic than float32 if the net is computed in one: the
                 critics of a large layer take longer than the net
    """

    def __init__(self, parameters: dict[str, Tensor], places: Layout, compute: Compute = _as_it_is) -> None:
        self.parameters, self.places, self._compute = parameters, places, compute

    @classmethod
    def initial(cls, noise: Noise, places: Layout, like: Tensor, compute: Compute = _as_it_is) -> ConvCritics:
        """Drawn as torch.nn's layers do, uniform within 1 / sqrt(fan in); normalisation starts as the identity.

        ``like`` (B, *layer) gives B, the device and the dtype.
        """
        channels, *_ = places.to_grid(like[:1]).shape[1:]
        shapes = critic_shapes(channels, places.grid)
        parameters: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            layer, _, kind = name.partition(".")
            if layer.startswith("norm"):
                parameters[name] = like.new_full((len(like), *shape), float(kind == "weight"))
            else:
                bound = 1 / math.sqrt(math.prod(shapes[f"{layer}.weight"][1:]))
                parameters[name] = uniform(noise, shape, like).mul_(2 * bound).sub_(bound)
        return cls(parameters, places, compute)

    def __call__(self, z: Tensor) -> Tensor:
        return self._compute(self._judged, z, *self.parameters.values())

    def _judged(self, z: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(self.parameters, values, strict=True))
        samples, n = z.shape[:2]
        grid = self.places.to_grid(z.flatten(0, 1))
        grid = F.pad(grid, (0, max(0, _LEAST - grid.shape[3]), 0, max(0, _LEAST - grid.shape[2])))
        grid = grid.unflatten(0, (samples, n))
        # One grouped convolution for all samples is fast on a GPU; on a CPU one sample after another is faster.
        size = 1 if z.device.type == "cpu" else samples
        names = [name for name in parameters if not name.startswith("linear")]
        cut = zip(*(parameters[name].split(size) for name in names), strict=True)
        x = torch.cat([_convolved(g, dict(zip(names, p, strict=True))) for g, p in zip(grid.split(size), cut)])
        for i in (1, 2, 3):
            weight, bias = parameters[f"linear{i}.weight"], parameters[f"linear{i}.bias"]
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            x = F.leaky_relu(x, SLOPE) if i < 3 else x
        return x.squeeze(2)


def _convolved(grid: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """(b, n, C, h, w) and the parameters of b critics -> (b, n, C * (h // 4) * (w // 4))."""
    samples, n = grid.shape[:2]
    p = {name: value.flatten(0, 1) for name, value in parameters.items()}
    x = grid.transpose(0, 1).flatten(1, 2)  # (n, b * C, h, w)
    for i, stride in ((1, 2), (2, 2), (3, 1)):
        x = F.conv2d(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"], stride, padding=1, groups=samples)
        x = F.leaky_relu(_normalised(x, p[f"norm{i}.weight"], p[f"norm{i}.bias"]), SLOPE)
    return x.reshape(n, samples, -1).transpose(0, 1)


def _normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch normalisation as in training; where a channel has a single value, that is its own mean."""
    if len(x) * x.shape[2] * x.shape[3] == 1:
        return (x - x) * weight[:, None, None] + bias[:, None, None]
    return F.batch_norm(x, None, None, weight, bias, training=True)


def uniform(noise: Noise, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """(B, *shape) on [0, 1). Drawn piece by piece to save memory, which does not change the numbers."""
    drawn = like.new_empty((len(like), math.prod(shape)))
    for start in range(0, drawn.shape[1], _DRAWN):
        piece = drawn[:, start : start + _DRAWN]
        piece.copy_(noise.uniform(piece.shape[1]))
    return drawn.unflatten(1, shape)


# ---- what critics compare ---------------------------------------------------------------------------


class Synthetic:
    """What the generators must imitate: a sample's features after the bottleneck, with noise of several strengths.

    A row is mask * features + (1 - mask) * (std * eps + mean), with a new eps each time it is asked for. Rows form
    groups of ``group_size``, each with its own std, uniform on [0, 5), and mean, uniform on [-2, 2).

    features   (B, *layer) the layer's output
    mask       (B, *layer) what the feature bottleneck lets pass, in nats per unit, so not bounded by 1
    size       number of rows
    ragged     whether the features are of texts, (B, T, C): see ``Noise``
    """

    def __init__(
        self, noise: Noise, features: Tensor, mask: Tensor, size: int, group_size: int, ragged: bool = False
    ) -> None:
        self.kept, self.open, self.group_size = mask * features, 1 - mask, group_size
        self.ragged = 1 if ragged else None
        groups = math.ceil(size / group_size)
        self.std = noise.uniform(groups) * 5  # (B, groups)
        self.mean = noise.uniform(groups) * 4 - 2
        self.noise = noise

    def rows(self, numbers: Tensor) -> Tensor:
        """Row numbers (B, n) -> (B, n, *layer)."""
        groups = numbers // self.group_size
        ones = (1,) * (self.kept.ndim - 1)
        std, mean = (of.gather(1, groups).reshape(*groups.shape, *ones) for of in (self.std, self.mean))
        eps = self.noise.normal(groups.shape[1], *self.kept.shape[1:], ragged=self.ragged)
        return eps.mul_(std).add_(mean).mul_(self.open.unsqueeze(1)).add_(self.kept.unsqueeze(1))


class Generators:
    """B generators. They make inputs m x + (1 - m)(std eps + mean), where m = sigmoid(alpha) and eps is drawn.

    alpha       (B, *input), trained, as are
    mean, std   (B, C, 1, 1), a number for each channel of an image, or (B, T, 1), for each token of a text
    """

    def __init__(self, x: Tensor, alpha: Tensor) -> None:
        self.x = x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:]))
        self.alpha = alpha.detach().clone().requires_grad_()
        self.mean = x.new_zeros(shape).requires_grad_()
        self.std = x.new_ones(shape).requires_grad_()

    def mask(self) -> Tensor:
        return self.alpha.sigmoid()

    def __call__(self, eps: Tensor) -> Tensor:
        """Standard normal (B, n, *input) -> inputs (B, n, *input)."""
        mask = self.mask().unsqueeze(1)
        return mask * self.x.unsqueeze(1) + (1 - mask) * (self.std.unsqueeze(1) * eps + self.mean.unsqueeze(1))


# ---- training ---------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """B generators after their training, and the losses on the way."""

    mask: Tensor  # (B, *input), 0 .. 1
    mean: Tensor  # (B, C, 1, 1) or (B, T, 1)
    std: Tensor
    critic_loss: Tensor  # (B, critic steps)
    generator_loss: Tensor  # (B, generator steps)

    @classmethod
    def untrained(cls, x: Tensor, alpha: Tensor) -> Trained:
        """The generators before any training: what ``WGAN.train`` gives for epochs=0, without making critics."""
        begun, none = Generators(x, alpha), x.new_empty(len(x), 0)
        return cls(begun.mask().detach(), begun.mean.detach(), begun.std.detach(), none, none)


@dataclass(frozen=True)
class WGAN:
    """How generators and critics are trained, both by RMSprop. The defaults are the authors' for ImageNet.

    dataset_size, sub_dataset_size   how many rows the generator must imitate, and how many of them share a
                            standard deviation and a mean; see ``Synthetic``
    batch                   rows per step; the last batch of an epoch may be smaller
    epochs                  0: no training, the generator stays as it begins
    critic_iter             batches per generator step; counted from the start of each epoch
    lr, weight_clip         of the critic
    mask_lr, mean_lr, std_lr   of the generator's parts
    """

    NAME: ClassVar[str] = "attrib.methods.wgan.WGAN"
    dataset_size: int = 200
    sub_dataset_size: int = 20
    batch: int = 32
    epochs: int = 20
    critic_iter: int = 5
    lr: float = 5e-5
    weight_clip: float = 0.01
    mask_lr: float = 0.003
    mean_lr: float = 0.1
    std_lr: float = 0.05

    def __post_init__(self) -> None:
        require(self, "dataset_size", "sub_dataset_size", "batch", "critic_iter", at_least=1)
        require(self, "epochs", at_least=0)
        require(self, "lr", "weight_clip", "mask_lr", "mean_lr", "std_lr", above=0)

    def _batches(self, noise: Noise) -> Iterator[tuple[int, Tensor]]:
        """Every batch of the training: its number within its epoch, and the numbers of its rows, (B, n)."""
        for _ in range(self.epochs):
            order = noise.permutation(self.dataset_size)
            yield from enumerate(order.split(self.batch, dim=1))

    def train(
        self,
        push: Push,
        x: Tensor,
        features: Tensor,
        mask: Tensor,
        alpha: Tensor,
        critics: Critics,
        noise: Noise,
        text: bool = False,
    ) -> Trained:
        """Train B generators against B critics.

        x          (B, *input)
        features   (B, *layer), push(x)
        mask       (B, *layer), see ``Synthetic``
        alpha      (B, *input), where the generators' mask starts, before the sigmoid
        critics    are changed in place
        text       whether x are embedded tokens (B, T, E) with padding, and features (B, T, C) or (B, C)

        Losses are means over a sample's own rows and sums over samples, and clipping and RMSprop treat
        each number separately, so each sample is trained exactly as it would be alone.
        """
        order, latent = noise.child("order"), noise.child("latent")
        sizes, ragged = (self.dataset_size, self.sub_dataset_size), 1 if text else None
        real = Synthetic(noise.child("synthetic"), features, mask, *sizes, ragged=text and features.ndim == 3)
        generators = Generators(x, alpha)
        parameters = [value.requires_grad_() for value in critics.parameters.values()]
        critic_step = torch.optim.RMSprop(parameters, lr=self.lr)
        generator_step = torch.optim.RMSprop(
            [
                {"params": [generators.mean], "lr": self.mean_lr},
                {"params": [generators.std], "lr": self.std_lr},
                {"params": [generators.alpha], "lr": self.mask_lr},
            ]
        )
        critic_losses: list[Tensor] = [x.new_empty(len(x), 0)]
        generator_losses: list[Tensor] = [x.new_empty(len(x), 0)]
        for i, numbers in self._batches(order):
            generates = i % self.critic_iter == 0
            with torch.set_grad_enabled(generates):
                inputs = generators(latent.normal(numbers.shape[1], *x.shape[1:], ragged=ragged))
            fake, pull = push(inputs.detach().flatten(0, 1), keep=generates)
            fake = fake.unflatten(0, numbers.shape)

            with torch.enable_grad():
                loss = critics(fake).mean(1) - critics(real.rows(numbers)).mean(1)
            _set_gradients(parameters, torch.autograd.grad(loss.sum(), parameters))
            critic_step.step()
            for value in parameters:
                value.data.clamp_(-self.weight_clip, self.weight_clip)
            critic_losses.append(loss.detach()[:, None])

            if generates:
                fake.requires_grad_()
                with torch.enable_grad():
                    loss = -critics(fake).mean(1)
                (grad,) = torch.autograd.grad(loss.sum(), fake)
                grad = pull(grad.flatten(0, 1)).unflatten(0, numbers.shape)
                parts = (generators.mean, generators.std, generators.alpha)
                _set_gradients(parts, torch.autograd.grad(inputs, parts, grad))
                generator_step.step()
                generator_losses.append(loss.detach()[:, None])
            del inputs, fake, pull  # two steps' worth of memory otherwise
        return Trained(
            generators.mask().detach(),
            generators.mean.detach(),
            generators.std.detach(),
            torch.cat(critic_losses, dim=1),
            torch.cat(generator_losses, dim=1),
        )


def _set_gradients(parameters: list[Tensor] | tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
