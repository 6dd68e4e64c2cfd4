"""Means over many random variants of an input: GradientSHAP and RISE.

The variants of a sample are drawn from its own stream, as many at a time as go through the net at once, and
added up at once, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs, Reduce
from attrib.methods.parts.losses import target_score
from attrib.models import Classifier, ScoreScale, probabilities
from attrib.noise import Noise
from attrib.types import Batch


def _portions(samples: int, model: Classifier, batch: Batch) -> Iterator[int]:
    """How many variants of each sample to draw at a time; their sum is ``samples``."""
    while samples > 0:
        portion = min(samples, max(1, model.rows // len(batch)))
        yield portion
        samples -= portion


@dataclass(frozen=True)
class GradientShap(Method):
    """Expected gradients between noisy inputs and random baselines (Lundberg & Lee, 2017; Erion et al., 2021).

    Each draw has a noisy input x' = x + noise, a baseline b and a number a, uniform on [0, 1). The map
    is the mean of (x' - b) times the gradient at b + a (x' - b), as in captum's GradientShap, which cannot
    be used here because it takes its random numbers from numpy. The map sums, up to the error of
    the draws, to the mean change of the logit from b to x'.

    samples   draws
    sigma     standard deviation of the noise as a share of each image's range, or of the range of a text's
              embedded tokens
    spread    standard deviation of the baselines b around zero, as a share of the same range. 0: the only
              baseline is the data's mean colour, or the zero vector for every token. Baselines are not images of
              the data set, on which a map would then depend

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=GradientShap(samples=2)).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.sampled.GradientShap"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums about to the change of the logit"}
    samples: int = 25
    sigma: float = 0.1
    spread: float = 0.0
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        require(self, "samples", at_least=1)
        require(self, "sigma", "spread", at_least=0)
        require(self, "reduce", one_of=get_args(Reduce))

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        inputs = Inputs.of(model, batch)
        x, role = inputs.x, None if inputs.mask is None else EMBEDDING
        span = inputs.spread().view(-1, *[1] * (x.ndim - 1))
        zero, total = inputs.constant(0.0), torch.zeros_like(x)
        for portion in _portions(self.samples, model, batch):
            change, at = torch.empty(2, len(x), portion, *x.shape[1:], device=x.device, dtype=x.dtype)
            for i in range(portion):  # one draw after another, so that portions do not matter
                start = zero + self.spread * span * inputs.normal(noise)
                change[:, i] = x + self.sigma * span * inputs.normal(noise) - start
                at[:, i] = start + noise.uniform().view_as(span) * change[:, i]

            def score(logits: Tensor, rows: slice, portion: int = portion) -> Tensor:
                sample = torch.arange(rows.start, rows.stop, device=logits.device) // portion
                return target_score(logits, inputs.target[sample])

            _, gradient = model.gradient(at.flatten(0, 1), score, role, inputs.rest)
            total += (change * gradient.view_as(change)).sum(1)
        return {"map": inputs.reduce(total / self.samples, self.reduce)}


@dataclass(frozen=True)
class Rise(Method):
    """Mean score of the randomly masked images in which a pixel is visible (Petsiuk, Das & Saenko, *RISE*, BMVC 2018).

    A mask is ``cells`` x ``cells`` numbers, each 1 with probability ``keep``, else 0, enlarged
    bilinearly to one cell more than the image needs and shifted by up to a cell (section 3.2). The
    image is multiplied by it: a hidden pixel is 0, the data's mean colour. The map is the sum of
    score times mask over the masks, divided by their number and ``keep``. Only its differences
    between pixels have a meaning, as its level is the mean score of all masked images.

    samples   masks per image. The paper takes 4,000 for VGG-16 and 8,000 for ResNet-50, at 224 pixels
    cells     along each side of a mask; 7 in the paper
    keep      0.5 in the paper
    output    "probability": softmax of the target (several labels: the mean of the sigmoids of the
              positive ones), as in the paper; or "logit"

    Images only.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=Rise(samples=4)).map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.sampled.Rise"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "mean score where the pixel is seen, upsampled from cells"}
    samples: int = 4000
    cells: int = 7
    keep: float = 0.5
    output: ScoreScale = "probability"

    def __post_init__(self) -> None:
        require(self, "samples", "cells", at_least=1)
        require(self, "keep", above=0, at_most=1)
        require(self, "output", one_of=get_args(ScoreScale))

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output == "probability"

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        x, cells = batch.x, self.cells
        total = torch.zeros_like(x[:, 0])
        for portion in _portions(self.samples, model, batch):
            drawn = noise.uniform(portion, cells**2 + 2).to(x)
            kept = (drawn[..., :-2] < self.keep).to(x).view(-1, cells, cells)
            shift = drawn[..., -2:].view(-1, 2)

            def piece(
                rows: slice, portion: int = portion, kept: Tensor = kept, shift: Tensor = shift
            ) -> tuple[Tensor, Tensor]:
                sample = torch.arange(rows.start, rows.stop, device=x.device) // portion
                height, width = (self._enlarge(side, shift[rows, i]) for i, side in enumerate(x.shape[-2:]))
                mask = height @ kept[rows] @ width.mT
                logits = model(x[sample] * mask[:, None])
                return self._score(model, logits, batch.target[sample]), mask

            with torch.no_grad():
                score, mask = model.chunked(piece, len(kept))
            total += (score[:, None, None] * mask).view(len(x), portion, *total.shape[1:]).sum(1)
        return {"map": total / (self.samples * self.keep)}

    def _enlarge(self, side: int, shift: Tensor) -> Tensor:
        """(R,) shifts in cells, [0, 1) -> (R, side, cells): the weight of each cell in each pixel along one axis."""
        cell = -(-side // self.cells)
        pixel = torch.arange(side, device=shift.device) + (shift * cell).floor()[:, None]
        # The enlarged mask is cells + 1 cells wide; this is the pixel's place in the small mask.
        place = ((pixel + 0.5) * self.cells / ((self.cells + 1) * cell) - 0.5).clamp(0, self.cells - 1)
        return (1 - (place[..., None] - torch.arange(self.cells, device=shift.device)).abs()).clamp(min=0)

    def _score(self, model: Classifier, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (R, K), target (R,) or (R, K) -> (R,) the target's score."""
        if self.output == "logit":
            return target_score(logits, target)
        if target.ndim == 1:
            return target_score(probabilities(logits, link=model.link), target)
        return target_score(probabilities(logits, True, model.link), target) / target.sum(1).clamp(min=1)
