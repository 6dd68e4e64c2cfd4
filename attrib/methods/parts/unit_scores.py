"""Scores of sets of units: by contextual decomposition, by removing the set, or by keeping nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from attrib.checks import require
from attrib.decomposition import Decomposer, decompose
from attrib.decomposition.table import RULES, TRANSFORMER_RULES, Rule
from attrib.methods.parts.inputs import EMBEDDING, Inputs
from attrib.models import Classifier, log_probabilities, probabilities
from attrib.models.output import Link
from attrib.types import Batch, UserError
from attrib.units import Units

Baseline = Literal["zero", "mask", "mean"]
Part = Literal["cd", "occlusion", "build_up"]
Scale = Literal["logit", "probability", "log_probability"]
Rules = Literal["singh", "cd_t"]

COMPLETENESS = {
    "completeness_error": "largest |relevant + irrelevant - logit| of any unit, as a share of the largest |logit|"
}

_RULES: Mapping[Rules, Mapping[str, Rule]] = {"singh": RULES, "cd_t": TRANSFORMER_RULES}

_MASK_BYTES = 2**26  # of the masks that are made at a time


def check_scores(method: object) -> None:
    """Check the fields ``score``, ``baseline``, ``output`` and ``rules`` of CD and ACD. Raises UserError."""
    name, fields = type(method).__name__, vars(method)
    require(method, "baseline", one_of=get_args(Baseline))
    require(method, "output", one_of=get_args(Scale))
    require(method, "rules", one_of=get_args(Rules))
    if fields["score"] == "cd" and fields["output"] != "logit":
        raise UserError(f"{name}.output is {fields['output']!r}, but contextual decomposition explains logits only")


def scaled(logits: Tensor, output: Scale, link: Link | None) -> Tensor:
    """(N, K) -> (N, K): the logits in what a method explains."""
    if output == "logit":
        return logits
    return probabilities(logits, link=link) if output == "probability" else log_probabilities(logits, link=link)


def removed(model: Classifier, batch: Batch, inputs: Inputs, baseline: Baseline, name: str) -> Tensor:
    """(B, *input) with every unit removed: zeros, in texts the net's mask token, or else the sample's mean per channel.

    Raises UserError, which begins with the method's ``name``, if there is no such token, or there are no channels.
    """
    if baseline == "zero":
        return torch.zeros_like(inputs.x)
    if baseline == "mean":
        if batch.words is not None:
            raise UserError(f"{name}.baseline is 'mean', the mean of an image's channels; texts have 'zero' and 'mask'")
        return inputs.constant("mean")
    if batch.words is None:
        raise UserError(f"{name}.baseline is 'mask', a token of texts; others have 'zero' and 'mean'")
    mask_id = getattr(model.module, "mask_id", None)
    if mask_id is None:
        net = type(model.module).__name__
        raise UserError(f"{name}.baseline is 'mask', but {net} has no mask token (mask_id); take 'zero'")
    return model.until(EMBEDDING, torch.where(batch.words >= 0, mask_id, batch.x)).z


class UnitScores:
    """What sets of units of a batch contribute to each class; called with the sets, once or often.

    how          "cd": the relevant part of the logits (``attrib.decomposition``); "occlusion": the fall of the
                 logits when the set is removed; "build_up": the logits when all other units are removed
    output       what occlusion and build-up are of: "logit", "probability" or "log_probability"
    baseline     of these two: what is put in the place of a removed unit, see ``removed``
    output_bias, rules, as_released   of "cd": see ``Decomposer`` and ``CD``; and round as the authors' code does, see
                 ``decompose``
    name         the method, for messages

    logits  (B, K) of the whole samples
    whole   (B, K) the same in what ``output`` says
    error   (B,) largest error of completeness of any set so far, relative to the largest logit; "cd" only, else 0
    """

    def __init__(
        self,
        model: Classifier,
        batch: Batch,
        units: Units,
        how: Part = "cd",
        *,
        baseline: Baseline = "zero",
        output: Scale = "logit",
        output_bias: bool = True,
        as_released: bool = False,
        rules: Rules = "singh",
        name: str = "UnitScores",
    ) -> None:
        self._model, self._batch, self._units, self._how, self._output = model, batch, units, how, output
        self._both, self._asked = as_released, 0
        self.error = torch.zeros(len(batch), dtype=model.dtype, device=model.device)
        self.logits = model.logits(batch.x)
        self.whole = scaled(self.logits, output, model.link)
        if how == "cd":
            self._decomposer = Decomposer(model, output_bias=output_bias, rules=_RULES[rules])
        else:
            self._inputs = Inputs.of(model, batch)
            self._removed = removed(model, batch, self._inputs, baseline, name)

    def __call__(self, owner: Tensor, sets: Tensor) -> Tensor:
        """The R sets ``sets`` (R, n) bool, of the samples ``owner`` (R,) -> scores (R, K)."""
        self._asked += 1
        size = max(self._model.rows, _MASK_BYTES // max(1, self._units.of[0].numel()))
        pieces = [self._scores(o, s) for o, s in zip(owner.split(size), sets.split(size), strict=True)]
        return torch.cat(pieces)

    def _scores(self, owner: Tensor, sets: Tensor) -> Tensor:
        flat = self._units.of.flatten(1)[owner]
        inside = (sets.gather(1, flat.clamp(min=0)) & (flat >= 0)).view(-1, *self._units.of.shape[1:])
        if self._how == "cd":
            found = decompose(
                self._model,
                self._batch.x,
                inside,
                samples=owner,
                decomposer=self._decomposer,
                logits=self.logits,
                both=self._both,
                # A hierarchy asks often, always by the same rules, so only the 1st, 2nd, 4th, 8th ... call is checked.
                checks=int(self._asked & (self._asked - 1) == 0),
            )
            self.error = torch.maximum(self.error, found.error.to(self.error))
            return found.relevant
        if self._how == "occlusion":
            return self.whole[owner] - self._forward(owner, ~inside)
        return self._forward(owner, inside | (self._units.of[owner] < 0))

    @torch.no_grad()
    def _forward(self, owner: Tensor, there: Tensor) -> Tensor:
        """(R, K) logits, or what ``output`` says, where only the places ``there`` (R, *places) bool are kept."""
        inputs = self._inputs

        def piece(rows: slice) -> Tensor:
            at = owner[rows]
            kept = there[rows].unsqueeze(1 if inputs.mask is None else -1)
            x = torch.where(kept, inputs.x[at], self._removed[at])
            return scaled(inputs.net(x, *(t[at] for t in inputs.rest)), self._output, self._model.link)

        return self._model.chunked(piece, len(owner))
