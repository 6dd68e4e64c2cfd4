"""LIME and Kernel SHAP: a linear model of which words (or tiles of an image) are there.

captum fits the surrogate, one sample at a time; this module gives it masks from each sample's own
stream, and the net's scores of them, for which the masks of several samples share a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from captum import attr
from torch import Tensor
from torch.utils.data import DataLoader

from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Units

Baseline = Literal["zero", "mask"]

_BLOCK = 64  # masks drawn at a time, so that long texts do not need much memory; another number is another draw


class Masks(NamedTuple):
    """Which units are there, in R rows; the rows of a sample lie next to each other."""

    keep: Tensor  # (R, n) bool
    owner: Tensor  # (R,) the sample
    weight: Tensor  # (R,) in the fit; inf: the surrogate must be exact

    @classmethod
    def of(cls, keep: Tensor, weight: Tensor, valid: Tensor) -> Masks:
        """From (B, M, n), (B, M) and, where M differs between samples, (B, M) bool."""
        owner = torch.arange(len(keep), device=keep.device)[:, None].expand_as(valid)
        return cls(keep[valid], owner[valid], weight[valid])


def _random_subsets(noise: Noise, units: Units, size: Tensor) -> Tensor:
    """(B, M) sizes -> (B, M, n) bool, each mask a random subset of the units of that size."""
    blocks = []
    for sizes in size.split(_BLOCK, dim=1):
        score = noise.uniform(sizes.shape[1], units.most, ragged=1).masked_fill(~units.exist, 2.0)
        rank = score.argsort(dim=2, stable=True).argsort(dim=2)
        blocks.append(rank < sizes.unsqueeze(2))
    return torch.cat(blocks, dim=1)


# ---- the surrogates, on the CPU in float64 ------------------------------------------------------


def _least_squares(rows: Tensor, values: Tensor) -> Tensor:
    """The smallest of the best solutions: few masks may leave the units' values open."""
    return torch.linalg.lstsq(rows, values[:, None], driver="gelsd").solution[:, 0]


