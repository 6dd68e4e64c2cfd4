"""Degradation: the target's score while tiles vanish, the most relevant first or the least relevant first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import BASELINES, OUTPUTS, Baseline, baseline, own_score, ranks, rounding, score_grid, whole
from attrib.models import Classifier, ScoreScale
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Units

Normalize = Literal["none", "ends"]


@dataclass(frozen=True)
class Degradation(Metric):
    """Image degradation (Ancona et al., ICLR 2018; Schulz et al., *Restricting the Flow: Information
    Bottlenecks for Attribution*, ICLR 2020, section 4.4).

    The image is cut into tiles, which are replaced by a baseline one after another: the most relevant
    first (MoRF), and the least relevant first (LeRF). The columns are the areas under the two curves by
    the trapezoid rule, over the share of tiles that are gone, and their difference, the area between:

        degradation = lerf - morf

    tile          height and width in pixels. What is left over at the far edges belongs to the last tiles
    baseline      what a tile is replaced with, see ``perturb.baseline``. 0 of the normalised image, as in the
                  released code
    normalize     "ends": every curve as (p - p_end) / (p_start - p_end), so that it goes from 1 to 0. Schulz
                  et al. take both ends' means over the data set; here they are the sample's own, so a
                  sample whose ends are alike counts much. NaN where they are equal, or differ by no more than
                  the net rounds (``perturb.rounding``)
    output        "probability": softmax of the target, or "logit"; see ``perturb.target_score``
    as_released   InputIBA's convention: tiles ranked by their sum instead of their mean (they differ for the
                  larger tiles at the far edges), scores minus that of the image, areas with dx = 1 / length.
                  Its other fault, a live tensor scored instead of copies, is not reproduced

    Tiles of equal relevance are ordered by the sample's own stream, see ``perturb.ranks``; LeRF is the reverse
    of MoRF. A map with NaN or infinite values scores NaN. Costs 2 forward passes a tile.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> rows = attrib.evaluate(net, x, torch.rand(1, 32, 32), Degradation())
    >>> list(rows["column"])
    ['degradation', 'morf', 'lerf']
    """

    NAME: ClassVar[str] = "attrib.metrics.degradation.Degradation"
    VERSION: ClassVar[int] = 2  # 1 divided by what a float32 net rounds
    CONTRASTS: ClassVar[bool] = True
    NEEDS_LOGITS: ClassVar[tuple[str, ...]] = ("image",)
    MODALITIES: ClassVar[tuple[str, ...]] = ("image",)
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"degradation": "higher", "morf": "lower", "lerf": "higher"}
    ABOUT: ClassVar[Mapping[str, str]] = {
        "degradation": "lerf - morf: how much better the map orders the tiles than its reverse does",
        "morf": "mean score of the target while tiles are removed, the most relevant first",
        "lerf": "mean score of the target while tiles are removed, the least relevant first",
    }
    CURVES: ClassVar[Mapping[str, str]] = {
        "morf_curve": "x: share of tiles removed, most relevant first; y: score of the target",
        "lerf_curve": "x: share of tiles removed, least relevant first; y: score of the target",
    }

    tile: tuple[int, int] = (8, 8)
    baseline: Baseline = "zero"
    normalize: Normalize = "none"
    output: ScoreScale = "probability"
    as_released: bool = False

    def __post_init__(self) -> None:
        if len(self.tile) != 2 or min(self.tile) < 1:
            raise UserError(f"Degradation.tile is {list(self.tile)}, must be height and width, at least 1 each")
        require(self, "baseline", one_of=BASELINES)
        require(self, "normalize", one_of=get_args(Normalize))
        require(self, "output", one_of=OUTPUTS)
        if self.as_released and self.normalize != "none":
            raise UserError("Degradation: as_released has its own normalisation; set normalize to none")

    @property
    def BOUNDS(self) -> Mapping[str, tuple[float, float]]:  # noqa: N802
        as_it_is = self.output == "probability" and self.normalize == "none" and not self.as_released
        return dict.fromkeys(self.CURVES, (0.0, 1.0)) if as_it_is else {}

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output == "probability"

    def units(self, batch: Batch) -> Units:
        """The tiles, row by row."""
        size = batch.x.shape[-2:]
        counts = [max(1, places // side) for places, side in zip(size, self.tile, strict=True)]
        row, column = (
            (torch.arange(places) // side).clamp(max=count - 1)
            for places, side, count in zip(size, self.tile, counts, strict=True)
        )
        grid = row[:, None] * counts[1] + column
        return Units.given(grid.expand(len(batch), *size))

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W) -> three columns (B,), two curves (B, tiles + 1), float64 on the model's device.

        Raises ValueError if the map does not fit the images.
        """
        if batch.x.ndim != 4 or map.shape != (len(batch), *batch.x.shape[2:]):
            raise ValueError(
                f"Degradation: a map of shape {tuple(map.shape)} does not fit images {tuple(batch.x.shape)}"
            )
        if self.normalize == "ends":  # how the net rounds depends on them
            batch = replace(batch, logits=whole(model, batch))
        units = self.units(batch)
        values = units.sum(map.detach().cpu().double())
        if not self.as_released:
            values = values / units.sum(torch.ones(map.shape, dtype=torch.float64))
        rank = units.paint(ranks(values, noise.child("ties")).cpu())
        curves = self._curves(model, batch, rank.to(model.device), map.isfinite().flatten(1).all(1), units.most)
        if self.as_released:
            curves = [curve - curve[:, :1] for curve in curves]
        elif self.normalize == "ends":
            ends = curves[0][:, [0, -1]]
            error = rounding(model, whole(model, batch), ends, self.output)
            start, end = ends.split(1, dim=1)
            span = torch.where((start - end).abs() <= error.sum(1, keepdim=True), torch.nan, start - end)
            curves = [(curve - end) / span for curve in curves]
        morf, lerf = (torch.trapezoid(c, dx=1 / (c.shape[1] - (not self.as_released)), dim=1) for c in curves)
        return {
            "degradation": lerf - morf, "morf": morf, "lerf": lerf, "morf_curve": curves[0], "lerf_curve": curves[1],
        }  # fmt: skip

    def _curves(self, model: Classifier, batch: Batch, rank: Tensor, finite: Tensor, tiles: int) -> list[Tensor]:
        """Scores of MoRF and LeRF, (B, tiles + 1) each, NaN where the map is not finite."""
        defined = finite.nonzero().squeeze(1).to(model.device)
        x = batch.x.to(model.device, model.dtype)[defined]
        base, rank = baseline(x, self.baseline), rank[defined, None]

        def images(sample: Tensor, column: Tensor) -> Tensor:
            """At k - 1: without the first k tiles; after those, at tiles + k - 1: without the last k, 0 < k < tiles."""
            count = 1 + column[:, None, None, None]
            gone = torch.where(count <= tiles, rank[sample] < count, rank[sample] >= 2 * tiles - count)
            return torch.where(gone, base[sample], x[sample])

        scores = torch.full((len(batch), 2 * tiles), torch.nan, dtype=torch.float64, device=model.device)
        target = batch.target.to(model.device)[defined]
        first = own_score(model, batch, defined, self.output)
        rest = score_grid(model, target, 2 * tiles - 1, images, self.output)
        scores[defined] = torch.cat((first[:, None], rest), 1)
        # The curves share their ends.
        morf = scores[:, : tiles + 1]
        return [morf, torch.cat((morf[:, :1], scores[:, tiles + 1 :], morf[:, -1:]), dim=1)]
