"""ERASER: how much of the target's score goes with the best words, and how much stays with them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import OUTPUTS
from attrib.metrics.words import REMOVALS, Removal, order, score_without
from attrib.models import Classifier, ScoreScale
from attrib.noise import Noise
from attrib.types import Batch, UserError


@dataclass(frozen=True)
class Eraser(Metric):
    """Comprehensiveness and sufficiency (DeYoung et al., *ERASER*, ACL 2020, section 4.2).

    With p the target's score, and r_q the best words of the map, a share q of all words:

        comprehensiveness = mean over q of  p(text) - p(text without r_q)    higher is better
        sufficiency       = mean over q of  p(text) - p(r_q alone)           lower is better

    The mean is over the ``bins``, as in the benchmark's released scorer. The paper's formula sums from
    k = 0, no words, and divides by the number of bins + 1. That only scales comprehensiveness, whose
    term k = 0 is zero, by 5 / 6; to sufficiency it would add the loss of the empty text, which says
    nothing about a map. Differences keep their sign: a text may be recognised better without its best
    words. The target is the batch's, not the class that the net predicts for what is left.

    bins    shares q of the words, each in (0, 1]. A share means at least that many words, rounded up,
            so at least one: in a text of 19 words 1 %, 5 %, 10 %, 20 % and 50 % are 1, 1, 2, 4 and 10
    words   what stands for a word that is not there. "delete", nothing: as in the paper, which takes
            the words out. "zero" and "mask" leave the places of the other words as they are, and so
            tell the loss of the words from that of their order; see ``words.score_without``
    output  "probability": softmax of the target, or "logit"; see ``perturb.target_score``

    Words, their order, ties: as in ``InsertionDeletion``. A map with NaN or infinite values and a text
    without words score NaN. Costs at most two passes a bin and one for the text; bins of equally many
    words share theirs.
    """

    NAME: ClassVar[str] = "attrib.metrics.eraser.Eraser"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    NEEDS_LOGITS: ClassVar[tuple[str, ...]] = ("text",)
    MODALITIES: ClassVar[tuple[str, ...]] = ("text",)
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"comprehensiveness": "higher", "sufficiency": "lower"}
    ABOUT: ClassVar[Mapping[str, str]] = {
        "comprehensiveness": "fall of the score without the most relevant words, mean over shares of the words",
        "sufficiency": "fall of the score with only the most relevant words, mean over shares of the words",
    }

    bins: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.5)
    words: Removal = "delete"
    output: ScoreScale = "probability"

    def __post_init__(self) -> None:
        if not self.bins or not all(0 < q <= 1 for q in self.bins):
            raise UserError(f"Eraser.bins is {list(self.bins)}, must be one or more shares of the words, in (0, 1]")
        require(self, "words", one_of=REMOVALS)
        require(self, "output", one_of=OUTPUTS)

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output == "probability"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("embedding",) if self.words == "zero" else ()

    def counts(self, words: Tensor) -> Tensor:
        """(B,) numbers of words -> (B, bins): how many are the best ones."""
        shares = torch.tensor(self.bins, dtype=torch.float64, device=words.device)
        # 1e-9, because 0.07 * 100 is above 7.
        return (shares * words[:, None].double() - 1e-9).ceil().long().clamp(min=1)

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, T) -> two columns (B,), float64 on the model's device.

        Raises ValueError if the inputs are not texts of the map's size.
        """
        batch = batch.to(model.device)
        ordered = order(batch, map, noise)
        counts = self.counts(ordered.count)
        whole, all_words = torch.zeros_like(counts[:, :1]), ordered.count[:, None].expand_as(counts)
        first = torch.cat((whole, torch.zeros_like(counts), counts), dim=1)
        last = torch.cat((whole, counts, all_words), dim=1)
        scores = score_without(model, batch, ordered, first, last, self.words, self.output)
        without, alone = (scores[:, :1] - part for part in scores[:, 1:].chunk(2, dim=1))
        return {"comprehensiveness": without.mean(dim=1), "sufficiency": alone.mean(dim=1)}
