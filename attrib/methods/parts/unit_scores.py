"""Scores of sets of units: by contextual decomposition, by removing them, or by leaving them alone."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from attrib.decomposition import Decomposer, decompose
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.models import Classifier, probabilities
from attrib.types import Batch, UserError
from attrib.units import Units

Baseline = Literal["zero", "mask"]
Output = Literal["logit", "probability"]
Part = Literal["cd", "occlusion", "build_up"]

COMPLETENESS = {"completeness_error": "largest |relevant + irrelevant - logit| of any unit, of the largest |logit|"}

_MASK_BYTES = 2**26  # of the masks of one call; more are handed on in pieces


def check_scores(method: object) -> None:
    """The fields by which a method says what kind of scores it takes. Raises UserError."""
    name, fields = type(method).__name__, vars(method)
    for field, kind in (("baseline", Baseline), ("output", Output)):
        if fields[field] not in get_args(kind):
            raise UserError(f"{name}.{field} is {fields[field]!r}, must be one of {', '.join(get_args(kind))}")
    if fields["score"] == "cd" and fields["output"] != "logit":
        raise UserError(f"{name}.output is {fields['output']!r}, but contextual decomposition is of logits")


def removed(model: Classifier, batch: Batch, inputs: Inputs, baseline: Baseline, name: str) -> Tensor:
    """(B, *input) with every unit removed: zeros, or of a text the net's mask token. ``name`` is for errors."""
    if baseline == "zero":
        return torch.zeros_like(inputs.x)
    if batch.words is None:
        raise UserError(f"{name}.baseline is 'mask', a token of texts; others have only 'zero'")
    return model.until(EMBEDDING, torch.where(batch.words >= 0, model.module.mask_id, batch.x)).z


class UnitScores:
    """What any sets of units of a batch contribute to all classes.

    "cd": the relevant part of the logits (``attrib.decomposition``); "occlusion": the fall of the logits
    when the set is removed; "build_up": the logits when all other units are. The latter two also of
    probabilities (``output``).

    as_released  for "cd": round as the authors' code does (``both`` of ``decompose``)

    logits  (B, K) of the whole samples
    error   (B,) largest error of completeness of any set so far, relative to the largest logit; 0 but for "cd"
    """

    def __init__(
        self,
        model: Classifier,
        batch: Batch,
        units: Units,
        how: Part = "cd",
        *,
        baseline: Baseline = "zero",
        output: Output = "logit",
        output_bias: bool = True,
        as_released: bool = False,
        name: str = "UnitScores",
    ) -> None:
        self._model, self._batch, self._units, self._how, self._output = model, batch, units, how, output
        self._both, self._asked = as_released, 0
        self.error = torch.zeros(len(batch), dtype=model.dtype, device=model.device)
        self.logits = model.logits(batch.x)
        if how == "cd":
            self._decomposer = Decomposer(model.module, output_bias=output_bias)
        else:
            self._inputs = Inputs.of(model, batch)
            self._removed = removed(model, batch, self._inputs, baseline, name)
            self._whole = probabilities(self.logits) if output == "probability" else self.logits

    def __call__(self, owner: Tensor, sets: Tensor) -> Tensor:
        """(R,) sample, (R, n) bool -> (R, K)."""
        self._asked += 1
        size = max(self._model.rows, _MASK_BYTES // max(1, self._units.of[0].numel()))
        pieces = [self._scores(o, s) for o, s in zip(owner.split(size), sets.split(size), strict=True)]
        return torch.cat(pieces)

    def _scores(self, owner: Tensor, sets: Tensor) -> Tensor:
        flat = self._units.of.flatten(1)[owner]
        inside = (sets.gather(1, flat.clamp(min=0)) & (flat >= 0)).view(-1, *self._units.of.shape[1:])
        if self._how == "cd":
            # Hierarchies ask often, and the rules are the same each time: the 1st, 2nd, 4th, 8th ... answer is checked.
            settings = {"both": self._both, "checks": int(self._asked & (self._asked - 1) == 0)}
            known = {"decomposer": self._decomposer, "logits": self.logits}
            found = decompose(self._model, self._batch.x, inside, samples=owner, **known, **settings)
            self.error = torch.maximum(self.error, found.error.to(self.error))
            return found.relevant
        if self._how == "occlusion":
            return self._whole[owner] - self._forward(owner, ~inside)
        return self._forward(owner, inside | (self._units.of[owner] < 0))

    @torch.no_grad()
    def _forward(self, owner: Tensor, there: Tensor) -> Tensor:
        """Logits (or probabilities) with only those places that are there, (R, *places) bool."""
        inputs = self._inputs

        def piece(rows: slice) -> Tensor:
            at = owner[rows]
            kept = there[rows].unsqueeze(1 if inputs.mask is None else -1)
            x = torch.where(kept, inputs.x[at], self._removed[at])
            logits = inputs.net(x, *(t[at] for t in inputs.rest))
            return probabilities(logits) if self._output == "probability" else logits

        return self._model.chunked(piece, len(owner))
