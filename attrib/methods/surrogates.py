"""LIME and Kernel SHAP: a linear model of the score, given which words (or tiles of an image) are present.

captum fits this surrogate, one sample at a time. This module gives it masks from each sample's own
stream and the net's scores of them; masks of several samples go through the net together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.methods.parts.unit_scores import Baseline, removed
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch
from attrib.units import Units

_BLOCK = 64  # masks drawn at a time, so that long texts need little memory; with another number the draws differ


class Masks(NamedTuple):
    """R masks; those of a sample lie next to each other."""

    keep: Tensor  # (R, n) bool: which units are present
    owner: Tensor  # (R,) the sample
    weight: Tensor  # (R,) in the fit; infinite: the surrogate must be exact there

    @classmethod
    def of(cls, keep: Tensor, weight: Tensor, valid: Tensor) -> Masks:
        """From keep (B, M, n) and weight (B, M); only masks that are ``valid`` (B, M) bool exist."""
        owner = torch.arange(len(keep), device=keep.device)[:, None].expand_as(valid)
        return cls(keep[valid], owner[valid], weight[valid])


def _random_subsets(noise: Noise, units: Units, size: Tensor) -> Tensor:
    """(B, M) sizes -> (B, M, n) bool: for each size a random subset of so many units."""
    blocks = []
    for sizes in size.split(_BLOCK, dim=1):
        score = noise.uniform(sizes.shape[1], units.most, ragged=1).masked_fill(~units.exist, 2.0)
        rank = score.argsort(dim=2, stable=True).argsort(dim=2)
        blocks.append(rank < sizes.unsqueeze(2))
    return torch.cat(blocks, dim=1)


# ---- the surrogates, on the CPU in float64 ------------------------------------------------------


def _least_squares(rows: Tensor, values: Tensor) -> Tensor:
    """The best solution; of several, as when there are few masks, the one with the smallest norm."""
    return torch.linalg.lstsq(rows, values[:, None], driver="gelsd").solution[:, 0]


def ridge(keep: Tensor, scores: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The b (n,) that minimises the sum of weight (score - intercept - keep . b)^2, plus alpha |b|^2.

    keep (M, n), scores (M,), weight (M,).
    """
    share, root = (weight / weight.sum())[:, None], weight.sqrt()[:, None]
    rows, values = root * (keep - (share * keep).sum(0)), root[:, 0] * (scores - (share[:, 0] * scores).sum())
    n = keep.shape[1]
    return _least_squares(
        torch.cat((rows, alpha**0.5 * torch.eye(n).to(rows))), torch.cat((values, torch.zeros(n).to(values)))
    )


