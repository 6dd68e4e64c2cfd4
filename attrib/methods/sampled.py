"""Means over many random copies of an input: GradientSHAP and RISE.

The copies of a sample are drawn from its own stream, as many at a time as go through the net at
once, and added up as they come: memory grows neither with their number nor with the batch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs, Reduce
from attrib.methods.parts.losses import target_score
from attrib.models import Classifier, probabilities
from attrib.noise import Noise
from attrib.types import Batch, UserError

Output = Literal["probability", "logit"]


def _portions(samples: int, model: Classifier, batch: Batch) -> Iterator[int]:
    """How many copies of each sample to draw at a time; their sum is ``samples``."""
    while samples > 0:
        portion = min(samples, max(1, model.rows // len(batch)))
        yield portion
        samples -= portion


def _check(method: Any, allowed: Mapping[str, tuple[str, ...]]) -> None:
    name, fields = type(method).__name__, vars(method)
    for field, values in allowed.items():
        if fields[field] not in values:
            raise UserError(f"{name}.{field} is {fields[field]!r}, must be one of {', '.join(values)}")
    for field in ("samples", "cells"):
        if fields.get(field, 1) < 1:
            raise UserError(f"{name}.{field} is {fields[field]}, must be at least 1")
    for field in ("sigma", "spread"):
        if fields.get(field, 0) < 0:
            raise UserError(f"{name}.{field} is {fields[field]}, must not be negative")


@dataclass(frozen=True)
class GradientShap(Method):
    """Expected gradients between noisy inputs and random baselines (Lundberg & Lee, 2017; Erion et al., 2021).

    Of every draw: the input x' = x + noise, a baseline b and a place a, uniform on [0, 1), between
    them; the map is the mean of (x' - b) times the gradient at b + a (x' - b), as in captum's
    GradientShap, whose random numbers are numpy's and cannot be a sample's own. It sums, up to the
    error of the draws, to the mean change of the logit from b to x'.

    sigma    standard deviation of the noise as a share of each image's range; of a text, the range of its
             embedded tokens
    spread   of the baselines b around zero, as the same share. 0: one baseline, the data's mean colour, or
             the zero vector for every token. Not images of the data set, which make a map depend on it
    """

    NAME: ClassVar[str] = "attrib.methods.sampled.GradientShap"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed; sums about to the change of the logit"}
    samples: int = 25
    sigma: float = 0.1
    spread: float = 0.0
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        _check(self, {"reduce": get_args(Reduce)})

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
    """Mean score of randomly masked images that show a pixel (Petsiuk, Das & Saenko, *RISE*, BMVC 2018, section 3).

    A mask is ``cells`` x ``cells`` numbers, each 1 with probability ``keep``, else 0, enlarged
    bilinearly by one cell more than the image needs and shifted by up to a cell (section 3.2). The
    image is multiplied by it: a hidden pixel is 0, the data's mean colour. The map is the sum of
    score times mask over the masks, divided by their number and ``keep``. Only its differences
    between pixels mean something: its level is the mean score of all masks.

    samples   masks per image. The paper takes 4,000 for VGG-16 and 8,000 for ResNet-50, at 224 pixels
    cells     7 in the paper
    keep      0.5 in the paper
    output    "probability": softmax of the target (several labels: the mean of the sigmoids of the
              positive ones), as in the paper; or "logit"

    Images only.
    """

    NAME: ClassVar[str] = "attrib.methods.sampled.Rise"
    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[Mapping[str, str]] = {"map": "mean score where the pixel is seen, upsampled from cells"}
    samples: int = 4000
    cells: int = 7
    keep: float = 0.5
    output: Output = "probability"

    def __post_init__(self) -> None:
        _check(self, {"output": get_args(Output)})
        if not 0 < self.keep <= 1:
            raise UserError(f"Rise.keep is {self.keep}, must lie in (0, 1]")

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        x, cells = batch.x, self.cells
        total = torch.zeros_like(x[:, 0])
        for portion in _portions(self.samples, model, batch):
            drawn = noise.uniform(portion, cells**2 + 2).to(x)
            kept = (drawn[..., :-2] < self.keep).to(x).view(-1, cells, cells)
            shift = drawn[..., -2:].view(-1, 2)

            def piece(rows: slice, portion: int = portion, kept: Tensor = kept, shift: Tensor = shift) -> tuple:
                sample = torch.arange(rows.start, rows.stop, device=x.device) // portion
                height, width = (self._enlarge(side, shift[rows, i]) for i, side in enumerate(x.shape[-2:]))
                mask = height @ kept[rows] @ width.mT
                logits = model.module(x[sample] * mask[:, None])
                return self._score(logits, batch.target[sample]), mask

            with torch.no_grad():
                score, mask = model.chunked(piece, len(kept))
            total += (score[:, None, None] * mask).view(len(x), portion, *total.shape[1:]).sum(1)
        return {"map": total / (self.samples * self.keep)}

    def _enlarge(self, side: int, shift: Tensor) -> Tensor:
        """(R,) shifts in cells, [0, 1) -> (R, side, cells): the weight of each cell in each pixel along one axis."""
        cell = -(-side // self.cells)
        pixel = torch.arange(side, device=shift.device) + (shift * cell).floor()[:, None]
        # The mask is (cells + 1) cells wide, whatever that needs: so much is one pixel of it.
        place = ((pixel + 0.5) * self.cells / ((self.cells + 1) * cell) - 0.5).clamp(0, self.cells - 1)
        return (1 - (place[..., None] - torch.arange(self.cells, device=shift.device)).abs()).clamp(min=0)

    def _score(self, logits: Tensor, target: Tensor) -> Tensor:
        """(R, K) -> (R,)"""
        if self.output == "logit":
            return target_score(logits, target)
        if target.ndim == 1:
            return target_score(probabilities(logits), target)
        return target_score(probabilities(logits, several=True), target) / target.sum(1).clamp(min=1)
