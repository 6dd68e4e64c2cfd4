"""Extremal perturbations: the region of a given area with the largest effect on the class's score.

Fong, Patrick & Vedaldi, *Understanding Deep Networks via Extremal Perturbations and Smooth Masks*,
ICCV 2019. Written from the paper.

A mask m, 0 .. 1 at every pixel, keeps the image where it is 1 and perturbs it where it is 0. It is computed
from a small mask of parameters by a max-convolution with a smooth kernel, so that it is always smooth; its area
is a constraint, not a penalty to be weighed; and there is one mask for each of several areas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.layout import image_size, resizing
from attrib.methods.parts.losses import target_score
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

Game = Literal["preserve", "delete", "dual"]
Perturbation = Literal["blur", "zero", "mean"]
Optimizer = Literal["sgd", "adam"]

TIE = 1e-5  # values of a mask that differ by less count as equal; far above rounding errors in float32
FAR = 1e-3  # where the kernel is below this, it is taken to be zero


# ---- smooth masks, section 3.3 --------------------------------------------------------------------


def kernel(cell: tuple[float, float], sigma: float, size: tuple[int, int]) -> Tensor:
    """k(u) = exp(-max(0, |u| / sigma - 1)^2 / 4) at the places of the lattice around one, (2 p + 1, 2 q + 1) float64.

    It is one up to ``sigma`` pixels away, a half at 2.7 sigma, and set to zero where it is below ``FAR``, 6.3 sigma
    away. ``cell`` is the lattice's spacing in pixels along each axis; ``size`` its number of places, which also
    limits how far the kernel reaches.
    """
    reach = sigma * (1 + 2 * math.sqrt(-math.log(FAR)))
    down, right = (
        torch.arange(-radius, radius + 1, dtype=torch.float64) * step
        for step, radius in ((c, min(int(reach / c), n - 1)) for c, n in zip(cell, size, strict=True))
    )
    distance = torch.hypot(down[:, None], right) / sigma
    k = torch.exp(-((distance - 1).clamp(min=0) ** 2) / 4)
    return k.masked_fill(k < FAR, 0)


def smooth_max(parameters: Tensor, kernel: Tensor, temperature: float) -> Tensor:
    """(N, h, w) -> (N, h, w): m(u) = smax over v of k(u - v) parameters(v), where the kernel is not zero.

    smax f = sum f exp(f / T) / sum exp(f / T): the mean as T goes to infinity, the maximum as T goes to 0.
    Only places on the lattice count.
    """
    side, like = image_size(kernel), parameters[:1, None]
    pad = (side[0] // 2, side[1] // 2)
    k = kernel.to(parameters).flatten()[:, None]
    there = (F.unfold(torch.ones_like(like), side, padding=pad) > 0) & (k > 0)
    f = F.unfold(parameters[:, None], side, padding=pad) * k
    weights = (f / temperature).masked_fill(~there, -math.inf).softmax(1)
    return (weights * f).sum(1).view_as(parameters)


# ---- the area, section 3.2 ------------------------------------------------------------------------


def area_loss(masks: Tensor, areas: Sequence[float]) -> Tensor:
    """(N, A, H, W) -> (N, A): mean over pixels of (vecsort(m) - r_a)^2.

    r_a is 1 for the ``a H W`` largest values of the mask and 0 for the others (the value between them gets the
    remainder). As r_a is constant on both parts, nothing is sorted: it is enough to know which values are
    among the largest. Equal values (see ``TIE``) share equally what r_a has for them, so that no place of
    the image is preferred and rounding does not decide.
    """
    values, wanted = masks.detach().flatten(2), []
    pixels = values.shape[2]
    for a, area in enumerate(areas):
        ones = area * pixels
        value = values[:, a]
        # Rank of the smallest value where r_a is not zero. Less 1e-6, because 0.2 * 10 may be just above 2.
        rank = min(max(math.ceil(ones - 1e-6), 1), pixels)
        border = value.kthvalue(pixels - rank + 1, dim=1, keepdim=True).values
        above, equal = value > border + TIE, (value - border).abs() <= TIE
        share = (ones - above.sum(1, keepdim=True)).to(value) / equal.sum(1, keepdim=True)
        wanted.append(torch.where(equal, share, above.to(value)))
    reference, m = torch.stack(wanted, dim=1), masks.flatten(2)
    return (m**2 - 2 * reference * m + reference).mean(2)


# ---- perturbations, section 3.1 -------------------------------------------------------------------


def blur(x: Tensor, sigma: float) -> Tensor:
    """(..., H, W) -> the same, blurred by a Gaussian of ``sigma`` pixels; at borders its weights inside the image are
    renormalised."""
    if sigma == 0:
        return x

    def matrix(n: int) -> Tensor:
        place = torch.arange(n, device=x.device, dtype=x.dtype)
        return (-0.5 * ((place[:, None] - place) / sigma) ** 2).softmax(1)

    return matrix(x.shape[-2]) @ x @ matrix(x.shape[-1]).T


class Perturbed(NamedTuple):
    """Inputs under masks, and how they change with the masks."""

    x: Tensor  # (B, G, C, H, W)
    slope: Tensor  # (B, G, C, H, W) d x / d m


def perturb(pyramid: Tensor, m: Tensor) -> Perturbed:
    """Each pixel of the input under masks m (B, G, H, W): level (1 - m) (L - 1) of ``pyramid``, linear between levels.

    pyramid   (B, L, C, H, W): level 0 is the input, level L - 1 what remains of it where m is 0
    """
    top = pyramid.shape[1] - 1
    position = (1 - m) * top
    level = position.floor().clamp(0, top - 1)
    share = (position - level)[:, :, None]
    index = level.long()[:, :, None, None]  # (B, G, 1, 1, H, W)
    shape = (len(m), m.shape[1], 1, *pyramid.shape[2:])
    levels = pyramid[:, None].expand(-1, m.shape[1], -1, -1, -1, -1)
    low, high = (levels.gather(2, (index + i).expand(shape)).squeeze(2) for i in (0, 1))
    step = high - low
    return Perturbed(low + share * step, -top * step)


# ---- the method -----------------------------------------------------------------------------------


class OptimisedMasks(NamedTuple):
    """The masks of B samples and A areas after the optimisation."""

    masks: Tensor  # (B, A, H, W)
    lattice: Tensor  # (B, A, h, w) the same before upsampling
    game: Tensor  # (B, A, steps) the term of the loss that depends on the target's score
    area: Tensor  # (B, A, steps) ``area_loss``


@dataclass(frozen=True)
class ExtremalPerturbation(Method):
    """For each area the smooth mask that is best for the target's score; the map is the sum of these masks.

    game           preserve: the score of the image inside the mask is high; delete: that of the image outside is
                   low; dual: the difference between the two is large
    areas          of the masks, as shares of the image
    steps          of the optimiser, each with a forward and a backward pass for every area (dual: two)
    optimizer      sgd, with ``momentum``; or adam, which needs fewer steps and ignores ``momentum``
    lr             learning rate
    area_weight    lambda of the area loss; it is multiplied by ``area_growth`` after every step
    stride         pixels between the places of the parameter mask
    sigma          of the kernel, in pixels, see ``kernel``: the radius around a single place in which the mask is 1
    temperature    of the smooth maximum, see ``smooth_max``
    perturbation   what replaces the image outside a mask. blur: Gaussian blur that increases as the mask falls, up
                   to ``max_blur`` pixels, interpolated between ``levels``; zero or mean: the image fades to 0 in
                   normalised units, or to its own mean colour
    initial        share of the input that is visible before the first step: the parameter mask has this value
                   everywhere (in the deletion game 1 minus this)
    smooth         standard deviation of a Gaussian blur of the finished map, as a share of the image's shorter
                   side; 0 for none. The paper takes 0.09 for the pointing game

    The defaults of lengths in pixels are for images of 224 x 224, of which a single place shows 2.3 %, less than any
    of the areas. Images so small that a place shows more than the largest area are refused. The score is the logit.
    With initial=1, where the whole input is visible at first, the masks keep clearly more of the score than with 0.5,
    where the image is blurred and the gradient says little. With zero or mean take an area_weight of about 30: with
    more, the area determines the masks before the score does.

    Four areas and 800 steps are 3,200 forward and backward passes per image. A tenth is enough with optimizer=adam,
    lr=0.05, steps=80, area_growth=1.0355 (lambda then ends at the same value); areas come out up to a fifth too large.
    With EfficientNet-Lite0 that takes about 20 s of one CPU core per image, instead of 4 min.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=ExtremalPerturbation(steps=2, stride=1, sigma=1.0)).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.extremal.ExtremalPerturbation"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "sum of the masks of all areas, 0 .. number of areas"}
    EXTRAS: ClassVar[Mapping[str, str]] = {
        "masks": "mask of each area on its lattice, before it is upsampled, (A, h, w), 0 .. 1",
        "area": "share of the image that each mask covers in the end (the mean of the mask), (A,)",
        "kept": "target's logit of the image inside each mask, (A,)",
        "removed": "target's logit of the image outside each mask, (A,)",
        "loss": "total loss at each step, sum over areas",
        "curve_game": "what the game minimises of the target's logit, (A, steps)",
        "curve_area": "area loss before its weight, (A, steps)",
    }

    game: Game = "preserve"
    areas: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)
    steps: int = 800
    optimizer: Optimizer = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    area_weight: float = 300.0
    area_growth: float = 1.0035
    stride: int = 7
    sigma: float = 7.0
    temperature: float = 0.05
    perturbation: Perturbation = "blur"
    max_blur: float = 20.0
    levels: int = 8
    initial: float = 1.0
    smooth: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "areas", tuple(self.areas))  # YAML has lists
        require(self, "game", one_of=get_args(Game))
        require(self, "perturbation", one_of=get_args(Perturbation))
        require(self, "optimizer", one_of=get_args(Optimizer))
        if not self.areas or not all(0 < area < 1 for area in self.areas):
            raise UserError(
                f"ExtremalPerturbation.areas is {self.areas}, must be shares of the image, each above 0 and below 1"
            )
        require(self, "steps", "stride", "area_growth", at_least=1)
        require(self, "levels", at_least=2)
        require(self, "lr", "sigma", "temperature", "max_blur", above=0)
        require(self, "area_weight", "smooth", at_least=0)
        require(self, "momentum", at_least=0, below=1)
        require(self, "initial", at_least=0, at_most=1)

    def pyramid(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, C, H, W): the input, then ever more perturbed versions of it."""
        if self.perturbation == "blur":
            most = self.levels - 1
            return torch.stack([blur(x, self.max_blur * level / most) for level in range(self.levels)], dim=1)
        end = torch.zeros_like(x) if self.perturbation == "zero" else x.mean((-2, -1), keepdim=True).expand_as(x)
        return torch.stack((x, end), dim=1)

    def lattice(self, image: tuple[int, int]) -> tuple[tuple[int, int], Tensor]:
        """How many places the parameter mask has from top to bottom and from left to right, and the kernel.

        Raises UserError if a mask that shows one place in the middle, and so the kernel around it, is larger than all
        areas: then none of the masks could be a region of its area, and at the default lr they jump between nothing and
        the whole image.
        """
        height, width = image
        size = (-(-height // self.stride), -(-width // self.stride))
        k = kernel((height / size[0], width / size[1]), self.sigma, size)
        one = torch.zeros(1, *size, dtype=k.dtype)
        one[0, size[0] // 2, size[1] // 2] = 1
        share = float(resizing(size, image, one)(smooth_max(one, k, self.temperature)).mean())
        if share > max(self.areas):
            part = math.sqrt(height * width) / 224
            raise UserError(
                f"ExtremalPerturbation.sigma is {self.sigma:g} and stride {self.stride}, with which the smallest mask "
                f"covers {share:.0%} of images of {height} x {width}, more than the largest of the areas, "
                f"{max(self.areas):.0%}. The defaults are for images of 224 x 224; for these, set "
                f"stride={max(1, round(7 * part))}, sigma={7 * part:.2g}, max_blur={20 * part:.2g}"
            )
        return size, k

    def optimise(self, model: Classifier, x: Tensor, target: Tensor) -> OptimisedMasks:
        """The optimised masks. The loss is a sum over samples and areas, so that all are optimised together.

        Between two levels the perturbed image is linear in the mask, so its gradient is known without a graph.
        """
        count, image = len(self.areas), image_size(x)
        size, k = self.lattice(image)
        k = k.to(x)
        initial = 1 - self.initial if self.game == "delete" else self.initial
        parameters = x.new_full((len(x) * count, *size), initial).requires_grad_()
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD([parameters], lr=self.lr, momentum=self.momentum)
        else:
            optimizer = torch.optim.Adam([parameters], lr=self.lr)
        pyramid, enlarge = self.pyramid(x), resizing(size, image, x)
        curves: list[tuple[Tensor, Tensor]] = []

        def masks() -> tuple[Tensor, Tensor]:
            small = smooth_max(parameters, k, self.temperature)
            return small.unflatten(0, (-1, count)), enlarge(small).unflatten(0, (-1, count))

        for step in range(self.steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                _, m = masks()
                area = area_loss(m, self.areas)
            value, grad = self._play(model, pyramid, m.detach(), target)
            weight = self.area_weight * self.area_growth**step
            torch.autograd.backward([m, area], [grad, torch.full_like(area, weight)])
            optimizer.step()
            with torch.no_grad():
                parameters.clamp_(0, 1)
            curves.append((value, area.detach()))
        with torch.no_grad():
            small, m = masks()
        return OptimisedMasks(m, small, *(torch.stack(curve, dim=2) for curve in zip(*curves, strict=True)))

    def _play(self, model: Classifier, pyramid: Tensor, m: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss term of the target's score, (B, A), and its gradient at the masks, (B, A, H, W)."""
        values, grads = torch.zeros_like(m[..., 0, 0]), torch.zeros_like(m)
        for inside in {"preserve": (True,), "delete": (False,), "dual": (True, False)}[self.game]:
            x, slope = perturb(pyramid, m if inside else 1 - m)
            score, grad = model.gradient(x.flatten(0, 1), _score(target, m.shape[1]))
            values += (-1 if inside else 1) * score.unflatten(0, (-1, m.shape[1]))
            # Inside, -score(m) is minimised; outside score(1 - m), whose slope has the opposite sign.
            grads -= (grad.view_as(slope) * slope).sum(2)
        return values, grads

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        x, count = batch.x, len(self.areas)
        found = self.optimise(model, x, batch.target)
        pyramid, target = self.pyramid(x), batch.target.repeat_interleave(count, dim=0)

        def score(m: Tensor) -> Tensor:
            logits = model.logits(perturb(pyramid, m).x.flatten(0, 1))
            return target_score(logits, target).unflatten(0, (-1, count))

        weights = self.area_weight * self.area_growth ** torch.arange(self.steps, device=x.device, dtype=x.dtype)
        return {
            "map": blur(found.masks.sum(1), self.smooth * min(x.shape[-2:])),
            "masks": found.lattice,
            "area": found.masks.mean((-2, -1)),
            "kept": score(found.masks),
            "removed": score(1 - found.masks),
            "loss": (found.game + weights * found.area).sum(1),
            "curve_game": found.game,
            "curve_area": found.area,
        }


def _score(target: Tensor, count: int) -> Callable[[Tensor, slice], Tensor]:
    """The target's score as an objective, for ``count`` rows per sample."""
    repeated = target.repeat_interleave(count, dim=0)
    return lambda logits, rows: target_score(logits, repeated[rows])
