"""Infidelity: how far the map is from predicting what a perturbation costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import BASELINES, OUTPUTS, Baseline, baseline, own_score, score_grid, score_rows
from attrib.metrics.words import REMOVALS, Removal, score_subsets
from attrib.models import Classifier, ScoreScale
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Units

Perturbation = Literal["square", "noise"]
Scale = Literal["positive", "any"]


class Squares(NamedTuple):
    """M squares of each of B samples; those with weight False are padding."""

    first: Tensor  # (B, M, D) int64: the first place inside, along each axis
    side: Tensor  # (B, M) int64
    weight: Tensor  # (B, M) bool


@dataclass(frozen=True)
class Infidelity(Metric):
    """Infidelity (Yeh et al., *On the (In)fidelity and Sensitivity of Explanations*, NeurIPS 2019, equation 1):
    with the map m, the target's score f and a random perturbation I of the input x,

        infidelity_unscaled = E [ (I m - (f(x) - f(x - I)))^2 ]        I m: the sum of their product
        infidelity          = the same of beta m, with the best beta = E [ I m (f(x) - f(x - I)) ] / E [ (I m)^2 ]

    Maps of different methods have different units, so methods are to be compared by ``infidelity``, as in the paper's
    released program. Both are in squared units of f, and so cannot compare nets.

    perturbation  "square", the paper's square removal: a square of pixels goes to the ``baseline``, and I is 1 in
                  it, 0 elsewhere, for maps that have the input multiplied in: what a pixel contributes. Of sounds it
                  is a window of time, of texts a run of words. All squares of all ``sides`` are equally likely
                  "noise", the paper's noisy baseline: the whole input goes to a noisy ``baseline`` z, and I = x - z,
                  for maps that say what a pixel's change would do, as gradients. A map has one number for a pixel,
                  I one for each channel: the channels share the pixel's number equally. Not of texts
    samples       perturbations; if there are no more squares than that, each is taken once
    sides         smallest and largest side in pixels, samples or words. null: from 1 to 10 / 28 of the shorter side,
                  the 10 pixels of the released program's digits. What a small input has no room for is left out
    sigma         of the noise, as a share of the input's range (largest minus smallest number), beyond which z does
                  not go; it is the same in all channels
    beta          "positive": not below 0, so that a map that says the opposite is as bad as one that says nothing,
                  E [ (f(x) - f(x - I))^2 ], the largest possible. "any": as in the formula; then a map and its
                  negative score the same
    words         texts: what stands for a removed word, see ``words.score_without``; a word's relevance is the sum
                  over its tokens, special tokens stay
    baseline      images, sounds: what stands for a removed place, see ``perturb.baseline``
    output        "logit" or "probability"

    captum 0.9's ``infidelity`` gives the same numbers for the same perturbations (``tests/test_infidelity.py``), with
    ``normalize`` if beta is "any". A map with NaN or infinite values, and a text without words: NaN. Costs
    ``samples`` forward passes, and one; equal squares share theirs.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> rows = attrib.evaluate(net, x, torch.rand(1, 32, 32), Infidelity(samples=2))
    >>> list(rows["column"])
    ['infidelity', 'infidelity_unscaled']
    """

    NAME: ClassVar[str] = "attrib.metrics.infidelity.Infidelity"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    NEEDS_LOGITS: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"infidelity": "lower", "infidelity_unscaled": "lower"}
    ABOUT: ClassVar[Mapping[str, str]] = {
        "infidelity": "squared error of the map, at its best scale, as a forecast of what perturbations cost",
        "infidelity_unscaled": "the same of the map as it is",
    }

    perturbation: Perturbation = "square"
    samples: int = 500
    sides: tuple[int, int] | None = None
    sigma: float = 0.2
    beta: Scale = "positive"
    words: Removal = "zero"
    baseline: Baseline = "zero"
    output: ScoreScale = "logit"

    def __post_init__(self) -> None:
        require(self, "samples", at_least=1)
        require(self, "sigma", at_least=0)
        if self.sides is not None and (len(self.sides) != 2 or not 1 <= self.sides[0] <= self.sides[1]):
            raise UserError(f"Infidelity.sides is {list(self.sides)}, must be the smallest and largest side, from 1 on")
        require(self, "perturbation", one_of=get_args(Perturbation))
        require(self, "beta", one_of=get_args(Scale))
        require(self, "words", one_of=REMOVALS)
        require(self, "baseline", one_of=BASELINES)
        require(self, "output", one_of=OUTPUTS)

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output == "probability"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("embedding",) if self.words == "zero" else ()

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W), sound (B, L), text (B, T) -> two columns (B,), float64 on the model's device.

        Raises ValueError if the map does not fit the inputs, UserError for texts and "noise".
        """
        expected = batch.x.shape if batch.words is not None else (len(batch), *batch.x.shape[2:])
        if map.shape != expected:
            raise ValueError(f"Infidelity: a map of shape {tuple(map.shape)} does not fit {tuple(batch.x.shape)}")
        batch = batch.to(model.device, None if batch.words is not None else model.dtype)
        map = map.detach().to(model.device).double()
        ignored = torch.zeros_like(map, dtype=torch.bool) if batch.mask is None else ~batch.mask
        defined = (map.isfinite() | ignored).flatten(1).all(1)
        map = torch.where(map.isfinite(), map, 0.0)
        if batch.words is not None:
            units = Units.words(batch)
            map, sizes, defined = units.sum(map), units.n[:, None], defined & (units.n > 0)
        else:
            sizes = torch.tensor(map.shape[1:], device=map.device).expand(len(map), -1)

        if self.perturbation == "square":
            squares = self._squares(sizes, noise)
            said, weight = sums(map, squares), squares.weight.double()
            cost = self._costs(model, batch, squares)
        elif batch.words is not None:
            raise UserError("Infidelity.perturbation is 'noise', which texts do not have; set it to square")
        else:
            said, cost = self._noisy(model, batch, map, noise)
            weight = torch.ones_like(said)

        def mean(values: Tensor) -> Tensor:
            return (values * weight).sum(1) / weight.sum(1)

        power = mean(said**2)
        beta = torch.where(power > 0, mean(said * cost) / power, 0.0)
        if self.beta == "positive":
            beta = beta.clamp(min=0.0)
        return {
            name: mean((scale * said - cost) ** 2).masked_fill(~defined, torch.nan)
            for name, scale in (("infidelity", beta[:, None]), ("infidelity_unscaled", 1.0))
        }

    def _squares(self, sizes: Tensor, noise: Noise) -> Squares:
        """(B, D) places along each axis -> uniform among all squares that fit."""
        shorter = sizes.amin(1).clamp(min=1)
        if self.sides is None:
            least, most = torch.ones_like(shorter), ((20 * shorter + 28) // 56).clamp(min=1)  # rounded
        else:
            least, most = (shorter.clamp(max=side) for side in self.sides)
        side = torch.arange(1, int(most.max()) + 1, device=sizes.device)
        room = (sizes[:, None] - side[:, None] + 1).clamp(min=1)  # (B, S, D)
        there = (side >= least[:, None]) & (side <= most[:, None])
        before = (room.prod(2) * there).cumsum(1)
        total = before[:, -1:]

        column = torch.arange(self.samples, device=sizes.device)
        drawn = noise.integers(1 << 62, self.samples).to(sizes.device)
        number = torch.where(total <= self.samples, column.minimum(total - 1), drawn % total)
        at = torch.searchsorted(before, number, right=True)
        number = number - torch.where(at > 0, before.gather(1, (at - 1).clamp(min=0)), 0)
        first: list[Tensor] = []
        room = room.gather(1, at[..., None].expand(-1, -1, sizes.shape[1]))
        for places in reversed(room.unbind(2)):
            first.insert(0, number % places)
            number = number // places
        return Squares(torch.stack(first, 2), side[at], (total > self.samples) | (column < total))

    def _costs(self, model: Classifier, batch: Batch, squares: Squares) -> Tensor:
        """(B, M): the score of the input minus that without a square."""
        n, m = squares.side.shape
        everything = torch.arange(n, device=model.device)
        owner = everything.repeat_interleave(m)
        each = torch.cat((owner[:, None], squares.side.view(-1, 1), squares.first.flatten(0, 1)), 1)
        rows, place = each.unique(dim=0, return_inverse=True)
        sample, side, first = rows[:, 0], rows[:, 1], rows[:, 2:]

        def inside(rows: slice, axis: int, places: Tensor) -> Tensor:
            """(R, 1) or (R, L) numbers of places -> whether they lie between the square's ends."""
            start = first[rows, axis, None]
            return (places >= start) & (places < start + side[rows, None])

        if batch.words is not None:
            words = batch.words

            def removed(rows: slice) -> Tensor:
                return inside(rows, 0, words[sample[rows]])

            score = score_subsets(model, batch, sample, removed, self.words, self.output)
        else:
            size, base = batch.x.shape[2:], baseline(batch.x, self.baseline)

            def logits(rows: slice) -> Tensor:
                gone = torch.ones((), dtype=torch.bool, device=model.device)
                for axis, places in enumerate(size):
                    along = inside(rows, axis, torch.arange(places, device=model.device))
                    gone = gone & along.view(-1, 1, *(places if axis == d else 1 for d in range(len(size))))
                return model(torch.where(gone, base[sample[rows]], batch.x[sample[rows]]))

            score = score_rows(model, batch.target, sample, logits, self.output)
        return own_score(model, batch, everything, self.output)[:, None] - score[place].view(n, m)

    def _noisy(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """What the map says, and what it costs, to replace the input by ``samples`` noisy baselines: (B, M) each."""
        x, base = batch.x, baseline(batch.x, self.baseline)
        low, high = (edge.view(-1, *[1] * (x.ndim - 1)) for edge in x.flatten(1).aminmax(dim=1))
        everything = torch.arange(len(x), device=x.device)
        before = own_score(model, batch, everything, self.output)[:, None]
        said, cost = [], []
        portion = max(1, model.rows // len(batch))
        for start in range(0, self.samples, portion):
            made = []  # one draw after another, so that portions do not matter
            for _ in range(min(portion, self.samples - start)):
                step = self.sigma * (high - low) * noise.normal(*x.shape[2:]).to(x).unsqueeze(1)
                made.append((base + step).maximum(low).minimum(high))
            z = torch.stack(made, 1)
            said.append(((x[:, None] - z).double().mean(2) * map[:, None]).flatten(2).sum(2))
            cost.append(before - score_grid(model, batch.target, len(made), partial(_chosen, z), self.output))
        return torch.cat(said, 1), torch.cat(cost, 1)


def _chosen(images: Tensor, sample: Tensor, column: Tensor) -> Tensor:
    return images[sample, column]


def sums(map: Tensor, squares: Squares) -> Tensor:
    """(B, *places) and their squares -> (B, M): the sum over each, from a table of the sums up to every place."""
    table = map
    for axis in range(1, map.ndim):
        table = table.cumsum(axis)
    table = F.pad(table, (1, 0) * (map.ndim - 1))
    total = torch.zeros_like(squares.side, dtype=map.dtype)
    for corner in product((0, 1), repeat=map.ndim - 1):
        at = torch.zeros_like(squares.side)
        for axis, far in enumerate(corner):
            at = at * table.shape[axis + 1] + squares.first[..., axis] + far * squares.side
        total += (-1) ** corner.count(0) * table.flatten(1).gather(1, at)
    return total
