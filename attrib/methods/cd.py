"""Contextual decomposition of units, and the methods that its authors compare it with, on the same units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.fit import State
from attrib.keys import ADDED
from attrib.methods import Method
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.methods.parts.losses import target_score
from attrib.methods.parts.unit_scores import (
    COMPLETENESS,
    Baseline,
    Part,
    Rules,
    Scale,
    UnitScores,
    check_scores,
    scaled,
)
from attrib.models import Classifier
from attrib.noise import Noise
from attrib.types import Batch
from attrib.units import Partition, Units

Score = Literal["cd", "occlusion", "build_up", "input_x_gradient", "integrated_gradients"]


@dataclass(frozen=True)
class CD(Method):
    """Each unit's part of the target's logit (Murdoch, Liu & Yu, ICLR 2018; Singh, Murdoch & Yu, ICLR 2019).

    The map divides a unit's score equally among its places, so that the sum over a unit is its score.

    score        "cd": the relevant part of the logit when the unit is the relevant input. For comparison, on the
                 same units: "occlusion", the fall of the logit without the unit; "build_up", the logit of the
                 unit alone; "input_x_gradient" and "integrated_gradients", summed over the unit
    units        how samples are divided into units
    output       what is explained: "logit", or (not by "cd") "probability", the softmax, or "log_probability", its
                 logarithm, which the authors' code takes for digits
    baseline     for occlusion and build-up, what replaces a removed unit: "zero", a text's "mask" token, or "mean",
                 that of each channel of an image or sound
    steps        for integrated gradients, points on the line from zero to the input, including both ends
    output_bias  for "cd", whether to add the bias of the last layer; the authors' code for texts does not
    rules        for "cd": "singh", those of the papers above, or "cd_t", those of Hsu et al., *Efficient Automated
                 Circuit Discovery in Transformers using Contextual Decomposition*, ICLR 2025, which differ in
                 activations and in the bias of layer norms (``attrib.decomposition.rules_transformer``)

    >>> import attrib, torch
    >>> net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), torch.rand(1, 1, 4, 4)
    >>> map = attrib.explain(net, x, 1, CD()).map
    >>> map.shape
    torch.Size([1, 4, 4])
    """

    NAME: ClassVar[str] = "attrib.methods.cd.CD"
    CONTRASTS: ClassVar[bool] = True
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text", "audio")
    TEXT_ROLES: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    MAPS: ClassVar[Mapping[str, str]] = {
        "map": "logit units (or of a probability), signed; the sum over a unit is its score"
    }
    score: Score = "cd"
    units: Partition = field(default_factory=Partition)
    output: Scale = "logit"
    baseline: Baseline = "zero"
    steps: int = 100
    output_bias: bool = True
    rules: Rules = field(default="singh", metadata=ADDED)

    def __post_init__(self) -> None:
        require(self, "score", one_of=get_args(Score))
        require(self, "steps", at_least=2)
        check_scores(self)

    @property
    def VERSION(self) -> int:  # noqa: N802
        return 2 if self.score == "cd" else 1  # 1 multiplied parts of attention's weights, unless as torch writes them

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output != "logit"

    @property
    def EXTRAS(self) -> Mapping[str, str]:  # noqa: N802
        return COMPLETENESS if self.score == "cd" else {}

    @property
    def COLUMNS(self) -> Mapping[str, str]:  # noqa: N802
        return dict.fromkeys(self.EXTRAS, "none")

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        units = self.units.of(batch)
        if self.score == "input_x_gradient" or self.score == "integrated_gradients":
            inputs = Inputs.of(model, batch)
            values = units.sum(inputs.reduce(self._gradient(model, inputs) * inputs.x, "sum"))
            return {"map": units.spread(values)}
        values, error = self._of_sets(model, batch, units, self.score)
        return {"map": units.spread(values), **({"completeness_error": error} if self.EXTRAS else {})}

    def _of_sets(self, model: Classifier, batch: Batch, units: Units, how: Part) -> tuple[Tensor, Tensor]:
        """(B, n) the score of each unit, taken as a set of its own; (B,) the error of completeness."""
        owner, unit = units.exist[:, 0].nonzero(as_tuple=True)
        scores = UnitScores(
            model,
            batch,
            units,
            how,
            baseline=self.baseline,
            output=self.output,
            output_bias=self.output_bias,
            rules=self.rules,
            name="CD",
        )
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
                return target_score(scaled(logits, self.output, model.link), inputs.target[at])

            _, grad = model.gradient(x.flatten(0, 1), score, role, inputs.rest)
            total += grad.view(x.shape).sum(1)
        return total / len(points)