def shapley(keep: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
    """(n,): values by weighted least squares that are exact for the masks of all units and of none.

    Those two, whose weight is infinite, determine the sum of the values; the remainder is fitted among
    the vectors that sum to zero. keep (M, n), scores (M,), weight (M,).
    """
    full, empty = keep.all(1), ~keep.any(1)
    change = scores[full][0] - scores[empty][0]
    n, size = keep.shape[1], keep.sum(1)
    root = torch.where(weight.isinf(), 0, weight).sqrt()
    rows = root[:, None] * (keep - (size / n)[:, None])
    return change / n + _least_squares(rows, root * (scores - scores[empty][0] - change * size / n))


class _Surrogate:
    """An interpretable model as captum's LIME expects it."""

    def __init__(self, solve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.solve, self.found = solve, torch.empty(0)

    def fit(self, data: DataLoader) -> None:
        # Iterating over the loader would draw from torch's global generator.
        assert isinstance(data.dataset, TensorDataset)
        self.found = self.solve(*(t.double() for t in data.dataset.tensors))

    def representation(self) -> Tensor:
        return self.found


def _fit(keep: Tensor, scores: Tensor, weight: Tensor, solve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """captum's LIME on masks whose scores are known: what it takes for inputs are the numbers of the masks."""
    from captum import attr  # takes half a second to import

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
    """What LIME and Kernel SHAP have in common; they differ in ``masks`` and ``solve``."""

    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    samples: int = 500
    baseline: Baseline = "zero"
    tiles: int = 7

    def __post_init__(self) -> None:
        require(self, "samples", at_least=2)
        require(self, "baseline", one_of=get_args(Baseline))
        require(self, "tiles", at_least=1)

    def masks(self, units: Units, noise: Noise) -> Masks:
        """The masks of all samples, each sample's from its own stream."""
        raise NotImplementedError

    def solve(self, keep: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        """Masks (M, n), scores (M,) and weights (M,) of one sample -> (n,) values of its units."""
        raise NotImplementedError

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        units = Units.tiles(batch, self.tiles) if batch.mask is None else Units.words(batch)
        inputs, masks = Inputs.of(model, batch), self.masks(units, noise)
        values = torch.zeros(len(batch), units.most, dtype=torch.float64)
        if len(masks.owner):  # a batch of texts may have no word at all
            without = removed(model, batch, inputs, self.baseline, type(self).__name__)
            scores = self._scores(model, inputs, without, units, masks).cpu().double()
            rows = torch.bincount(masks.owner, minlength=len(batch)).tolist()
            parts = (t.cpu().split(rows) for t in (masks.keep, scores, masks.weight))
            for i, (n, keep, score, weight) in enumerate(zip(units.n.tolist(), *parts, strict=True)):
                if n > 0:
                    # captum keeps scores in float32, so it gets only their differences from the whole sample's.
                    values[i, :n] = _fit(keep[:, :n], score - score[keep[:, :n].all(1)][0], weight, self.solve)
        return {"map": units.spread(values.to(inputs.x))}

    @staticmethod
    def _scores(model: Classifier, inputs: Inputs, without: Tensor, units: Units, masks: Masks) -> Tensor:
        """(R,) the target's score under every mask; ``without`` (B, *input) has every unit removed."""
        flat, channels = units.of.flatten(1), 1 if inputs.mask is None else -1

        def piece(rows: slice) -> Tensor:
            at = masks.owner[rows]
            there = masks.keep[rows].gather(1, flat[at].clamp(min=0)) | (flat[at] < 0)
            there = there.view(-1, *units.of.shape[1:]).unsqueeze(channels)
            x = torch.where(there, inputs.x[at], without[at])
            return inputs.score()(x, *(t[at] for t in (inputs.target, *inputs.rest)))

        with torch.no_grad():
            return model.chunked(piece, len(masks.owner))


@dataclass(frozen=True)
class Lime(_Removal):
    """Weights of a ridge regression around the sample (Ribeiro, Singh & Guestrin, 2016, eq. 1 and 2).

    Each mask removes r random units, where r is uniform on 1 .. n (their section 3.3); the first mask
    removes none. The weight of a mask is exp(-d^2 / (2 kernel_width^2)), where d is its cosine distance from
    the mask of ones. The map divides a word's weight equally among its tokens, a tile's among its pixels.

    samples        masks
    kernel_width   0.25, for distances from 0 to 1, is what the authors' program uses for images, and for
                   texts too, where it calls it 25 of 100; the paper's sigma is sqrt(2) times this
    alpha          factor of the penalty alpha |weights|^2, which replaces the paper's Omega; 1 in the program
    baseline       what replaces a removed word: the "zero" vector, or the net's "mask" token. Special tokens
                   always stay. Of images "zero", the data's mean colour, or "mean", the image's own
    tiles          along each side of an image

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=Lime(samples=8)).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.surrogates.Lime"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; a word's or tile's weight is its sum"}
    kernel_width: float = 0.25
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "kernel_width", above=0)
        require(self, "alpha", at_least=0)

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

    If ``samples`` allows it, all 2^n masks are used, weighted by the Shapley kernel, and the values are exact.
    Otherwise ``samples`` of them: all units, none, and pairs of a mask and its complement, whose sizes are
    drawn from the kernel. The map sums to the change of the logit from "all units removed" to the sample. It
    divides a word's value equally among its tokens, a tile's among its pixels.

    samples    masks; if there are fewer than units, the values that fit are not unique and the smallest are taken
    baseline   what replaces a removed word: the "zero" vector, or the net's "mask" token. Special tokens always
               stay. Images have only zero, the data's mean colour
    tiles      along each side of an image

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=KernelShap(samples=8)).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.surrogates.KernelShap"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
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
        """Weight of a mask of k of n units: (n - 1) / (C(n, k) k (n - k)); infinite for k = 0 and k = n."""
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
