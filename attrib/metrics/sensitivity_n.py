"""Sensitivity-n: whether a subset's summed relevance correlates with what its removal costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrib.checks import require
from attrib.metrics.metric import Direction, Metric
from attrib.metrics.perturb import BASELINES, OUTPUTS, Baseline, baseline, rounding, score_mixed, target_score, whole
from attrib.metrics.words import REMOVALS, Removal, score_subsets
from attrib.models import Classifier, ScoreScale
from attrib.noise import Noise
from attrib.types import Batch, UserError
from attrib.units import Units

_LAST = torch.iinfo(torch.int64).max
_ROOM = 2**22  # numbers that say which words of a batch's texts go, at a time: 32 MiB


@dataclass(frozen=True)
class SensitivityN(Metric):
    """Sensitivity-n (Ancona et al., *Towards better understanding of gradient-based attribution
    methods*, ICLR 2018, section 4): of random subsets S of n pixels or words, the correlation (Pearson)

        of  sum of the map over S  with  score of the input - score without S

    over the subsets of one size, for each sample. The curve holds it for every n, the column is its mean.

    points     numbers n, in equal steps of their logarithm from 1 to ``fraction`` of the pixels or words, rounded.
               (The released InputIBA code takes the natural logarithm where base 10 is meant, so its powers
               10^0 .. 10^ln(n) go far beyond the image.) Below 1, as all units together are only one subset
    sizes      or else the numbers n themselves; one that leaves a sample no unit counts as all units but one
    samples    subsets of each size
    words      texts: what stands for a removed word, see ``words.score_without``; a word's relevance is the sum
               over its tokens, special tokens stay
    baseline   images: what stands for a removed pixel, see ``perturb.baseline``
    output     "logit", as in the paper, or "probability"

    Where all sums or all differences of one size are equal, the correlation is taken as 0; differences also where
    they vary by no more than the net rounds (``perturb.rounding``). So a constant map scores 0. A map with NaN or
    infinite values, a text of fewer than two words, and several labels of which none is positive: NaN. Costs
    ``points`` times ``samples`` forward passes, and one; equal sets of a text's words share theirs.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> rows = attrib.evaluate(net, x, torch.rand(1, 32, 32), SensitivityN())
    >>> list(rows["column"])
    ['sensitivity_n']
    """

    NAME: ClassVar[str] = "attrib.metrics.sensitivity_n.SensitivityN"
    VERSION: ClassVar[int] = 2  # 1 took what a float32 net rounds for differences
    CONTRASTS: ClassVar[bool] = True
    NEEDS_LOGITS: ClassVar[tuple[str, ...]] = ("image", "text")
    MODALITIES: ClassVar[tuple[str, ...]] = ("image", "text")
    COLUMNS: ClassVar[Mapping[str, Direction]] = {"sensitivity_n": "higher"}
    ABOUT: ClassVar[Mapping[str, str]] = {
        "sensitivity_n": "correlation of a random set's relevance with what its removal costs, mean over sizes of sets",
    }
    CURVES: ClassVar[Mapping[str, str]] = {
        "sensitivity_n_curve": "x: size of the subsets, log-spaced from 1 to the largest; y: correlation"
    }
    BOUNDS: ClassVar[Mapping[str, tuple[float, float]]] = {"sensitivity_n_curve": (-1.0, 1.0)}

    points: int = 10
    fraction: float = 0.8
    sizes: tuple[int, ...] | None = None
    samples: int = 100
    words: Removal = "zero"
    baseline: Baseline = "zero"
    output: ScoreScale = "logit"

    def __post_init__(self) -> None:
        require(self, "points", at_least=1)
        require(self, "samples", at_least=2)
        require(self, "fraction", above=0, below=1)
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise UserError(f"SensitivityN.sizes is {list(self.sizes)}, must be one or more numbers from 1 on")
        require(self, "words", one_of=REMOVALS)
        require(self, "baseline", one_of=BASELINES)
        require(self, "output", one_of=OUTPUTS)

    @property
    def NEEDS_PROBABILITIES(self) -> bool:  # noqa: N802
        return self.output == "probability"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("embedding",) if self.words == "zero" else ()

    def counts(self, units: Tensor) -> Tensor:
        """(B,) numbers of pixels or words -> (B, P) sizes of subsets."""
        most = (units - 1).clamp(min=1)[:, None]
        if self.sizes is not None:
            return torch.tensor(self.sizes, device=units.device).minimum(most)
        limit = (self.fraction * units.double() + 1e-9).floor().clamp(min=1)[:, None]
        step = torch.arange(self.points, device=units.device, dtype=torch.float64) / max(1, self.points - 1)
        return (limit**step).round().long().minimum(most)

    def score(self, model: Classifier, batch: Batch, map: Tensor, noise: Noise) -> dict[str, Tensor]:
        """``map`` (B, H, W), text (B, T) -> a column (B,) and a curve (B, P), float64 on the model's device.

        Raises ValueError if the map does not fit the inputs.
        """
        expected = batch.x.shape if batch.words is not None else (len(batch), *batch.x.shape[2:])
        if map.shape != expected:
            raise ValueError(f"SensitivityN: a map of shape {tuple(map.shape)} does not fit {tuple(batch.x.shape)}")
        batch, map = batch.to(model.device), map.detach().to(model.device).double()
        batch = batch if batch.words is not None else batch.to(model.device, model.dtype)
        if batch.words is not None:
            units = Units.words(batch)
        else:
            pixels = torch.arange(map[0].numel(), device=model.device).view(map.shape[1:])
            units = Units.given(pixels.expand(map.shape))
        ignored = torch.zeros_like(map, dtype=torch.bool) if batch.mask is None else ~batch.mask
        finite = (map.isfinite() | ignored).flatten(1).all(1)
        defined = finite & (units.n > 1)
        value = units.sum(torch.where(map.isfinite(), map, 0.0))

        sizes = self.counts(units.n.cpu()).repeat_interleave(self.samples, dim=1)
        change, total, error = [], [], []
        base = baseline(batch.x, self.baseline) if batch.words is None else batch.x
        logits = whole(model, batch)
        before = target_score(logits, batch.target, self.output, model.link)[:, None]
        # Of texts more than go through the net at a time, to find those that are equal.
        portion = model.rows // len(batch) if batch.words is None else _ROOM // max(1, len(batch) * units.most)
        for gone in self._subsets(units, sizes, noise, max(1, portion)):
            score = self._scores(model, batch, base, units, gone)
            change.append(before - score)
            total.append((value[:, None] * gone).sum(2))
            error.append(rounding(model, logits, score, self.output))
        found = [torch.cat(part, 1).view(len(batch), -1, self.samples) for part in (change, total, error)]
        curve = correlation(*found).masked_fill(~defined[:, None], torch.nan)
        return {"sensitivity_n": curve.mean(1), "sensitivity_n_curve": curve}

    @staticmethod
    def _subsets(units: Units, sizes: Tensor, noise: Noise, portion: int) -> Iterator[Tensor]:
        """(B, M) sizes, on the CPU -> M random subsets in pieces of at most ``portion``, (B, m, n) bool."""
        beyond = ~units.exist[:, 0]
        alike = bool((sizes == sizes[:1]).all())  # always of images: the one number can be found without a sort
        there = sizes.to(beyond.device)
        for some, first in zip(there.split(portion, dim=1), sizes[0].split(portion)):
            gone = []
            for one, size in zip(first.tolist(), some.unbind(1)):  # one draw after another: portions do not matter
                bits = noise.ragged_bits((units.most,), 0).masked_fill(beyond, _LAST)
                if alike:
                    last = bits.kthvalue(one, dim=1, keepdim=True).values
                else:
                    last = bits.sort(1).values.gather(1, size[:, None] - 1)
                gone.append((bits <= last) & ~beyond)
            yield torch.stack(gone, 1)

    def _scores(self, model: Classifier, batch: Batch, base: Tensor, units: Units, gone: Tensor) -> Tensor:
        """(B, m, n) bool -> (B, m) the target's score without these units, images with ``base`` in their place."""
        places = units.of.flatten(1)
        if batch.words is not None:
            sample = torch.arange(len(batch), device=model.device).repeat_interleave(gone.shape[1])
            sets, place = torch.cat((sample[:, None], gone.flatten(0, 1)), 1).unique(dim=0, return_inverse=True)
            sample, words = sets[:, 0], sets[:, 1:].bool()

            def tokens(rows: slice) -> Tensor:
                of = places[sample[rows]]
                return words[rows].gather(1, of.clamp(min=0)) & (of >= 0)

            return score_subsets(model, batch, sample, tokens, self.words, self.output)[place].view(gone.shape[:2])

        def removed(i: int, columns: slice) -> Tensor:
            return gone[i, columns].view(-1, 1, *batch.x.shape[2:])

        return score_mixed(model, batch.target, gone.shape[1], batch.x, base, removed, self.output)


def correlation(a: Tensor, b: Tensor, error: Tensor | float = 0.0) -> Tensor:
    """Pearson's, over the last dimension; 0 where one does not vary beyond rounding, NaN where one has NaN.

    ``error``: how far each of ``a`` may be off.
    """
    moved = []
    for values, unsure in ((a, error), (b, 0.0)):
        centred = values - values.mean(-1, keepdim=True)
        size = centred.norm(dim=-1, keepdim=True)
        noise = (1e-12 * values.abs() + unsure).norm(dim=-1, keepdim=True)
        moved.append(torch.where(size <= noise, 0.0, centred / size))
    return (moved[0] * moved[1]).sum(-1)
