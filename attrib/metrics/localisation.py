"""Localisation: how well a map points at the region of interest, by four usual measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import ranks
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError

Normalize = Literal["positive", "absolute", "none"]


@dataclass(frozen=True)
class Localisation(Metric):
    """With heat h in [0, 1], and the region of interest R, of n pixels:

        bbox_ratio   share of the n hottest pixels that lie in R (Schulz et al., ICLR 2020, section 4.5)
        pointing     1 if the hottest pixel lies in R, else 0 (the pointing game, Zhang et al., ECCV 2016)
        energy       sum of h in R / sum of h (the energy-based pointing game, Wang et al., *Score-CAM*, 2020)
        iou          |{h > t} and R| / |{h > t} or R|, mean over the thresholds t = 0, 1 / S .. (S - 1) / S
        iou_best     the largest of these

    normalize    how a signed map of any scale becomes heat, as in ``EHR``: "positive" cuts off negative
                 values, "absolute" takes absolute ones, both divide by the maximum; "none": it is heat already
    thresholds   S
    margin       pixels around R in which the hottest pixel still counts for ``pointing``, a square (the paper's
                 circle has 15 pixels)

    Equally hot pixels are ordered by the sample's own stream, see ``perturb.ranks``. A map without any heat
    prefers no place: its energy is the region's share of the image, its order is random, its intersections are
    empty. NaN or infinite values in the map, or an empty region: NaN. R may be any mask, also one over a sound's time.

    >>> import attrib, torch
    >>> x, region = torch.rand(1, 1, 32, 32), torch.eye(32, dtype=torch.bool)[None]
    >>> rows = attrib.evaluate(attrib.models.LeNet(), x, region.float(), Localisation(), region)
    >>> list(rows["column"])
    ['bbox_ratio', 'pointing', 'energy', 'iou', 'iou_best']
    """

    NAME: ClassVar[str] = "attrib.metrics.localisation.Localisation"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    NEEDS_INPUT: ClassVar[bool] = False
    NEEDS_ROI: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "audio")
    COLUMNS: ClassVar[Mapping[str, Direction]] = dict.fromkeys(
        ("bbox_ratio", "pointing", "energy", "iou", "iou_best"), "higher"
    )
    ABOUT: ClassVar[Mapping[str, str]] = {
        "bbox_ratio": "of the hottest pixels, as many as the region of interest has, the share that lies in it",
        "pointing": "pointing game: 1 where the hottest pixel lies in the region of interest, else 0",
        "energy": "share of the map's heat that lies in the region of interest",
        "iou": "intersection over union of the map above a threshold and the region, mean over thresholds",
        "iou_best": "the largest intersection over union over the thresholds",
    }
    CURVES: ClassVar[Mapping[str, str]] = {
        "iou_curve": "x: threshold of the heat, from 0 in equal steps to below 1; y: intersection over union"
    }
    BOUNDS: ClassVar[Mapping[str, tuple[float, float]]] = {"iou_curve": (0.0, 1.0)}

    normalize: Normalize = "positive"
    thresholds: int = 50
    margin: int = 0

    def __post_init__(self) -> None:
        require(self, "normalize", one_of=get_args(Normalize))
        require(self, "thresholds", at_least=1)
        require(self, "margin", at_least=0)

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W), sound (B, L) -> five columns (B,), a curve (B, thresholds). Does not use the model.

        Raises UserError if the dataset has no regions, ValueError if they do not fit the map.
        """
        if batch.roi is None:
            raise UserError("Localisation needs a region of interest (boxes or masks), and this dataset has none")
        if batch.roi.shape != map.shape:
            raise ValueError(
                f"Localisation: the map is {tuple(map.shape)}, the region of interest {tuple(batch.roi.shape)}"
            )
        roi = batch.roi.to(map.device, torch.bool)
        heat = self._heat(map.detach().double())
        rank = ranks(heat, noise.child("ties")).flatten(1)
        heat, inside, near = heat.flatten(1), roi.flatten(1), self._wider(roi).flatten(1)
        size = inside.sum(1, keepdim=True)
        found = {
            "bbox_ratio": ((rank < size) & inside).sum(1) / size[:, 0].double(),
            "pointing": ((rank == 0) & near).any(1).double(),
            "energy": self._energy(heat, inside),
        }
        curve = self._overlap(heat, inside)
        found |= {"iou": curve.mean(1), "iou_best": curve.amax(1), "iou_curve": curve}
        defined = map.isfinite().flatten(1).all(1) & (size[:, 0] > 0)
        return {
            name: torch.where(defined.view(-1, *[1] * (value.ndim - 1)), value, torch.nan)
            for name, value in found.items()
        }

    def _heat(self, map: Tensor) -> Tensor:
        map = torch.where(map.isfinite(), map, 0.0)
        if self.normalize == "none":
            return map
        heat = map.abs() if self.normalize == "absolute" else map.clamp(min=0)
        most = heat.flatten(1).amax(1).view(-1, *[1] * (map.ndim - 1))
        return torch.where(most > 0, heat / most, 0.0)

    def _wider(self, roi: Tensor) -> Tensor:
        pool = F.max_pool1d if roi.ndim == 2 else F.max_pool2d
        return pool(roi.double().unsqueeze(1), 2 * self.margin + 1, 1, self.margin).squeeze(1) > 0

    @staticmethod
    def _energy(heat: Tensor, inside: Tensor) -> Tensor:
        total = heat.sum(1)
        return torch.where(total > 0, (heat * inside).sum(1) / total, inside.double().mean(1))

    def _overlap(self, heat: Tensor, inside: Tensor) -> Tensor:
        """(B, N), (B, N) -> (B, S): one sort answers all thresholds."""
        threshold = torch.arange(self.thresholds, device=heat.device, dtype=heat.dtype) / self.thresholds
        sorted_heat, order = heat.sort(dim=1)
        above = heat.shape[1] - torch.searchsorted(sorted_heat, threshold.repeat(len(heat), 1), right=True)
        hits = F.pad(inside.gather(1, order).flip(1).cumsum(1), (1, 0)).gather(1, above)
        return hits / (above + inside.sum(1, keepdim=True) - hits).clamp(min=1).double()