def ridge(keep: Tensor, scores: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """(M, n), (M,), (M,) -> (n,): minimises sum of weight (score - intercept - keep . b)^2 + alpha |b|^2."""
    share, root = (weight / weight.sum())[:, None], weight.sqrt()[:, None]
    rows, values = root * (keep - (share * keep).sum(0)), root[:, 0] * (scores - (share[:, 0] * scores).sum())
    n = keep.shape[1]
    return _least_squares(
        torch.cat((rows, alpha**0.5 * torch.eye(n).to(rows))), torch.cat((values, torch.zeros(n).to(values)))
    )


def shapley(keep: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
    """(M, n), (M,), (M,) -> (n,): weighted least squares that is exact with all units and with none.

    Those two masks have an infinite weight. The values' sum is fixed by them; what is left is fitted
    in the plane of the vectors that sum to zero.
    """
    full, empty = keep.all(1), ~keep.any(1)
    change = scores[full][0] - scores[empty][0]
    n, size = keep.shape[1], keep.sum(1)
    root = torch.where(weight.isinf(), 0, weight).sqrt()
    rows = root[:, None] * (keep - (size / n)[:, None])
    return change / n + _least_squares(rows, root * (scores - scores[empty][0] - change * size / n))


class _Surrogate:
    """An interpretable model as captum's LIME wants it."""

    def __init__(self, solve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.solve, self.found = solve, torch.empty(0)

    def fit(self, data: DataLoader) -> None:
        # Not by iterating over the loader, which draws from torch's global generator.
        self.found = self.solve(*(t.double() for t in data.dataset.tensors))

    def representation(self) -> Tensor:
        return self.found


def _fit(keep: Tensor, scores: Tensor, weight: Tensor, solve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """captum's LIME on masks whose scores are known: its "inputs" are the masks' numbers."""

    def numbers(_: Tensor, **kwargs: Any) -> Iterator[Tensor]:
        yield from torch.arange(len(keep)).split(1)

    lime = attr.LimeBase(
        forward_func=lambda at: scores[at],
        interpretable_model=_Surrogate(solve),
        similarity_func=lambda _, at, __, **kwargs: weight[at],
        perturb_func=numbers,
        perturb_interpretable_space=False,
        from_interp_rep_transform=None,
        to_interp_rep_transform=lambda at, _, **kwargs: keep[at],
    )
    return lime.attribute(torch.zeros(1), n_samples=len(keep), perturbations_per_eval=len(keep))


# ---- the methods --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Removal(Method):
    """What both have in common; their ``masks`` and ``solve`` differ."""

    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    samples: int = 500
    baseline: Baseline = "zero"
    tiles: int = 7

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.baseline not in get_args(Baseline):
            raise UserError(f"{name}.baseline is {self.baseline!r}, must be one of {', '.join(get_args(Baseline))}")
        for field, least in (("samples", 2), ("tiles", 1)):
            if vars(self)[field] < least:
                raise UserError(f"{name}.{field} is {vars(self)[field]}, must be at least {least}")

    def masks(self, units: Units, noise: Noise) -> Masks:
        raise NotImplementedError

    def solve(self, keep: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        units = Units.tiles(batch, self.tiles) if batch.mask is None else Units.words(batch)
        inputs, masks = Inputs.of(model, batch), self.masks(units, noise)
        values = torch.zeros(len(batch), units.most, dtype=torch.float64)
        if len(masks.owner):  # a batch of texts may have no word at all
            scores = self._scores(model, inputs, self._removed(model, batch, inputs), units, masks).cpu().double()
            rows = torch.bincount(masks.owner, minlength=len(batch)).tolist()
            parts = (t.cpu().split(rows) for t in (masks.keep, scores, masks.weight))
            for i, (n, keep, score, weight) in enumerate(zip(units.n.tolist(), *parts, strict=True)):
                if n > 0:
                    # captum keeps scores in float32, so it gets their differences to that of the whole sample.
                    values[i, :n] = _fit(keep[:, :n], score - score[keep[:, :n].all(1)][0], weight, self.solve)
        return {"map": units.spread(values.to(inputs.x))}

    def _removed(self, model: Classifier, batch: Batch, inputs: Inputs) -> Tensor:
        """(B, *input) with every unit removed."""
        if self.baseline == "zero":
            return torch.zeros_like(inputs.x)
        if batch.words is None:
            raise UserError(f"{type(self).__name__}.baseline is 'mask', a token of texts; images have only 'zero'")
        return model.until(EMBEDDING, torch.where(batch.words >= 0, model.module.mask_id, batch.x)).z

    @staticmethod
    def _scores(model: Classifier, inputs: Inputs, removed: Tensor, units: Units, masks: Masks) -> Tensor:
        """(R,) the target's score of every mask."""
        flat, channels = units.of.flatten(1), 1 if inputs.mask is None else -1

        def piece(rows: slice) -> Tensor:
            at = masks.owner[rows]
            there = masks.keep[rows].gather(1, flat[at].clamp(min=0)) | (flat[at] < 0)
            there = there.view(-1, *units.of.shape[1:]).unsqueeze(channels)
            x = torch.where(there, inputs.x[at], removed[at])
            return inputs.score()(x, *(t[at] for t in (inputs.target, *inputs.rest)))

        with torch.no_grad():
            return model.chunked(piece, len(masks.owner))


@dataclass(frozen=True)
class Lime(_Removal):
    """Weights of a ridge regression around the sample (Ribeiro, Singh & Guestrin, 2016, eq. 1 and 2).

    Each mask removes r units, r uniform on 1 .. n, which ones at random (their section 3.3); the first
    mask removes none. Mask z counts exp(-d^2 / (2 width^2)), d the cosine distance of z and the mask of
    ones. The map shares a word's weight equally among its tokens, a tile's among its pixels.

    samples        masks
    kernel_width   0.25, of distances from 0 to 1, is what the authors' program uses for images, and for
                   texts too, where it calls it 25 of 100; the paper's sigma is sqrt(2) times this
    alpha          of the penalty alpha |weights|^2 in the place of the paper's Omega; 1 is that of the program
    baseline       in the place of a removed word: "zero" vector, or the net's "mask" token. Special tokens
                   stay. Images: zero, the data's mean colour
    tiles          of images: tiles along each side
    """

    NAME: ClassVar[str] = "attrib.methods.surrogates.Lime"
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; a word's or tile's weight is its sum"}
    kernel_width: float = 0.25
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_width <= 0:
            raise UserError(f"Lime.kernel_width is {self.kernel_width}, must be above 0")
        if self.alpha < 0:
            raise UserError(f"Lime.alpha is {self.alpha}, must not be negative")

    def masks(self, units: Units, noise: Noise) -> Masks:
        n = units.n[:, None]
        removed = 1 + (noise.uniform(self.samples).double() * n).long()
        removed[:, 0] = 0
        keep = ~_random_subsets(noise, units, removed) & units.exist
        distance = 1 - (keep.sum(2) / n.clamp(min=1)).double().sqrt()
        return Masks.of(keep, torch.exp(-((distance / self.kernel_width) ** 2) / 2), (n > 0).expand_as(distance))

    def solve(self, keep: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        return ridge(keep, scores, weight, self.alpha)


@dataclass(frozen=True)
class KernelShap(_Removal):
    """Shapley values by weighted least squares (Lundberg & Lee, 2017, theorem 2).

    All 2^n masks with the Shapley kernel where ``samples`` allows it (then the values are exact), else
    ``samples`` of them: all units, none, and pairs of a mask and its complement, of sizes drawn from
    the kernel. The map sums to the change of the logit from "all units removed" to the sample; it
    shares a word's value equally among its tokens, a tile's among its pixels.

    samples    masks; fewer than units leave the values open, and the smallest that fit are taken
    baseline   in the place of a removed word: "zero" vector, or the net's "mask" token. Special tokens stay.
               Images: zero, the data's mean colour
    tiles      of images: tiles along each side
    """

    NAME: ClassVar[str] = "attrib.methods.surrogates.KernelShap"
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums to the change of the logit"}

    def masks(self, units: Units, noise: Noise) -> Masks:
        drawn, n = self._drawn(units, noise), units.n[:, None]
        number = torch.arange(self.samples, device=n.device)
        unit = torch.arange(units.most, device=n.device)
        binary = (number[:, None] >> unit.clamp(max=62)) & 1 > 0
        every = 2.0**n <= self.samples
        keep = torch.where(every[:, :, None], binary, drawn)
        size = keep.sum(2)
        kernel = torch.where(every, self._kernel(n.double(), size.double()), 1.0)
        kernel = kernel.masked_fill((size == 0) | (size == n), torch.inf)
        return Masks.of(keep, kernel, (n > 0) & (~every | (number < 2.0**n)))

    @staticmethod
    def _kernel(n: Tensor, k: Tensor) -> Tensor:
        """Weight of a mask of k among n units: (n - 1) / (C(n, k) k (n - k)); infinite at 0 and n."""
        combinations = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
        return (n - 1) / (combinations.exp() * k * (n - k))

    def _drawn(self, units: Units, noise: Noise) -> Tensor:
        """(B, M, n) bool: all units, none, random masks, their complements."""
        n, size = units.n[:, None], torch.arange(1, units.most + 1, device=units.n.device)
        pairs = (self.samples - 1) // 2
        chance = torch.where(size < n, 1 / (size * (n - size)).double(), 0).cumsum(1)
        target = noise.uniform(pairs).double() * chance[:, -1:]
        k = 1 + torch.searchsorted(chance, target, right=True)
        half = _random_subsets(noise, units, torch.minimum(k, n - 1))
        ends = units.exist.expand(-1, 2, -1) & torch.tensor([[True], [False]], device=n.device)
        return torch.cat((ends, half, ~half & units.exist), dim=1)[:, : self.samples]

    def solve(self, keep: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        return shapley(keep, scores, weight)
