"""Insertion and deletion: the target's score while pixels, samples or words appear, or vanish, in the map's order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import (
    BASELINES,
    OUTPUTS,
    Baseline,
    baseline,
    own_score,
    ranks,
    score_path,
    tiles,
    untiled,
)
from attrib.metrics.words import REMOVALS, Removal, order, score_without
from attrib.models import Classifier, ScoreScale
from attrib.noise import Noise
from attrib.types import Batch, UserError

EQUAL_STEPS = 100  # on which the curve of a text is stored where ``steps`` is not set


@dataclass(frozen=True)
class InsertionDeletion(Metric):
    """Insertion and deletion games (Petsiuk, Das & Saenko, *RISE*, BMVC 2018, section 4.2, algorithm 1).

    Deletion replaces the pixels of the image by a baseline, the highest values of the map first;
    insertion starts from a baseline and brings the image's pixels back in the same order. The curve
    is the target's score over the number of pixels replaced, and the column its area by the
    trapezoid rule, in units of the curve's whole width: the mean score on the way.
    ``insertion_deletion`` is their difference.

    Of a sound the samples in time stand for the pixels; a single one that is missing is a click to a network, so
    windows say more (``window``).

    Of a text the units are the words: all tokens of a word go together, in the order of the sum of
    their values; special tokens stay. A text with fewer words than steps has a point for every word,
    and no text is scored twice. Curves of texts are stored interpolated linearly, on equal steps of
    their width (``steps``, or 100 where it is not set), those of images as they were scored.

    steps                number of steps, of equal size up to one unit (curve length steps + 1)
    step                 or else units per step; the last step may have fewer. Set exactly one
    fraction             share of the units, in (0, 1], at which the curve ends; at least one unit.
                         The area is over this width, so that a score of 1 throughout gives 1
    window               side of the tiles of pixels that go together, in the order of their mean; of sounds,
                         samples of a window of time; 1: each alone
    words                texts only, both curves: what stands for a word that is not there, "zero" vectors
                         at the layer embedding, the net's "mask" token, or nothing, "delete" (the rest
                         moves together); see ``words.score_without``
    deletion_baseline,   not of texts. "zero": 0 of the normalised input, "mean": the input's mean per
    insertion_baseline   channel, "blur": see ``perturb.baseline``
    sigma, kernel        of the blur, in pixels or samples. kernel null is 2 sigma - 1, as in InputIBA's released
                         code; RISE's own has sigma 5, kernel 11. So narrow a window is nearly a box:
                         on large images the blurred start may keep much of the score
    output               "probability": softmax of the target, or "logit". Multi-label: the mean over
                         the positive labels, of sigmoids or logits; see ``perturb.target_score``
    as_released          InputIBA's convention: no score of the unperturbed start, area with dx = 1 / length
                         instead of the fractions (constant 1 gives 1 - 1 / length, a single point 0). Its
                         texts had words "zero", fraction 0.4 and step 10. Its other fault, a live tensor
                         scored instead of copies, is not reproduced

    Only the map's order counts. Equal values are ordered at random by the sample's own stream,
    see ``perturb.ranks``. A map with NaN or infinite values, and a text without words (only special
    tokens), scores NaN. Costs two curve lengths of forward passes a sample, for words "zero" of the
    net's part behind the embedding.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> rows = attrib.evaluate(net, x, torch.rand(1, 32, 32), InsertionDeletion(steps=2))
    >>> list(rows["column"])
    ['insertion', 'deletion', 'insertion_deletion']
    """

    NAME: ClassVar[str] = "attrib.metrics.insertion_deletion.InsertionDeletion"
    NEEDS_LOGITS: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    COLUMNS: ClassVar[Mapping[str, Direction]] = {
        "insertion": "higher",
        "deletion": "lower",
        "insertion_deletion": "higher",
    }
    ABOUT: ClassVar[Mapping[str, str]] = {
        "insertion": "mean score of the target while the input is put in, the most relevant places first",
        "deletion": "mean score of the target while the input is taken away, the most relevant places first",
        "insertion_deletion": "insertion - deletion: how much higher the score is with what is relevant than without",
    }
    CURVES: ClassVar[Mapping[str, str]] = {
        "insertion_curve": "x: fraction of pixels, samples or words inserted, highest first; y: score of the target",
        "deletion_curve": "x: fraction of pixels, samples or words deleted, highest first; y: score of the target",
    }

    steps: int | None = 100
    step: int | None = None
    fraction: float = 1.0
    window: int = 1
    words: Removal = "zero"
    deletion_baseline: Baseline = "zero"
    insertion_baseline: Baseline = "blur"
    sigma: float = 5.0
    kernel: int | None = None
    output: ScoreScale = "probability"
    as_released: bool = False

    def __post_init__(self) -> None:
        if (self.step is None) == (self.steps is None):
            raise UserError("InsertionDeletion: set exactly one of step (units a step) and steps, the other to null")
        require(self, "step", "steps", at_least=1, or_none=True)
        require(self, "fraction", above=0, at_most=1)
        require(self, "window", at_least=1)
        require(self, "words", one_of=REMOVALS)
        require(self, "deletion_baseline", "insertion_baseline", one_of=BASELINES)
        require(self, "sigma", above=0)
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise UserError(f"InsertionDeletion.kernel is {self.kernel}, must be a positive odd number, or null")
        require(self, "output", one_of=OUTPUTS)

    @property
    def VERSION(self) -> int:  # noqa: N802
        return 1 if self.window == 1 else 2  # 1 took the means of tiles in float32: rounding ordered equal ones

    @property
    def BOUNDS(self) -> Mapping[str, tuple[float, float]]:  # noqa: N802
        return dict.fromkeys(self.CURVES, (0.0, 1.0)) if self.output == "probability" else {}

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output == "probability"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("embedding",) if self.words == "zero" else ()

    def counts(self, units: Tensor) -> Tensor:
        """(B,) numbers of units -> (B, P): how many are replaced at each point, the last ones may repeat.

        Where there are fewer units than steps, others repeat too.
        """
        # 1e-9, because 0.29 * 100 is below 29.
        limit = (self.fraction * units.double() + 1e-9).long().clamp(min=1)[:, None]
        if self.steps is not None:
            points = torch.arange(self.steps + 1, device=units.device) * limit // self.steps
        else:
            assert self.step is not None  # exactly one of the two is set
            most = -(-int(limit.max()) // self.step)
            points = (torch.arange(most + 1, device=units.device) * self.step).minimum(limit)
        return points[:, 1:].clamp(min=1) if self.as_released else points

    def replaced(self, units: int) -> list[int]:
        """``counts`` for one image or text."""
        return self.counts(torch.tensor([units]))[0].tolist()

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W), (B, L), (B, T) -> three columns (B,), two curves (B, S), float64 on the model's device.

        Raises ValueError if the inputs are not images (B, C, H, W), sounds (B, C, L) or texts (B, T) of the map's
        size.
        """
        curves = self._places if batch.words is None else self._texts
        insertion, deletion, counts = curves(model, batch, map, noise)
        columns = {"insertion": self._area(insertion, counts), "deletion": self._area(deletion, counts)}
        columns["insertion_deletion"] = columns["insertion"] - columns["deletion"]
        if batch.words is not None:
            insertion, deletion = self._resampled(insertion, counts), self._resampled(deletion, counts)
        return {**columns, "insertion_curve": insertion, "deletion_curve": deletion}

    def _places(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Both curves and the counts at their points, (B, S) each."""
        size = batch.x.shape[2:]
        if len(size) not in (1, 2) or map.shape != (len(batch), *size):
            raise ValueError(
                f"InsertionDeletion: a map of shape {tuple(map.shape)} does not fit inputs of shape "
                f"{tuple(batch.x.shape)}; expected (B, H, W) for (B, C, H, W), (B, L) for (B, C, L)"
            )
        # A child stream, so that all maps of a sample share the order of ties.
        rank = ranks(tiles(map.detach().double(), self.window), noise.child("ties")).to(model.device)
        defined = map.isfinite().flatten(1).all(dim=1).nonzero().squeeze(1).to(model.device)
        x, target = batch.x.to(model.device, model.dtype)[defined], batch.target.to(model.device)[defined]
        units = math.prod(rank.shape[1:])
        counts = self.counts(torch.tensor([units]))  # on the CPU: which points are the input itself need not be asked
        distinct, place = counts[0].unique(return_inverse=True)
        counts, place, known = counts.to(model.device), place.to(model.device), distinct.tolist()
        own = own_score(model, batch, defined, self.output)[:, None]
        rank = untiled(rank[defined].int(), self.window, size)  # int32: half the bytes to read for each point

        def curve(start: Tensor, end: Tensor, input_at: int) -> Tensor:
            """(B, S): the score while the places of ``start`` become those of ``end``; ``input_at``: when it is x."""
            scores = torch.full((len(batch), len(place)), torch.nan, dtype=torch.float64, device=model.device)
            asked = distinct[distinct != input_at].to(model.device)
            found = score_path(model, target, start, end, rank, asked, self.output)
            if input_at in known:
                at = known.index(input_at)
                found = torch.cat((found[:, :at], own, found[:, at:]), 1)
            scores[defined] = found[:, place]
            return scores

        insertion = curve(baseline(x, self.insertion_baseline, self.sigma, self.kernel), x, units)
        deletion = curve(x, baseline(x, self.deletion_baseline, self.sigma, self.kernel), 0)
        return insertion, deletion, counts.expand_as(insertion)

    def _texts(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Both curves and the counts at their points, (B, P) each."""
        batch = batch.to(model.device)
        ordered = order(batch, map, noise)
        counts = self.counts(ordered.count)
        # Deleted are the first words, not yet inserted the last. In one call, as the curves share their ends.
        first = torch.cat((torch.zeros_like(counts), counts), dim=1)
        last = torch.cat((counts, ordered.count[:, None].expand_as(counts)), dim=1)
        scores = score_without(model, batch, ordered, first, last, self.words, self.output)
        deletion, insertion = scores.chunk(2, dim=1)
        return insertion, deletion, counts

    def _area(self, curve: Tensor, counts: Tensor) -> Tensor:
        """(B, P), (B, P) -> (B,); points that repeat have no width."""
        if self.as_released:
            new = torch.ones_like(counts, dtype=curve.dtype)
            new[:, 1:] = counts.diff(dim=1) > 0
            inner = (curve * new).sum(dim=1) - (curve[:, 0] + curve[:, -1]) / 2
            return inner * (1.0 / new.sum(dim=1))
        return torch.trapezoid(curve, counts.to(curve.dtype) / counts[:, -1:], dim=1)

    def _resampled(self, curve: Tensor, counts: Tensor) -> Tensor:
        """(B, P), (B, P) -> (B, S): linear between the points, on equal steps of the width. One S for all texts."""
        steps = self.steps or EQUAL_STEPS
        points = counts.to(curve.dtype)
        wanted = torch.arange(1 if self.as_released else 0, steps + 1, device=curve.device).to(curve.dtype) / steps
        wanted = wanted * points[:, -1:]
        right = torch.searchsorted(points, wanted, right=True).clamp(max=points.shape[1] - 1)
        left = (right - 1).clamp(min=0)
        start, width = points.gather(1, left), points.gather(1, right) - points.gather(1, left)
        weight = torch.where(width > 0, (wanted - start) / width, 0.0).clamp(0.0, 1.0)
        return curve.gather(1, left) * (1 - weight) + curve.gather(1, right) * weight
