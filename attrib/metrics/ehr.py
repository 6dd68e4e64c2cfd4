"""Effective Heat Ratio: how much of a map's heat lies in the region of interest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


@dataclass(frozen=True)
class EHR(Metric):
    """Effective Heat Ratio (Zhang et al., *Fine-Grained Neural Network Explanation by Identifying
    Input Features with Predictive Information*, NeurIPS 2021), as its released code computes it.

    The pixels with a heat of at least ``base_threshold`` are the effective ones. At ``steps``
    quantiles q = 0 .. 1 of *their* heats (linear interpolation), with t = min(quantile(q), 0.99 max):

        ratio(q) = sum of the heat in the region at or above t / number of pixels at or above t

    and ``ehr`` is the area under ratio(q), by the trapezoid rule. Without ``weight_by_heat`` every
    pixel counts 1, so ratio(q) is the precision of the thresholded map. With it the sum of heats is
    divided by a *number of pixels*, as in the released code: perfect placement at heat 0.5 scores 0.5,
    so the weighted value also rewards heat that is close to its maximum. Both lie in [0, 1].

    base_threshold  heat below it is not effective, in [0, 1]
    steps           number of quantiles, at least 2
    weight_by_heat  sum heats (released default) or count pixels
    normalize       how a signed map of any scale becomes heat in [0, 1]:
                    "positive"  negative values are 0 (evidence against the target is not evidence
                                for it), then divided by the map's maximum. Not min-max: that would
                                give the pixels that received nothing, 0, a heat
                    "absolute"  the same with the absolute values, for maps whose sign has no meaning
                    "none"      not at all; for maps that are heat in [0, 1] already

    Edge cases. A flat map scores the region's share of the image, which is chance level; so does a map
    without any heat (no positive value), as it prefers no place either. With normalize "none" a map
    that nowhere reaches the threshold scores 0, the empty sum (the released code raises IndexError).
    NaN or infinite values in the map, or an empty region: NaN.

    Everything is float64 and one sort per sample; the map is not changed (the released code zeroes
    the caller's array below the threshold).

    >>> import attrib, torch
    >>> x, region = torch.rand(1, 1, 32, 32), torch.eye(32, dtype=torch.bool)[None]
    >>> attrib.evaluate(attrib.models.LeNet(), x, region.float(), EHR(), region)["value"].round(6).tolist()
    [1.0]
    """

    NAME: ClassVar[str] = "attrib.metrics.ehr.EHR"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    NEEDS_INPUT: ClassVar[bool] = False
    NEEDS_ROI: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "audio")
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"ehr": "higher"}
    CURVES: ClassVar[Mapping[str, str]] = {
        "ehr_curve": "x: quantile of the effective heats, 0 to 1 in equal steps; y: heat in the region per pixel"
    }

    base_threshold: float = 0.1
    steps: int = 11
    weight_by_heat: bool = True
    normalize: Literal["positive", "absolute", "none"] = "positive"

    def __post_init__(self) -> None:
        require(self, "base_threshold", at_least=0, at_most=1)
        require(self, "steps", at_least=2)
        require(self, "normalize", one_of=("positive", "absolute", "none"))

    @property
    def ABOUT(self) -> Mapping[str, str]:  # noqa: N802
        inside = "heat inside it per hot pixel" if self.weight_by_heat else "share of the hot pixels inside it"
        return {"ehr": f"effective heat ratio of the region of interest: {inside}, mean over thresholds of what is hot"}

    @property
    def BOUNDS(self) -> Mapping[str, tuple[float, float]]:  # noqa: N802
        return dict.fromkeys(self.CURVES, (0.0, 1.0)) if self.normalize != "none" else {}

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W), sound (B, L) -> ``ehr`` (B,) and ``ehr_curve`` (B, steps). Uses neither model nor noise.

        Raises UserError if the dataset has no regions, ValueError if they do not fit the map.
        """
        if batch.roi is None:
            raise UserError("EHR needs a region of interest (boxes or masks), and this dataset has none")
        if batch.roi.shape != map.shape:
            raise ValueError(f"EHR: the map is {tuple(map.shape)}, the region of interest {tuple(batch.roi.shape)}")
        roi = batch.roi.to(map.device, torch.bool).flatten(1)
        values = map.detach().flatten(1).to(torch.float64)
        defined = values.isfinite().all(dim=1) & roi.any(dim=1)

        # numpy's quantiles, not torch.linspace: 0.30000000000000004 * (n - 1) must fall on the same side of a
        # pixel as in the original, or the pixel is lost from its bin.
        quantiles = torch.from_numpy(np.linspace(0.0, 1.0, self.steps)).to(map.device)
        curve = self._curve(self._heat(values), roi, quantiles)
        curve = torch.where(defined[:, None], curve, torch.nan)
        return {"ehr": torch.trapezoid(curve, quantiles, dim=1), "ehr_curve": curve}

    def _heat(self, values: Tensor) -> Tensor:
        """(B, N) in [0, 1] unless ``normalize`` is "none"."""
        values = torch.where(values.isfinite(), values, 0.0)
        if self.normalize == "none":
            return values
        heat = values.abs() if self.normalize == "absolute" else values.clamp(min=0.0)
        maximum = heat.amax(dim=1, keepdim=True)
        return torch.where(maximum > 0, heat / maximum, 1.0)

    def _curve(self, heat: Tensor, roi: Tensor, quantiles: Tensor) -> Tensor:
        """(B, N), (B, N), (S,) -> ratios (B, S).

        In descending order the pixels at or above a threshold are a prefix, so that one cumulative
        sum answers all thresholds.
        """
        heat, order = heat.sort(dim=1, descending=True, stable=True)
        inside = roi.gather(1, order).to(heat.dtype)
        in_region = (heat * inside if self.weight_by_heat else inside).cumsum(dim=1)

        effective = (heat >= self.base_threshold).sum(dim=1, keepdim=True)
        position = (effective - 1).clamp(min=0) * quantiles  # from the coolest effective pixel
        lower = position.floor()
        weight = position - lower
        index = effective - 1 - lower.long()
        low, high = heat.gather(1, index.clamp(min=0)), heat.gather(1, (index - 1).clamp(min=0))
        # Not torch.lerp, whose rounding differs between vectorised and remaining elements: a threshold that
        # falls on a pixel must include it whatever the batch size.
        threshold = low + (high - low) * weight
        threshold = torch.minimum(threshold, 0.99 * heat[:, :1])

        # Where 0.99 max lies below the base threshold, still only effective pixels count.
        count = torch.searchsorted(-heat, -threshold, right=True).minimum(effective)
        ratio = in_region.gather(1, (count - 1).clamp(min=0)) / (count.to(heat.dtype) + 1e-8)  # 1e-8: as released
        return torch.where(count > 0, ratio, 0.0)
