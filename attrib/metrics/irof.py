"""IROF: how fast the target's probability falls when superpixels are removed in the map's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import BASELINES, Baseline, baseline, own_score, ranks, score_rows
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch
from attrib.units import Units

STEPS = 100  # equal steps of the segments' share, on which the curve is stored


@dataclass(frozen=True)
class IROF(Metric):
    """Iterative removal of features (Rieger & Hansen, *IROF: a low resource evaluation metric for
    explanation methods*, 2020, section 3).

    The image is cut into superpixels (SLIC). They are removed one after another, the highest *mean* of
    the map first, and stay removed. With p(l) the target's probability without the l best of L:

        irof = mean over l / L in [0, 1] of 1 - p(l) / p(0)      (trapezoid rule, p(0) included)

    the area over the curve: 1 if the class is gone at once, 0 if nothing is lost until the end, below 0
    if the probability rises: without bound where p(0) is small, so that one image decides the mean of many
    (take only samples that are recognised, select.min_confidence). The curve is stored on 100 equal steps.

    segments, compactness   of SLIC, see ``Units.superpixels``. It runs once a sample, on the CPU, and takes
                            longer than the net for small nets
    baseline                what takes a superpixel's place: the image's "mean" colour, as in the paper, "zero" of
                            the normalised image, or "blur"

    quantus 0.6.0 agrees on what is removed and when (``tests/test_irof.py``), and differs in four points.
    Its area begins at p(1) instead of p(0), and is in units of segments, so about L times ours. Its mean
    colour is one number for all channels and images of the batch, and taken anew of what the steps before
    have left. An image with fewer segments than another of its batch loses p(L) / (2 p(0)). So its scores
    depend on the batch. And its default stops at images of more than one channel.

    Equal means are ordered by the sample's own stream, see ``perturb.ranks``. A map with NaN or infinite
    values, and a sample whose target has probability 0, score NaN. Costs L + 1 forward passes.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> rows = attrib.evaluate(net, x, torch.rand(1, 32, 32), IROF())
    >>> list(rows["column"])
    ['irof']
    """

    NAME: ClassVar[str] = "attrib.metrics.irof.IROF"
    VERSION: ClassVar[int] = 2  # 1 cut grey images into a chessboard that ignored them
    NEEDS_PROBABILITIES: ClassVar[bool] = True
    NEEDS_LOGITS: ClassVar[tuple[str, ...]] = ("image",)
    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"irof": "higher"}
    ABOUT: ClassVar[Mapping[str, str]] = {
        "irof": "mean loss of the target's probability while superpixels are removed, the most relevant first",
    }
    CURVES: ClassVar[Mapping[str, str]] = {
        "irof_curve": "x: share of superpixels removed, highest first; y: share of the probability that is left"
    }

    segments: int = 100
    compactness: float = 10.0
    baseline: Baseline = "mean"

    def __post_init__(self) -> None:
        require(self, "segments", at_least=1)
        require(self, "compactness", above=0)
        require(self, "baseline", one_of=BASELINES)

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W) -> ``irof`` (B,) and ``irof_curve`` (B, 101), float64 on the model's device.

        Raises ValueError if the map does not fit the images.
        """
        if batch.x.ndim != 4 or map.shape != (len(batch), *batch.x.shape[2:]):
            raise ValueError(f"IROF: a map of shape {tuple(map.shape)} does not fit images {tuple(batch.x.shape)}")
        left = torch.full((len(batch), STEPS + 1), torch.nan, dtype=torch.float64, device=model.device)
        area = left[:, 0].clone()
        chosen = map.isfinite().flatten(1).all(dim=1).nonzero().squeeze(1)
        if len(chosen):
            units = Units.superpixels(batch[chosen.tolist()], self.segments, self.compactness)
            order = self._order(units, map.detach().to(units.of.device)[chosen.to(units.of.device)], noise, chosen)
            chosen = chosen.to(model.device)
            area[chosen], left[chosen] = self._removed(model, batch, order.to(model.device), units.n, chosen)
        return {"irof": area, "irof_curve": left}

    @staticmethod
    def _order(units: Units, map: Tensor, noise: Noise, chosen: Tensor) -> Tensor:
        """(R, H, W) int64: the place of each pixel's superpixel, 0 for the largest mean."""
        mean = units.sum(map.double()) / units.sum(torch.ones_like(map, dtype=torch.float64)).clamp(min=1)
        mean = mean.masked_fill(~units.exist[:, 0], -torch.inf)
        # The ties of all samples, so that a stream belongs to its sample also where others have no score.
        values = mean.new_zeros(len(noise.uids), mean.shape[1])
        values[chosen.to(values.device)] = mean
        place = ranks(values, noise.child("ties"), ragged=True)
        return units.paint(place[chosen.to(place.device)])

    def _removed(
        self, model: Classifier, batch: Batch, order: Tensor, n: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Area (R,) and curve (R, S) of the samples ``chosen``, whose superpixels, ``n`` (R,), have these places."""
        x = batch.x.to(model.device, model.dtype)[chosen]
        base, target = baseline(x, self.baseline), batch.target.to(model.device)[chosen]
        n = n.to(model.device)
        # A row for each number of superpixels that are gone, from 0 on: the first is the image as it is.
        sample = torch.arange(len(n), device=model.device).repeat_interleave(n + 1)
        first = (n + 1).cumsum(0) - (n + 1)
        step = torch.arange(len(sample), device=model.device) - first[sample]
        less = step.nonzero()[:, 0]

        def logits(rows: slice) -> Tensor:
            some = sample[less[rows]]
            gone = (order[some] < step[less[rows], None, None]).unsqueeze(1)
            return model(torch.where(gone, base[some], x[some]))

        start = own_score(model, batch, chosen)
        score = start.new_empty(len(sample))
        score[first], score[less] = start, score_rows(model, target, sample[less], logits)
        share = torch.where(start > 0, 1 / start, torch.nan)[sample] * score
        inner = torch.zeros_like(start).index_add_(0, sample, share)
        area = 1 - (inner - (share[first] + share[first + n]) / 2) / n
        # Linear between the points, which are equally far from each other.
        wanted = torch.arange(STEPS + 1, device=n.device, dtype=share.dtype) * n[:, None] / STEPS
        left = wanted.floor().long().minimum(n[:, None] - 1)
        weight = wanted - left
        at = first[:, None] + left
        return area, share[at] * (1 - weight) + share[at + 1] * weight
