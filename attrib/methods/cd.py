"""Contextual decomposition of units, and what it was compared with on the same units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.methods.parts.losses import target_score
from attrib.methods.parts.unit_scores import COMPLETENESS, Baseline, Output, Part, UnitScores, check_scores
from attrib.models import Classifier, probabilities
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Partition, Units

Score = Literal["cd", "occlusion", "build_up", "input_x_gradient", "integrated_gradients"]


@dataclass(frozen=True)
class CD(Method):
    """Each unit's part of the target's logit (Murdoch, Liu & Yu, ICLR 2018; Singh, Murdoch & Yu, ICLR 2019).

    The map shares a unit's score equally among its places, so that a unit's score is its sum.

    score        "cd": the relevant part when the unit is what is relevant. On the same units, for comparison:
                 "occlusion", the fall of the score without the unit; "build_up", the score of the unit alone;
                 "input_x_gradient" and "integrated_gradients", summed over the unit
    units        how samples are cut into units
    output       "logit", or "probability" (softmax), which is what the authors' code compares with
    baseline     of occlusion and build-up, in the place of what is not there: "zero", or a text's "mask" token
    steps        points of integrated gradients on the line from zero to the input, both ends among them
    output_bias  false: without the bias of the last layer, as the authors' code for texts
    """

    NAME: ClassVar[str] = "attrib.methods.cd.CD"
    VERSION: ClassVar[int] = 1
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units (or of a probability), signed; a unit's score is its sum"}
    score: Score = "cd"
    units: Partition = field(default_factory=Partition)
    output: Output = "logit"
    baseline: Baseline = "zero"
    steps: int = 100
    output_bias: bool = True

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise UserError(f"CD.score is {self.score!r}, must be one of {', '.join(get_args(Score))}")
        if self.steps < 2:
            raise UserError(f"CD.steps is {self.steps}, must be at least 2")
        check_scores(self)

    @property
    def EXTRAS(self) -> Mapping[str, str]:  # noqa: N802
        return COMPLETENESS if self.score == "cd" else {}

    @property
    def COLUMNS(self) -> Mapping[str, str]:  # noqa: N802
        return dict.fromkeys(self.EXTRAS, "none")

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        units = self.units.of(batch)
        if self.score in get_args(Part):
            values, error = self._of_sets(model, batch, units)
        else:
            inputs = Inputs.of(model, batch)
            values, error = units.sum(inputs.reduce(self._gradient(model, inputs) * inputs.x, "sum")), None
        return {"map": units.spread(values), **({"completeness_error": error} if self.EXTRAS else {})}

    def _of_sets(self, model: Classifier, batch: Batch, units: Units) -> tuple[Tensor, Tensor]:
        """(B, n) the score of each unit as a set of its own, (B,) error of completeness."""
        owner, unit = units.exist[:, 0].nonzero(as_tuple=True)
        names = {"baseline": self.baseline, "output": self.output, "output_bias": self.output_bias, "name": "CD"}
        scores = UnitScores(model, batch, units, self.score, **names)
        values = torch.zeros(len(batch), units.most, dtype=model.dtype, device=batch.x.device)
        if len(owner):  # a batch of texts may have no word at all
            sets = unit[:, None] == torch.arange(units.most, device=unit.device)
            values[owner, unit] = target_score(scores(owner, sets), batch.target[owner])
        return values, scores.error

    def _gradient(self, model: Classifier, inputs: Inputs) -> Tensor:
        """(B, *input): the gradient at the input, or its mean along the line from zero."""
        single = self.score == "input_x_gradient"
        points = torch.linspace(1.0 if single else 0.0, 1.0, 1 if single else self.steps, dtype=inputs.x.dtype)
        role = None if inputs.mask is None else EMBEDDING
        total = torch.zeros_like(inputs.x)
        for some in points.to(inputs.x.device).split(max(1, model.rows // len(inputs.x))):
            x = inputs.x.unsqueeze(1) * some.view(-1, *[1] * (inputs.x.ndim - 1))

            def score(logits: Tensor, rows: slice, m: int = len(some)) -> Tensor:
                at = torch.arange(rows.start, rows.stop, device=logits.device) // m
                logits = probabilities(logits) if self.output == "probability" else logits
                return target_score(logits, inputs.target[at])

            _, grad = model.gradient(x.flatten(0, 1), score, role, inputs.rest)
            total += grad.view(x.shape).sum(1)
        return total / len(points)
