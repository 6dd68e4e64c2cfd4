"""Insertion and deletion: the target's score while pixels appear, or vanish, in the map's order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrib.metrics.perturb import BASELINES, OUTPUTS, Baseline, Output, baseline, ranks, score_grid
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch, UserError


@dataclass(frozen=True)
class InsertionDeletion:
    """Insertion and deletion games (Petsiuk, Das & Saenko, *RISE*, BMVC 2018, section 4.2, algorithm 1).

    Deletion replaces the pixels of the image by a baseline, the highest values of the map first;
    insertion starts from a baseline and brings the image's pixels back in the same order. The curve
    is the target's score over the fraction of pixels replaced, 0 to 1 inclusive, and the column its
    area by the trapezoid rule over these fractions. ``insertion_deletion`` is their difference.

    steps                number of steps, of equal size up to one pixel (curve length steps + 1)
    step                 or else pixels per step; the last step may have fewer. Set exactly one
    deletion_baseline,   "zero": 0 of the normalised image, "mean": the image's mean per channel,
    insertion_baseline   "blur": see ``perturb.baseline``
    sigma, kernel        of the blur, in pixels. kernel null is 2 sigma - 1, as in InputIBA's released
                         code; RISE's own has sigma 5, kernel 11. So narrow a window is nearly a box:
                         on large images the blurred start may keep much of the score
    output               "probability": softmax of the target, or "logit". Multi-label: the mean over
                         the positive labels, of sigmoids or logits; see ``perturb.target_score``
    as_released          InputIBA's convention: no score of the unperturbed start, area with dx = 1 / length
                         instead of the fractions (constant 1 gives 1 - 1 / length). Its other
                         fault, a live tensor scored instead of copies, is not reproduced

    Only the map's order counts. Equal values are ordered at random by the sample's own stream,
    see ``perturb.ranks``. A map with NaN or infinite values scores NaN. Costs two curve lengths of
    forward passes a sample.
    """

    VERSION: ClassVar[int] = 1
    NEEDS_ROI: ClassVar[bool] = False
    COLUMNS: ClassVar[Mapping[str, str]] = {
        "insertion": "higher",
        "deletion": "lower",
        "insertion_deletion": "higher",
    }
    CURVES: ClassVar[Mapping[str, str]] = {
        "insertion_curve": "x: fraction of pixels inserted, highest first; y: score of the target",
        "deletion_curve": "x: fraction of pixels deleted, highest first; y: score of the target",
    }

    steps: int | None = 100
    step: int | None = None
    deletion_baseline: Baseline = "zero"
    insertion_baseline: Baseline = "blur"
    sigma: float = 5.0
    kernel: int | None = None
    output: Output = "probability"
    as_released: bool = False

    def __post_init__(self) -> None:
        if (self.step is None) == (self.steps is None):
            raise UserError("InsertionDeletion: set exactly one of step (pixels a step) and steps, the other to null")
        for field in ("step", "steps"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f"InsertionDeletion.{field} is {getattr(self, field)}, must be at least 1")
        for field, allowed in (
            ("deletion_baseline", BASELINES),
            ("insertion_baseline", BASELINES),
            ("output", OUTPUTS),
        ):
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"InsertionDeletion.{field} is {getattr(self, field)!r}, must be one of {', '.join(allowed)}"
                )
        if self.sigma <= 0:
            raise UserError(f"InsertionDeletion.sigma is {self.sigma}, must be positive")
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise UserError(f"InsertionDeletion.kernel is {self.kernel}, must be odd")

    def replaced(self, pixels: int) -> list[int]:
        """Number of pixels replaced at each point of the curve, for an image of ``pixels`` pixels."""
        if self.step is not None:
            counts = [*range(0, pixels, self.step), pixels]
        else:
            counts = [k * pixels // self.steps for k in range(self.steps + 1)]
        return counts[1:] if self.as_released else counts

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W) -> three columns (B,) and two curves (B, S), float64 on the model's device.

        Raises ValueError if the inputs are not images (B, C, H, W) of the map's size.
        """
        if batch.x.ndim != 4 or map.shape != (len(batch), *batch.x.shape[2:]):
            raise ValueError(
                f"InsertionDeletion: a map of shape {tuple(map.shape)} does not fit inputs of shape "
                f"{tuple(batch.x.shape)}; expected (B, H, W) for (B, C, H, W)"
            )
        # A child stream, so that all maps of a sample share the order of ties.
        rank = ranks(map.detach(), noise.child("ties")).to(model.device)
        defined = map.isfinite().flatten(1).all(dim=1).nonzero().squeeze(1).to(model.device)
        x, target = batch.x.to(model.device, model.dtype)[defined], batch.target.to(model.device)[defined]
        counts = torch.tensor(self.replaced(math.prod(map.shape[1:])), device=model.device)
        rank = rank[defined, None]

        def curve(start: Tensor, end: Tensor) -> Tensor:
            """(B, S): the score while the pixels of ``start`` become those of ``end``."""

            def images(sample: Tensor, column: Tensor) -> Tensor:
                replaced = rank[sample] < counts[column, None, None, None]
                return torch.where(replaced, end[sample], start[sample])

            scores = torch.full((len(batch), len(counts)), torch.nan, dtype=torch.float64, device=model.device)
            scores[defined] = score_grid(model, target, len(counts), images, self.output)
            return scores

        insertion = curve(baseline(x, self.insertion_baseline, self.sigma, self.kernel), x)
        deletion = curve(x, baseline(x, self.deletion_baseline, self.sigma, self.kernel))
        columns = {"insertion": self._area(insertion, counts), "deletion": self._area(deletion, counts)}
        columns["insertion_deletion"] = columns["insertion"] - columns["deletion"]
        return {**columns, "insertion_curve": insertion, "deletion_curve": deletion}

    def _area(self, curve: Tensor, counts: Tensor) -> Tensor:
        if self.as_released:
            return torch.trapezoid(curve, dx=1.0 / curve.shape[1], dim=1)
        return torch.trapezoid(curve, counts.to(curve.dtype) / counts[-1], dim=1)
